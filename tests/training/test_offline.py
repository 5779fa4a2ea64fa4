"""The offline stages over TRL: each known trap, shut."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf.cli.table import run_command
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.offline import RESERVED_OPTIONS, OfflineConfig
from rlhf.errors import UserError
from rlhf.models.precision import MasterAdamW
from rlhf.runs.interrupt import Interrupted
from rlhf.training import offline
from rlhf.training.examples import ExampleEncoder
from rlhf.training.methods import num_steps
from rlhf.training.trl.callback import RunCallback
from rlhf.training.trl.columns import KTOCollator, PairCollator, dpo_trainer_dataset
from rlhf.training.trl.trainer import padding_multiple
from tests.helpers.trainers import ROWS, divergent, tree_of, trl_trainer
from tests.helpers.training import (
    evaluations,
    metrics_of,
    offline_tree,
    pair_rows,
    same,
    sft_rows,
    tensors_of,
    user,
    weights_of,
    write_rows,
)


@torch.no_grad()
def shake(model):
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trap is one of machines without a GPU")
@pytest.mark.parametrize("options", [trl.SFTConfig, trl.RewardConfig, trl.DPOConfig, trl.KTOConfig])
def test_the_trap_is_there_default_options_raise_on_a_cpu(tmp_path, options):
    with pytest.raises(ValueError, match="bf16"):
        options(output_dir=str(tmp_path))


@pytest.mark.parametrize("command", ROWS)
def test_every_stage_trains_evaluates_and_leaves_a_model(tmp_path, echo_model, command):
    final = run_command(command, tree_of(command, tmp_path, echo_model))
    folder = tmp_path / "run"
    assert final == folder / "final"
    assert sorted(evaluations(folder)) == [0, 2, 4, 6, 8]
    losses = [row["train/loss"] for row in metrics_of(folder) if "train/loss" in row]
    assert len(losses) == 8
    kind = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
    model, info = kind.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(final).chat_template
    start = AutoModelForCausalLM.from_pretrained(echo_model)
    moved = model.model.embed_tokens.weight - start.model.embed_tokens.weight
    assert moved.abs().max() > 1e-4
    assert (folder / "report.html").exists()


def test_dpo_starts_at_ln_2_whatever_lies_on_disk(tmp_path, echo_model):
    trainer = trl_trainer("dpo", tree_of("dpo", tmp_path, echo_model), change=shake)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_kto_starts_at_no_divergence_whatever_lies_on_disk(tmp_path, echo_model):
    trainer = trl_trainer("kto", tree_of("kto", tmp_path, echo_model), change=shake)
    found = trainer.evaluate()
    assert found["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["eval_loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_the_log_of_a_preference_run_starts_where_the_reference_is(tmp_path, echo_model, command):
    run_command(command, tree_of(command, tmp_path, echo_model))
    start = {"dpo": math.log(2), "kto": 0.5}[command]
    assert evaluations(tmp_path / "run")[0] == pytest.approx(start, abs=1e-6)
    assert evaluations(tmp_path / "run")[8] != pytest.approx(start, abs=1e-3)


def test_dpo_with_adapters_needs_no_second_model(tmp_path, echo_model):
    keys = {"model": {"path": str(echo_model), "lora": {"rank": 4}}}
    run_command("dpo", tree_of("dpo", tmp_path, echo_model, **keys))
    losses = evaluations(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[8] - losses[0]) > 1e-3


def test_sft_examples_are_truncated_at_their_end_and_counted(echo_model):
    tokenizer = AutoTokenizer.from_pretrained(echo_model)
    rows = sft_rows(3)
    rows[1]["completion"] = [{"role": "assistant", "content": "apple " * 90}]
    rows[2]["prompt"] = [{"role": "user", "content": "apple " * 90}]
    encoder = ExampleEncoder(tokenizer, max_length=32)
    made = encoder(rows)
    assert len(made) == 2
    assert [len(example.ids[0]) for example in made][1] == 32
    assert (
        encoder.truncated_and_dropped_text()
        == "1 truncated, 1 dropped: the prompt fills max_length"
    )
    for example in made:  # the loss is on the reply alone
        (ids,), (labels,) = example.ids, example.labels
        trained = [token for token, label in zip(ids, labels, strict=True) if label > 0]
        assert tokenizer.decode(trained).startswith(("apple", "river", "stone", "cloud"))


def test_nothing_fits_is_one_line(echo_model):
    encoder = ExampleEncoder(AutoTokenizer.from_pretrained(echo_model), max_length=2)
    with pytest.raises(
        UserError, match=r"no example fits max_length=2: 3 dropped.*raise max_length"
    ):
        encoder(sft_rows(3))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_bf16_weights_learn_what_bf16_cannot_hold(tmp_path, echo_model, command):
    """Updates of 1e-6 vanish in a bf16 weight; the float32 masters keep them."""
    keys = {"model": {"path": str(echo_model), "dtype": "bfloat16"}}
    trainer = trl_trainer(
        command, tree_of(command, tmp_path, echo_model, trainer={"learning_rate": 1e-6}, **keys)
    )
    weights = list(trainer.model.parameters())
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    before = [weight.detach().float() for weight in weights]
    trainer.train()
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(optimizer, MasterAdamW)
    (masters,) = (group for group in optimizer.master_weights if group)
    moved = [(m - b).abs().max().item() for m, b in zip(masters, before, strict=True)]
    assert min(moved) > 1e-7
    assert max(moved) < 1e-5


def test_a_bf16_run_saves_bf16_and_resumes(tmp_path, echo_model):
    keys = {"model": {"path": str(echo_model), "dtype": "bfloat16"}}
    final = run_command("sft", tree_of("sft", tmp_path, echo_model, **keys))
    assert {w.dtype for w in weights_of(final.parent).values()} == {torch.bfloat16}


def test_the_best_checkpoint_is_the_one_that_is_kept(tmp_path, echo_model):
    run_command("sft", divergent(tmp_path, echo_model))
    folder = tmp_path / "run"
    losses = evaluations(folder)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert best < 24
    kept = AutoModelForCausalLM.from_pretrained(folder / f"checkpoints/checkpoint-{best}")
    last = AutoModelForCausalLM.from_pretrained(folder / "checkpoints/checkpoint-24")
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert same(dict(final.named_parameters()), dict(kept.named_parameters()))
    assert not same(dict(final.named_parameters()), dict(last.named_parameters()))


def test_early_stopping_stops(tmp_path, echo_model):
    run_command("sft", divergent(tmp_path, echo_model, patience=2))
    losses = evaluations(tmp_path / "run")
    steps = sorted(losses)
    assert steps[-1] < 24
    best = min(steps[1:], key=lambda step: losses[step])
    assert steps[-1] == best + 2 * 2  # two evaluations, two steps apart, without a better one


OPTION_VALUES = {
    "chat_template_path": "other.jinja",
    "dataset_kwargs": {},
    "dataset_text_field": "body",
    "eos_token": "\n",
    "metric_for_best_model": "accuracy",
    "model_init_kwargs": {},
    "pad_token": "\n",
    "eval_strategy": "steps",
    "output_dir": "elsewhere",
    "resume_from_checkpoint": "elsewhere",
    "save_strategy": "steps",
    "truncation_mode": "keep_end",
}


@pytest.mark.parametrize("key", sorted(RESERVED_OPTIONS))
def test_options_that_the_run_sets_are_refused_by_name(tmp_path, echo_model, key):
    value = OPTION_VALUES.get(key, 1)
    with pytest.raises(UserError) as caught:
        run_command("sft", tree_of("sft", tmp_path, echo_model, trainer={key: value}))
    assert str(caught.value).startswith(f"trainer.{key} cannot be set: {RESERVED_OPTIONS[key]}")


def test_bad_values_of_trainer_options_are_one_line(tmp_path, echo_model):
    with pytest.raises(UserError, match=r"^trainer: ") as caught:
        run_command(
            "dpo", tree_of("dpo", tmp_path, echo_model, trainer={"loss_type": ["nonsense"]})
        )
    assert "\n" not in str(caught.value)


def test_lora_leaves_an_adapter_that_loads_as_a_model(tmp_path, echo_model):
    keys = {"model": {"path": str(echo_model), "lora": {"rank": 4}}}
    final = run_command("sft", tree_of("sft", tmp_path, echo_model, **keys))
    assert (final / "adapter_config.json").exists()
    from rlhf.models.loading import load_causal_model

    merged = load_causal_model(str(final))
    start = AutoModelForCausalLM.from_pretrained(echo_model)
    gap = merged.model.layers[0].mlp.up_proj.weight - start.model.layers[0].mlp.up_proj.weight
    assert gap.abs().max() > 1e-4


def test_a_model_from_scratch_learns_its_tokenizer_from_the_rows(tmp_path, echo_model):
    scratch = {"scratch": {"hidden_size": 16, "num_heads": 2, "context": 64}}
    final = run_command("sft", tree_of("sft", tmp_path, echo_model, model=scratch))
    assert len(AutoTokenizer.from_pretrained(final)("apple")["input_ids"]) == 1


def test_held_out_prompts_are_not_trained_on(tmp_path):
    rows = pair_rows(20) + pair_rows(20)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    config = OfflineConfig(
        output_dir="x",
        model=ModelSpec("any"),
        data=[DataSpec(str(path))],
        eval_fraction=0.25,
    )
    train, held_out = offline.load_train_and_eval_rows(config, offline.METHODS["dpo"])
    assert len(train) + len(held_out) == 40
    sides = [{json.dumps(row["prompt"]) for row in side} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert 6 <= len(held_out) <= 14


@pytest.mark.parametrize("shared", [0, 3])
def test_prompts_of_eval_data_that_are_trained_on_are_counted(tmp_path, caplog, shared):
    rows = [{"prompt": f"Question {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    held_out = [{**row, "prompt": row["prompt"].upper() + " "} for row in rows[8 - shared :]]
    config = OfflineConfig(
        output_dir="x",
        model=ModelSpec("any"),
        data=[DataSpec(str(write_rows(tmp_path / "train.jsonl", rows[:8])))],
        eval_data=[DataSpec(str(write_rows(tmp_path / "held-out.jsonl", held_out)))],
    )
    with caplog.at_level("WARNING"):
        train, evaluated = offline.load_train_and_eval_rows(config, offline.METHODS["dpo"])
    assert (len(train), len(evaluated)) == (8, 4 + shared)
    text = "3 of the 7 rows of eval_data have a prompt that is also in data"
    assert (text in caplog.text) == (shared == 3)
    assert ("rows of eval_data" in caplog.text) == (shared > 0)


def test_steps_of_a_run(tmp_path):
    def steps(rows, **trainer):
        config = OfflineConfig(
            output_dir="x",
            model=ModelSpec("any"),
            data=[DataSpec("x")],
            batch_size=8,
            trainer=trainer,
        )
        return num_steps(config, rows)

    assert steps(32) == 4
    assert steps(33) == 5
    assert steps(33, num_train_epochs=3) == 15
    assert steps(33, num_train_epochs=0.1) == 1
    assert steps(33, max_steps=7) == 7


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(echo_model):
    tokenizer = AutoTokenizer.from_pretrained(echo_model)
    rows = pair_rows(4)
    for side, word in (("chosen", " good"), ("rejected", " bad")):
        text = "river " * 40
        rows[1][side] = [{"role": "assistant", "content": text + word}]
        rows[2][side] = [{"role": "assistant", "content": word + text}]  # differs at the start
    encoder = ExampleEncoder(tokenizer, max_length=40)
    examples = encoder(rows, pairs=True)
    assert len(examples) == len(dpo_trainer_dataset(examples)) == 3
    # An example counts once, though both of its texts are cut.
    assert encoder.truncated_and_dropped_text() == "1 dropped: equal after max_length, 1 truncated"


def test_pairs_that_the_template_renders_alike_are_not_blamed_on_max_length(echo_model):
    rows = pair_rows(2)
    for side, thought in (("chosen", "R"), ("rejected", "Q")):
        rows[1][side] = [{"role": "assistant", "content": "a", "reasoning_content": thought}]
    encoder = ExampleEncoder(AutoTokenizer.from_pretrained(echo_model), max_length=40)
    assert len(encoder(rows, pairs=True)) == 1
    reason = "replies that are rendered with the same tokens"
    assert encoder.truncated_and_dropped_text() == f"1 dropped: {reason}"
    with pytest.raises(UserError, match=rf"all examples were dropped: .*{reason}"):
        encoder(rows[1:], pairs=True)
    long = pair_rows(1)[0]
    long["prompt"] = user("river " * 60)
    with pytest.raises(UserError, match=r"all examples were dropped: .*fills max_length") as error:
        encoder([rows[1], long], pairs=True)
    assert "raise max_length" not in str(error.value)  # which would not help the first row


@pytest.mark.parametrize("chat", [True, False])
def test_both_engines_learn_from_the_same_ids(tmp_path, echo_model, chat):
    """ChatML's newline after the closing token, too, is learned by neither."""
    folder = tmp_path / "model"
    shutil.copytree(echo_model, folder)
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    (folder / "chat_template.jinja").write_text(template if chat else "")
    if not chat:
        (folder / "chat_template.jinja").unlink()
    rows = pair_rows(8)  # one batch, in whatever order an engine takes it
    rows[0]["chosen"][0]["content"] += " river" * 60
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    logged = {}
    for engine in ("native", "trl"):
        tree = offline_tree(tmp_path / engine, folder, data, engine=engine, max_length=40)
        tree |= {"eval_data": tree["data"], "batch_size": 8, "micro_batch_size": 8}
        tree["trainer"] = {"max_steps": 1, "learning_rate": 1e-3}
        run_command("dpo", tree)
        logged[engine] = evaluations(tmp_path / engine)
    assert logged["native"] == pytest.approx(logged["trl"], abs=1e-5)
    assert len(set(logged["native"].values())) == 2  # the step did something


def interrupted_kto(tmp_path, place, monkeypatch):
    """Stop a run after its second evaluation; the first one was the best."""
    original = RunCallback.on_step_end

    def stop(self, args, state, control, **rest):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **rest)

    tree = tree_of("kto", tmp_path, place, name="run", trainer={"learning_rate": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", stop)
        with pytest.raises(Interrupted):
            run_command("kto", tree)
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-5/trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")
    return tree


def test_a_moved_run_of_trl_ends_with_the_best_model(tmp_path, echo_model, monkeypatch):
    tree = interrupted_kto(tmp_path, echo_model, monkeypatch)
    best = tensors_of(tmp_path / "run/checkpoints/checkpoint-2")
    (tmp_path / "run").rename(tmp_path / "moved")
    run_command("kto", tree | {"output_dir": str(tmp_path / "moved"), "resume": True})
    assert same(weights_of(tmp_path / "moved"), best)


def test_a_damaged_best_checkpoint_of_trl_is_refused(tmp_path, echo_model, monkeypatch):
    tree = interrupted_kto(tmp_path, echo_model, monkeypatch)
    weights = tmp_path / "run/checkpoints/checkpoint-2/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"checkpoint-2/model.safetensors is damaged"):
        run_command("kto", tree | {"resume": True})


@pytest.mark.parametrize(
    ("option", "multiple"),
    [(None, 1), ("auto", 1), ("Auto", 1), ("none", 1), ("null", 1), (8, 8), ("8", 8)],
)
def test_the_padding_multiple_is_read_as_trl_reads_it(option, multiple):
    assert padding_multiple(option) == multiple


@pytest.mark.parametrize("option", [0, -8, "0", "-8", "eight", "", 1.5])
def test_another_padding_multiple_is_refused(option):
    with pytest.raises(UserError, match="pad_to_multiple_of must be a positive integer or auto"):
        padding_multiple(option)


def test_the_collators_of_trl_hold_our_ids():
    labels = [-100, 5, -100, 6]
    pair = {
        "chosen_tokens": [3, 5, 7, 6],
        "chosen_labels": labels,
        "rejected_tokens": [3, 8],
        "rejected_labels": [-100, 8],
    }
    batch = PairCollator(0, 3)([pair])
    assert batch["input_ids"].tolist() == [[3, 5, 7, 6, 0, 0], [3, 8, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    # A tool's turn between two replies is context.
    assert batch["completion_mask"].tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    one = {"completion_tokens": [1, 2, 3], "completion_labels": [-100, -100, 3], "label": True}
    two = {"completion_tokens": [4, 5, 6], "completion_labels": [-100, 5, 6], "label": False}
    batch = KTOCollator(0, 4)([row | {"KL_completion_ids": []} for row in (one, two)])
    assert batch["label"].tolist() == [True, False]
    # Each prompt with the reply of the row before it.
    assert batch["KL_input_ids"].tolist() == [[1, 2, 5, 6], [4, 3, 0, 0]]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
