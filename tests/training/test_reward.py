"""Training reward models on pairs and labels: each known trap, shut."""

import json
import math
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf.cli.table import configure, run_command
from rlhf.errors import UserError
from rlhf.reward_models import LearnedReward
from rlhf.runs.checksums import verify_checksums
from rlhf.runs.directory import Run, seed_everything
from rlhf.studies.reward_report import write_calibration_to_checkpoint
from rlhf.training import offline
from rlhf.training.reward_models.base import reward_kind_of
from rlhf.training.reward_models.encoding import RewardEncoder
from rlhf.training.reward_models.new_head import load_model_tokenizer_and_pooling
from rlhf.training.trl.trainer import make_trainer, make_training_arguments
from tests.helpers.training import evaluations, pair_rows, pairs_tree, save_model, write_rows


def start_loss(tree):
    """The held-out loss before any training."""
    config = configure("reward", tree | {"engine": "trl"})
    seed_everything(config.seed)
    method = offline.method_of("reward", config)
    run = Run.open({**tree, "command": "reward"})
    train_rows, eval_rows = offline.load_train_and_eval_rows(config, method)
    engine = offline.engine_of(config, native_supported=method.native)
    setup = method.setup(config, train_rows, engine)
    train_set, eval_set = setup.encode(train_rows, True), setup.encode(eval_rows, False)
    options = make_training_arguments(method, setup.trainer, config, run.directory, len(train_set))
    trainer = make_trainer(setup, config, options, train_set, eval_set)
    return trainer.evaluate()["eval_loss"]


def padded_with_eos(folder):
    save_model(folder, sharp=5.0)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token": config["eos_token"]}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return folder


def test_padding_token_differs_from_eos(tmp_path):
    model_folder = padded_with_eos(tmp_path / "model")
    final = run_command("reward", pairs_tree(tmp_path, model_folder))
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ended = [*tokenizer("apple river")["input_ids"], tokenizer.eos_token_id]
    cut = [*ended[:-1], tokenizer.pad_token_id]
    with torch.no_grad():
        both = model(torch.tensor([ended, cut])).logits.squeeze(-1)
        alone = model(torch.tensor([ended[:-1]])).logits.squeeze()
    assert both[1] == pytest.approx(alone.item(), abs=1e-5)
    assert abs(both[0] - both[1]) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_and_saves_the_head(tmp_path, echo_model, dtype):
    keys = {"model": {"path": str(echo_model), "lora": {"rank": 4}, "dtype": dtype}}
    tree = pairs_tree(tmp_path, echo_model, **keys)
    config = configure("reward", tree)
    seed_everything(config.seed)
    fresh, *_ = load_model_tokenizer_and_pooling(reward_kind_of(config))
    before = fresh.base_model.model.score.modules_to_save["default"].weight.detach().clone()
    final = run_command("reward", tree)
    after = AutoModelForSequenceClassification.from_pretrained(final).score.weight
    assert (after - before).abs().max() > 1e-3
    assert not (final / "adapter_config.json").exists()


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_saved_model_has_the_logged_loss(tmp_path, echo_model, lora):
    """The best eval/loss in the log, worked out anew from the scores of the loaded model."""
    keys = {"model": {"path": str(echo_model), "lora": lora}}
    tree = pairs_tree(tmp_path, echo_model, **keys)
    final = run_command("reward", tree)
    config = configure("reward", tree)
    _, rows = offline.load_train_and_eval_rows(config, offline.method_of("reward", config))
    reward = LearnedReward.load(final)
    chosen = torch.tensor(reward([[*row["prompt"], *row["chosen"]] for row in rows]))
    rejected = torch.tensor(reward([[*row["prompt"], *row["rejected"]] for row in rows]))
    loss = torch.nn.functional.softplus(rejected - chosen).mean().item()
    logged = [found for step, found in evaluations(tmp_path / "run").items() if step]
    assert loss == pytest.approx(min(logged), abs=1e-4)


def test_long_pairs_are_truncated(tmp_path, echo_model, caplog):
    tokenizer = AutoTokenizer.from_pretrained(echo_model)
    rows = pair_rows(8)
    rows[3]["chosen"] = [{"role": "assistant", "content": "apple river " * 40}]
    config = configure("reward", pairs_tree(tmp_path, echo_model, max_length=24))
    encoder = RewardEncoder(reward_kind_of(config), tokenizer, append_eos=True)
    made = encoder(rows, False)
    assert len(made) == 8
    long = made[7].ids[0]  # the held-out rows stand in order of length
    assert len(long) == 24
    assert long[-1] == tokenizer.eos_token_id  # what is scored is the end
    assert encoder.truncated_and_dropped_text() == "1 truncated"
    with caplog.at_level("INFO"):
        run_command("reward", pairs_tree(tmp_path, echo_model, rows=rows * 4, max_length=24))
    assert "examples: 4 truncated" in caplog.text.replace(" 3 ", " 4 ")


def with_margins(rows):
    return [row | {"margin": 2.0} for row in rows]


def test_report_counts_dropped_rows(tmp_path, echo_model):
    rows = pair_rows(8)
    rows[3]["rejected"] = rows[3]["chosen"]
    test = write_rows(tmp_path / "test.jsonl", rows)
    run_command("reward", pairs_tree(tmp_path, echo_model, test_data=[{"path": str(test)}]))
    summary = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert summary["data"]["dropped"] == {"chosen equals rejected": 1}
    assert summary["accuracy"]["n"] == 7


def test_margins_are_used_only_with_the_setting(tmp_path, echo_model):
    losses = {}
    for name, rows, asked in (
        ("plain", pair_rows(), False),
        ("unasked", with_margins(pair_rows()), False),
        ("asked", with_margins(pair_rows()), True),
    ):
        tree = pairs_tree(tmp_path, echo_model, rows=rows, name=name, margins=asked)
        losses[name] = start_loss(tree)
    assert losses["unasked"] == losses["plain"]
    # Scores hardly differ at the start: softplus(0 + margin) against softplus(0).
    assert losses["plain"] == pytest.approx(math.log(2), abs=0.2)
    assert losses["asked"] == pytest.approx(math.log(1 + math.e**2), abs=0.3)


def test_margins_without_a_column_are_refused(tmp_path, echo_model):
    with pytest.raises(UserError, match="the pairs have neither a margin column"):
        run_command("reward", pairs_tree(tmp_path, echo_model, margins=True))


def test_scratch_model_is_refused(tmp_path, echo_model):
    with pytest.raises(UserError, match="a reward model must start from a trained model"):
        run_command("reward", pairs_tree(tmp_path, echo_model, model={"scratch": {}}))


def labeled_texts(count=32):
    return [{"text": f"{w} {i}", "label": int(w == "apple")} for i in range(count) for w in
            (("apple", "river")[i % 2],)]  # fmt: skip


def test_classifier_scores_are_log_odds(tmp_path, echo_model):
    tree = pairs_tree(tmp_path, echo_model, rows=labeled_texts(64))
    tree |= {"kind": "classification", "evaluations": 1}
    tree["trainer"] |= {"max_steps": 24}
    final = run_command("reward", tree)
    good, bad = LearnedReward.load(final)(
        [[{"role": "assistant", "content": text}] for text in ("apple 3", "river 4")]
    )
    assert good > 1
    assert bad < -1
    assert evaluations(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=0.2)


def test_temperature_that_cannot_be_fitted_is_reported(tmp_path, echo_model, caplog, monkeypatch):
    report = {
        "calibration": {"fitted": {"temperature": None}},
        "verdict": ["No temperature makes its margins informative."],
    }
    monkeypatch.setattr(
        "rlhf.training.reward_models.preference.write_pair_evaluation",
        lambda *args, **kwargs: report,
    )
    with caplog.at_level("INFO"):
        final = run_command("reward", pairs_tree(tmp_path, echo_model))
    assert json.loads((final / "reward_model.json").read_text())["temperature"] == 1.0
    assert "No temperature makes its margins informative" in caplog.text


def test_the_fitted_temperature_is_saved_and_the_checksums_stay_valid(
    tmp_path, echo_model, monkeypatch
):
    report = {"calibration": {"fitted": {"temperature": 1.7}}, "verdict": []}
    monkeypatch.setattr(
        "rlhf.training.reward_models.preference.write_pair_evaluation",
        lambda *args, **kwargs: report,
    )
    final = run_command("reward", pairs_tree(tmp_path, echo_model))
    assert json.loads((final / "reward_model.json").read_text())["temperature"] == 1.7
    verify_checksums(final)
    weights = final / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    report = {"calibration": {"fitted": {"temperature": 0.5}}, "policy": None}
    write_calibration_to_checkpoint(final, report)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        verify_checksums(final)


def test_replies_of_one_character(tmp_path, echo_model):
    rows = [{"prompt": f"word {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    run_command("reward", pairs_tree(tmp_path, echo_model, rows=rows))
    assert (tmp_path / "run" / "finished").exists()
    report = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert report["baselines"]["bag of words"]["accuracy"]["value"] == 1.0


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_transformers_reads_the_score_at_eos(tmp_path, echo_model):
    """ChatML writes a newline after EOS; whoever renders with the saved template reads EOS."""
    folder = tmp_path / "model"
    shutil.copytree(echo_model, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    final = run_command("reward", pairs_tree(tmp_path, folder))
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    ours = LearnedReward.load(final)
    for text in ("apple", "a river", ""):
        talk = [{"role": "user", "content": "Repeat: it"}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(talk, return_dict=False, return_tensors="pt")
        assert ids[0].tolist() == ours.encode(talk)
        with torch.no_grad():
            plain = model(ids).logits.item()
        assert plain == pytest.approx(ours([talk])[0], abs=1e-5)
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>Repeat: it<|end|>\n<|assistant|>"


def test_pairs_equal_after_truncation_are_dropped(tmp_path, echo_model):
    rows = pair_rows(8)
    tail = "river " * 40
    for index, start in ((2, "good "), (5, "bad ")):
        for side, word in (("chosen", start), ("rejected", "other ")):
            rows[index][side] = [{"role": "assistant", "content": word + tail}]
    config = configure("reward", pairs_tree(tmp_path, echo_model, max_length=24))
    tokenizer = AutoTokenizer.from_pretrained(echo_model)
    encoder = RewardEncoder(reward_kind_of(config), tokenizer, append_eos=True)
    assert len(encoder(rows, True)) == 6
    assert encoder.truncated_and_dropped_text() == "2 dropped: equal after max_length"
    tree = pairs_tree(tmp_path, echo_model, rows=[rows[2], rows[5]] * 8, max_length=24)
    with pytest.raises(UserError, match=r"dropped: equal after max_length; max_length is 24"):
        run_command("reward", tree)
