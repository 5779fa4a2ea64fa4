"""TRL's RewardTrainer on our token ids optimizes the scores that we compute."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.models.loading import ensure_pad_token
from rlhf.reward_models import LearnedReward
from rlhf.reward_models.chat_template import encode_conversation, template_hash
from rlhf.reward_models.sidecar import Sidecar


@pytest.fixture(scope="module")
def trained(helpers, tmp_path_factory):
    """A tiny decoder trained to prefer the reply "yes"; returns folder, pairs, TRL's margins."""
    from trl import RewardConfig, RewardTrainer

    base = helpers["causal"](
        tmp_path_factory.mktemp("base"), tokenizer=helpers["tokenizer"](pad="<eos>")
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = ensure_pad_token(tokenizer)
    talk = helpers["talk"]
    pairs = [(talk(f"q {i}", "yes"), talk(f"q {i}", "no " * (i % 3 + 1))) for i in range(32)]
    encoded = [
        [encode_conversation(tokenizer, c, append_eos=True, max_length=32) for c in pair]
        for pair in pairs
    ]
    data = Dataset.from_list([{"chosen_ids": c, "rejected_ids": r} for c, r in encoded])
    folder = tmp_path_factory.mktemp("reward")
    arguments = RewardConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_train_epochs=10,
        learning_rate=1e-2,
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RewardTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    trainer.model.eval()
    batch = trainer.data_collator([data[i] for i in range(len(data))])
    with torch.no_grad():
        chosen, rejected = trainer.model(**batch).logits[:, 0].chunk(2)
    trainer.save_model(str(folder / "final"))
    policy = Sidecar(template_hash(tokenizer), append_eos=True, max_length=32, pooling="last")
    policy.write(folder / "final")
    return folder / "final", pairs, (chosen - rejected).tolist()


def test_trained_checkpoint_scores_what_trl_optimized(trained):
    folder, pairs, margins = trained
    reward = LearnedReward.load(folder, batch_size=5)
    ours = [
        c - r
        for c, r in zip(reward([p[0] for p in pairs]), reward([p[1] for p in pairs]), strict=True)
    ]
    assert ours == pytest.approx(margins, abs=1e-5)
    assert min(ours) > 0


def test_trained_checkpoint_is_refused_with_another_template(trained, tmp_path):
    import shutil

    folder = shutil.copytree(trained[0], tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="was trained with template_hash"):
        LearnedReward.load(folder)
