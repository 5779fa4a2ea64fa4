"""The native engine: what TRL computes, in less time; interrupted, resumed, told as others are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.cli.table import configure, run_command
from rlhf.config.optimization import native_options
from rlhf.errors import UserError
from rlhf.runs.directory import Run, seed_everything
from rlhf.training import offline
from rlhf.training.supervised import BatchSchedule, SupervisedTrainer
from tests.helpers.trainers import divergent, tree_of, trl_trainer
from tests.helpers.training import (
    evaluations,
    metrics_of,
    pair_rows,
    same,
    sft_rows,
    tensors_of,
    unknown_entries,
    weights_of,
)

COMMANDS = ("sft", "dpo", "reward")
# A longer and a shorter prompt, replies of several lengths: padding that must not count.
UNEQUAL = [
    {**row, "chosen": [{"role": "assistant", "content": "apple " * (1 + i % 5)}]}
    for i, row in enumerate(pair_rows())
]


def native_trainer(command, tree):
    """The trainer of a native run before its first step."""
    config = configure(command, tree | {"engine": "native"})
    seed_everything(config.seed)
    method = offline.method_of(command, config)
    train_rows, eval_rows = offline.load_train_and_eval_rows(config, method)
    engine = offline.engine_of(config, native_supported=method.native)
    setup = method.setup(config, train_rows, engine)
    sets = (setup.encode(train_rows, True), setup.encode(eval_rows, False))
    options = native_options(command, config.trainer, default_learning_rate=method.learning_rate)
    trainer = offline.NATIVE_TRAINERS[command](config, options, setup, *sets)
    run = Run.open({**tree, "command": command, "output_dir": tree["output_dir"] + "-native"})
    trainer.prepare_before_resuming(run)
    return trainer


def losses(folder):
    return [row["train/loss"] for row in metrics_of(folder) if "train/loss" in row]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("sft", {}),
        ("reward", {}),
        ("reward", {"center_rewards_coefficient": 0.1}),
        ("dpo", {}),
        ("dpo", {"beta": 0.5}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.3]}),
    ],
)
def test_loss_and_gradient_of_a_batch_are_trl_s(tmp_path, echo_model, command, options):
    rows = UNEQUAL if command != "sft" else None
    tree = tree_of(
        command, tmp_path, echo_model, rows=rows, batch_size=8, micro_batch_size=8, trainer=options
    )
    native = native_trainer(command, tree)
    trainer = trl_trainer(command, tree)
    if command == "reward":  # two fresh heads: give both the same
        head = torch.randn(native.model.model.score.weight.shape)
        for model in (native.model.model, trainer.model):
            model.score.weight.data.copy_(head)
    inputs = next(iter(trainer.get_train_dataloader()))
    count = (inputs["labels"][:, 1:] != -100).sum() if command == "sft" else None
    theirs = trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=count)
    theirs.backward()

    batch = same_batch(native, command, inputs)
    total = 0.0
    for rows, _ in native.micro_batch_rows_and_weights(batch):
        micro_batch = batch.select(rows)
        loss, _ = native.loss(micro_batch, denominators=native.loss_denominators(batch))
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(theirs.item(), rel=1e-5)
    ours = dict(native.model.model.named_parameters())
    compared = 0
    for name, weight in trainer.model.named_parameters():
        if weight.grad is not None and name in ours:
            torch.testing.assert_close(ours[name].grad, weight.grad, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared > 10


def same_batch(native, command, inputs):
    """The examples that TRL's collator put into a batch, found again by their ids."""
    if command == "reward" or command == "dpo":
        wanted = inputs["input_ids"][: len(inputs["input_ids"]) // 2]
    else:
        wanted = inputs["input_ids"]
    places = {tuple(example.ids[0]): i for i, example in enumerate(native.examples["train"])}
    masks = inputs["attention_mask"][: len(wanted)]
    keys = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(wanted, masks, strict=True)]
    return native.make_batch("train", [places[key] for key in keys])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stage_trains_evaluates_and_leaves_a_model(tmp_path, echo_model, command):
    final = run_command(command, tree_of(command, tmp_path, echo_model, engine="auto"))
    folder = tmp_path / "run"
    found = evaluations(folder)
    assert sorted(found) == [0, 2, 4, 6, 8]
    told = losses(folder)
    assert len(told) == 8
    assert min(told) < told[0]
    kind = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
    _, info = kind.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert "packed" not in (final / "config.json").read_text()
    assert (folder / "report.html").exists()


def test_a_run_without_a_finite_held_out_loss_ends_with_the_last_model(
    tmp_path, echo_model, monkeypatch, caplog
):
    monkeypatch.setattr(SupervisedTrainer, "model_selection_loss", lambda *_: float("nan"))
    final = run_command("sft", tree_of("sft", tmp_path, echo_model, engine="native", keep_last=1))
    assert same(tensors_of(final), tensors_of(tmp_path / "run/checkpoints/step-8"))
    assert "no evaluation had a finite loss" in caplog.text


@pytest.mark.parametrize("command", COMMANDS)
def test_rows_of_weight_zero_are_in_no_batch_and_no_denominator(tmp_path, echo_model, command):
    rows = (sft_rows if command == "sft" else pair_rows)(12)
    weighted = [row | {"weight": int(i % 3 > 0)} for i, row in enumerate(rows)]
    tree = tree_of(command, tmp_path, echo_model, rows=weighted, eval_fraction=0.25)
    trainer = native_trainer(command, tree)
    ids = [tuple(example.ids[0]) for split in trainer.examples.values() for example in split]
    assert len(ids) == 8  # 12 rows without every third
    assert len(trainer.examples["train"]) == 6
    if command == "dpo":
        assert trainer.make_batch("train", [0, 1, 2]).tokens.shape[0] == 6


def test_dpo_starts_at_ln_2_to_the_bit_and_holds_no_second_model(tmp_path, echo_model):
    run_command("dpo", tree_of("dpo", tmp_path, echo_model, engine="native", batch_size=4))
    folder = tmp_path / "run"
    assert evaluations(folder)[0] == torch.tensor(2.0).log().item()
    assert losses(folder)[0] == torch.tensor(2.0).log().item()
    assert min(losses(folder)) < 0.68


def test_adapters_train_too(tmp_path, echo_model):
    keys = {"model": {"path": str(echo_model), "lora": {"rank": 4, "dropout": 0.1}}}
    for command in COMMANDS:
        tree = tree_of(command, tmp_path, echo_model, engine="native", name=command, **keys)
        final = run_command(command, tree)
        found = evaluations(tmp_path / command)
        assert abs(found[8] - found[0]) > 5e-4
        assert (final / "adapter_config.json").exists() == (
            command != "reward"
        )  # that one is merged


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_bf16_weights_learn_what_bf16_cannot_hold(tmp_path, echo_model, command):
    keys = {"model": {"path": str(echo_model), "dtype": "bfloat16"}}
    trainer = native_trainer(
        command, tree_of(command, tmp_path, echo_model, trainer={"learning_rate": 1e-6}, **keys)
    )
    weights = trainer.model.parameters()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    before = [weight.detach().float() for weight in weights]
    for step in range(4):
        trainer.update_on_batch(trainer.make_batch("train", trainer.schedule.example_indices(step)))
        trainer.progress.step += 1
    (masters,) = trainer.optimizer.master_weights
    moved = [(m - b).abs().max().item() for m, b in zip(masters, before, strict=True)]
    assert min(moved) > 1e-7
    assert max(moved) < 1e-5


@pytest.mark.parametrize("command", COMMANDS)
def test_micro_batches_do_not_change_the_update(tmp_path, echo_model, command):
    runs = []
    for size in (1, 8):
        trainer = native_trainer(
            command,
            tree_of(command, tmp_path, echo_model, micro_batch_size=size, name=f"{command}{size}"),
        )
        batch = trainer.make_batch("train", trainer.schedule.example_indices(0))
        assert (len(list(trainer.micro_batch_rows_and_weights(batch))) > 1) == (size == 1)
        trainer.update_on_batch(batch)
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    for ours, other in zip(*runs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=3e-4)


def test_the_best_evaluation_is_the_one_that_is_kept(tmp_path, echo_model):
    tree = divergent(tmp_path, echo_model, engine="native")
    run_command("sft", tree)
    folder = tmp_path / "run"
    found = evaluations(folder)
    best = min((step for step in found if step), key=found.__getitem__)
    assert best < 24
    again = {
        **tree,
        "output_dir": str(tmp_path / "again"),
        "model": {"path": str(folder / "final")},
    }
    run_command("sft", again)
    assert evaluations(tmp_path / "again")[0] == pytest.approx(found[best], abs=1e-6)


def test_early_stopping_stops(tmp_path, echo_model):
    run_command("sft", divergent(tmp_path, echo_model, engine="native", patience=2))
    found = evaluations(tmp_path / "run")
    steps = sorted(found)
    assert steps[-1] < 24
    best = min(steps[1:], key=found.__getitem__)
    assert steps[-1] == best + 2 * 2


def test_a_damaged_best_model_is_found_when_the_run_is_resumed(tmp_path, echo_model, monkeypatch):
    tree = divergent(tmp_path, echo_model, engine="native", patience=None)
    run_command("sft", tree)
    folder = tmp_path / "run"
    (folder / "finished").unlink()
    (folder / "checkpoints/best/model.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(SupervisedTrainer, "step", None)  # no step is taken
    with pytest.raises(UserError, match=r"best/model\.safetensors is damaged.*--overwrite"):
        run_command("sft", tree | {"resume": True})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_cut_anywhere_ends_like_the_whole_run(tmp_path, echo_model, command, monkeypatch):
    """Two epochs, cut in the first and in the second."""
    trainer = {"learning_rate": 1e-2, "max_steps": 8}
    whole = tree_of(command, tmp_path, echo_model, engine="native", name="whole", trainer=trainer)
    run_command(command, whole)
    cut = tree_of(command, tmp_path, echo_model, engine="native", name="cut", trainer=trainer)
    original = SupervisedTrainer.step
    for last in (3, 6):

        def failing(trainer, step, run, last=last):
            if step == last:
                raise UserError("cut")
            return original(trainer, step, run)

        monkeypatch.setattr(SupervisedTrainer, "step", failing)
        with pytest.raises(UserError, match="cut"):
            run_command(command, cut | {"resume": True})
    monkeypatch.setattr(SupervisedTrainer, "step", original)
    run_command(command, cut | {"resume": True})
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


def test_a_damaged_reference_is_scored_again(tmp_path, echo_model, monkeypatch, caplog):
    whole = tree_of("dpo", tmp_path, echo_model, engine="native", name="whole")
    run_command("dpo", whole)
    cut = tree_of("dpo", tmp_path, echo_model, engine="native", name="cut")

    def failing(trainer, step, run):
        raise UserError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "step", failing)
        with pytest.raises(UserError, match="cut"):
            run_command("dpo", cut)
    path = tmp_path / "cut/checkpoints/reference/logprobs.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run_command("dpo", cut | {"resume": True})
    assert "logprobs.pt is damaged" in caplog.text
    assert not unknown_entries(tmp_path)
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


def test_each_epoch_sees_every_example_once_in_a_new_order():
    schedule = BatchSchedule(num_rows=10, batch_size=4, num_steps=6, seed=0)
    epochs = [
        [row for step in steps for row in schedule.example_indices(step)]
        for steps in ((0, 1, 2), (3, 4, 5))
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert schedule.example_indices(4) == BatchSchedule(10, 4, 99, 0).example_indices(4)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, echo_model):
    tree = tree_of("sft", tmp_path, echo_model, engine="native", trainer={"learning_rate": 1e30})
    with pytest.raises(UserError, match=r"diverged in step \d+.*learning_rate and start a new run"):
        run_command("sft", tree)


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_the_advice_after_a_divergence_can_be_followed(tmp_path, echo_model, engine):
    """The native engine continues with a lower rate; TRL keeps the rate of the checkpoint."""
    trainer = {"learning_rate": 1e30, "max_steps": 4}
    tree = tree_of("sft", tmp_path, echo_model, engine=engine, trainer=trainer, evaluations=1)
    with pytest.raises(UserError, match="diverged") as caught:
        run_command("sft", tree)
    permission = "continue with --resume, a lower rate and allow_changes"
    assert (f"{permission}: [trainer.learning_rate]" in str(caught.value)) == (engine == "native")
    if engine == "native":
        lower = {"trainer": tree["trainer"] | {"learning_rate": 1e-3}, "resume": True}
        run_command("sft", tree | lower | {"allow_changes": ["trainer.learning_rate"]})
        assert (Path(tree["output_dir"]) / "finished").exists()


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        (
            "sft",
            {"trainer": {"packing": True}},
            r"trainer.packing is not an option of the native engine.*engine: trl",
        ),
        ("sft", {"trainer": {"optim": "adafactor"}}, r"trainer.optim: .*sgd, got adafactor"),
        ("sft", {"trainer": {"optim": "sgd", "adam_beta1": 0.8}}, r"adam_beta1 has no effect"),
        ("sft", {"trainer": {"learning_rate": -1.0}}, r"trainer.learning_rate must be >= 0"),
        ("sft", {"trainer": {"num_train_epochs": 0}}, r"trainer.num_train_epochs must be > 0"),
        ("sft", {"trainer": {"adam_beta1": 1.0}}, "trainer.adam_beta1 must be < 1"),
        ("sft", {"trainer": {"lr_scheduler_type": "foo"}}, r"trainer.lr_scheduler_type 'foo': foo"),
        (
            "sft",
            {"trainer": {"lr_scheduler_type": "reduce_lr_on_plateau"}},
            "needs a metric at every step",
        ),
        (
            "dpo",
            {"trainer": {"lr_scheduler_type": "constant", "warmup_steps": 2}},
            "warmup_steps has no effect.*constant_with_warmup",
        ),
        ("dpo", {"trainer": {"beta": -1.0}}, r"trainer.beta must be > 0"),
        ("dpo", {"trainer": {"loss_type": ["ipo"]}}, r"loss_type.*engine: trl"),
        ("dpo", {"trainer": {"loss_type": []}}, r"loss_type.*engine: trl"),
        ("dpo", {"trainer": {"loss_type": ["sft"]}}, r"loss_type.*engine: trl"),
        ("dpo", {"trainer": {"loss_type": ["sigmoid", "sigmoid"]}}, r"loss_type.*engine: trl"),
        ("dpo", {"trainer": {"loss_weights": [1, 2]}}, r"loss_weights must have one weight"),
        ("kto", {}, r"engine: native supports only sft, dpo"),
        ("reward", {"kind": "ranking"}, r"engine: native supports only sft, dpo"),
    ],
)
def test_what_it_does_not_have_is_refused(tmp_path, echo_model, command, keys, message):
    with pytest.raises(UserError, match=message):
        run_command(command, tree_of(command, tmp_path, echo_model, engine="native", **keys))
