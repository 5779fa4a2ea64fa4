"""Every alarm: its planted fault, a healthy run without it, its action, and its replay."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from rlhf.cli.main import main
from rlhf.cli.table import configure, run_command
from rlhf.config.load import merge_trees
from rlhf.errors import UserError
from rlhf.models.policy import Policy
from rlhf.models.trainable import parameter_names_without_gradient
from rlhf.runs import alarms as alarms_module
from rlhf.runs.alarms import ALARMS, NUM_HEALTHY_RUNS, Halt
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.training import loop, optimize
from rlhf.training.numeric_checks import (
    check_ratios_before_first_update,
    check_scores_and_rewards_are_finite,
)
from rlhf.training.online import OnlineTrainer
from rlhf.training.supervised import SupervisedTrainer
from tests.helpers.alarm_faults import FAULTS, Columns
from tests.helpers.training import (
    assert_same_run,
    metrics_of,
    offline_tree,
    online_tree,
    sft_rows,
    write_rows,
)

# Alarms before an update, and the one at the end of a run, have tests with real runs below.
WITH_RUNS = {"not_finite", "first_ratio", "frozen", "nothing_scored", "no_updates"}
# Columns just inside the limits.
HEALTHY: list[Columns] = [
    {"train/moved": [0.0, 1.0]},
    {"policy/kl": [0.0] + [-0.5, 0.6] * 5},
    {"policy/kl": [-1e-3, -2e-3] * 4 + [-1.0, -2e-3]},  # one outlier: four errors are not reached
    {"train/grad_norm": [1.0, 2.0] * 10 + [39.0]},
    {"train/grad_norm": [0.0] * 20 + [1.0]},
    {"rollout/repetition": [0.4] * 5 + [0.6] * 5, "reward/mean": [0.3] * 10},
    {"rollout/repetition": [0.1] * 5 + [0.6] * 5, "reward/mean": [0.3] * 5 + [0.4] * 5},
    {"value/explained_variance": [0.0] * 19 + [0.01]},
    {"value/explained_variance": [-0.5] * 20},
    {"train/updates": [0.0, 0.0, 1.0]},
    {"train/no_gradient": [1.0] * 4},
    {"rewards/std": [0.0] * 12, "reward/mean": [0.2] * 5 + [1.0] * 7},  # the task was learned
    {"rewards/std": [0.0] * 9 + [0.1] + [0.0] * 9, "reward/mean": [0.2] * 19},
    {"rollout/success": [0.9] * 5 + [1.0] * 5},
    {"rollout/success": [0.0] * 20, "reward/mean": [0.1] * 5 + [0.2] * 15},
    {"groups/equal": [1.0] * 10, "rewards/std": [0.3] * 10, "reward/mean": [0.3] * 5 + [0.4] * 5},
    {"groups/equal": [0.8] * 10, "rewards/std": [0.3] * 10, "reward/mean": [0.3] * 10},
    {"rewards/variance_share/a": [0.995] * 9, "rewards/variance_share/b": [0.005, 0.0, 0.0] * 3},
    {"rewards/variance_share/a": [0.98] * 9, "rewards/variance_share/b": [0.02] * 9},
    {"sampler/ess": [0.6] * 9},
    {"policy/clip_fraction_positive": [0.85] * 12},
    {"rollout/tokens": [10.0] * 5 + [19.0] * 5, "reward/mean": [0.3] * 10},
    {"rollout/tokens": [10.0] * 5 + [25.0] * 5, "reward/mean": [0.3] * 5 + [0.4] * 5},
]


def alarms(folder: Path, columns: Columns, **actions: str) -> list[int]:
    """Rows at which a monitor warns while these columns are logged."""
    monitor = TrainingMonitor(folder, {"alarms": actions})
    length = len(next(iter(columns.values())))
    found = [
        row
        for row in range(length)
        for _ in monitor.update(row, {key: values[row] for key, values in columns.items()})
    ]
    return found + [length for _ in monitor.finish(length)]


def test_every_alarm_has_a_planted_fault() -> None:
    assert FAULTS.keys() | WITH_RUNS == set(ALARMS)


@pytest.mark.parametrize("name", FAULTS)
def test_each_action_has_its_effect_within_the_window(name: str, tmp_path: Path) -> None:
    columns, row = FAULTS[name]
    (first,) = alarms(tmp_path, columns)
    assert 20 < first <= row if name == "over_optimized" else first == row
    assert ALARMS[name].action == "warn"  # type: ignore[index]
    assert alarms(tmp_path, columns, **{name: "state"}) == []
    with pytest.raises(Halt, match=f"^alarm {name} at step {first}: ") as halt:
        alarms(tmp_path, columns, **{name: "halt"})
    assert halt.value.name == name


@pytest.mark.parametrize("columns", HEALTHY)
def test_values_inside_the_limits_raise_no_alarm(columns: Columns, tmp_path: Path) -> None:
    assert alarms(tmp_path, columns) == []


def unscorable(conversations: Any) -> list[float]:
    """A reward that scores nothing."""
    return [math.nan] * len(conversations)


def reward(name: str) -> dict[str, Any]:
    return {"rewards": [{"kind": "function", "path": f"tests.training.test_alarms:{name}"}]}


def noisy_scores(patch: pytest.MonkeyPatch) -> None:
    """Each pass of the policy differs, as with active dropout."""
    score = Policy.score

    def noisy(self: Policy, *args: Any, **kwargs: Any) -> Any:
        scored = score(self, *args, **kwargs)
        with torch.no_grad():
            scored.logprobs.add_(0.1 * torch.randn_like(scored.logprobs))
        return scored

    patch.setattr(Policy, "score", noisy)


def frozen_embedding(patch: pytest.MonkeyPatch) -> None:
    """A layer is frozen after the optimizer was made."""
    init = OnlineTrainer.__init__

    def frozen(self: OnlineTrainer, *args: Any) -> None:
        init(self, *args)
        self.policy.model.get_input_embeddings().weight.requires_grad_(False)

    patch.setattr(OnlineTrainer, "__init__", frozen)


def nan_logprobs(patch: pytest.MonkeyPatch) -> None:
    """The pass with gradients returns nan."""
    score = Policy.score

    def broken(self: Policy, *args: Any, **kwargs: Any) -> Any:
        scored = score(self, *args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                scored.logprobs.mul_(math.nan)
        return scored

    patch.setattr(Policy, "score", broken)


def nan_advantages(patch: pytest.MonkeyPatch) -> None:
    """The advantages of the first episode are nan."""
    update = optimize.check_batch_is_finite

    def broken(batch: Any, **kwargs: Any) -> None:
        batch.advantages[0] = math.nan
        update(batch, **kwargs)

    patch.setattr(optimize, "check_batch_is_finite", broken)


LENIENT = {"shaping": {"max_unscored": 1.0}}
# name of the case -> (alarm, keys of the configuration, change of the code)
BEFORE_UPDATE: dict[str, tuple[str, dict[str, Any], Any]] = {
    "nan log-probabilities": ("not_finite", {}, nan_logprobs),
    "nan advantages": ("not_finite", {}, nan_advantages),
    "unscored": ("nothing_scored", reward("unscorable") | LENIENT, None),
    "ratio": ("first_ratio", {}, noisy_scores),
    "frozen": ("frozen", {}, frozen_embedding),
}


@pytest.mark.parametrize("case", BEFORE_UPDATE)
def test_faults_are_caught_before_the_update_and_replayed(
    case: str, tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    name, keys, change = BEFORE_UPDATE[case]
    steps: list[float] = []
    apply = OnlineTrainer.clip_and_apply_gradients

    def recorded(trainer: OnlineTrainer) -> float:
        steps.append(apply(trainer))
        return steps[-1]

    monkeypatch.setattr(OnlineTrainer, "clip_and_apply_gradients", recorded)
    if change:
        change(monkeypatch)
    tree = merge_trees(online_tree(tmp_path / "run", echo_model), keys)
    with pytest.raises(Halt, match=f"rlhf replay {tmp_path / 'run'}") as halt:
        run_command("ppo", tree)
    assert halt.value.name == name
    assert steps == []
    assert main(["replay", str(tmp_path / "run")]) == 0
    assert f"reproduced: {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("total", "count", "dtype", "halts"),
    [
        (128 * 0.0193, 128, torch.bfloat16, False),  # measured in a healthy run of SmolLM2-135M
        (4096 * 0.005, 4096, torch.bfloat16, False),
        (2.4, 8, torch.bfloat16, False),  # one token of a short mini-batch
        (4096 * 0.1, 4096, torch.bfloat16, True),  # dropout
        (128 * 0.1, 128, torch.bfloat16, True),
        (4096 * 0.1, 4096, torch.float16, True),
        (128 * 2e-6, 128, torch.float32, True),
        (128 * 5e-7, 128, torch.float32, False),
        (math.nan, 128, torch.bfloat16, True),
    ],
)
def test_rounding_in_half_precision_does_not_end_a_run_but_dropout_does(
    total: float, count: int, dtype: torch.dtype, halts: bool
) -> None:
    context = pytest.raises(Halt, match="first_ratio") if halts else contextlib.nullcontext()
    with context:
        check_ratios_before_first_update(torch.tensor([total, count]), dtype)


@pytest.mark.parametrize(
    ("scores", "rewards", "name"),
    [
        ([0.5, 0.5], [[0.5], [math.inf]], "not_finite"),
        ([0.5, -math.inf], [[0.5], [-math.inf]], "not_finite"),
        ([0.5, 0.5], [[0.5], [math.nan]], "not_finite"),  # a penalty is nan
        ([math.nan] * 2, [[math.nan]] * 2, "nothing_scored"),
    ],
)
def test_wrong_rewards_halt(scores: list[float], rewards: list[list[float]], name: str) -> None:
    with pytest.raises(Halt) as halt:
        check_scores_and_rewards_are_finite(scores, rewards, {})
    assert halt.value.name == name


def test_an_episode_without_a_score_is_allowed() -> None:
    check_scores_and_rewards_are_finite([math.nan, 0.5], [[math.nan], [0.2, 0.3]], {})


def test_the_documentation_has_the_table_of_alarms() -> None:
    rows = []
    for name, alarm in ALARMS.items():
        low, high = alarm.false_alarm_interval
        found = f"{alarm.false_alarms} of {NUM_HEALTHY_RUNS}"
        cells = (f"`{name}`", alarm.condition, alarm.window, alarm.action, found)
        rows.append(f"| {' | '.join(cells)} | {low:.1%} to {high:.1%} |")
    page = Path(__file__).parents[2] / "docs" / "training.md"
    assert "\n".join(rows) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_the_interval_of_the_rate_of_false_alarms_is_exact(count: int) -> None:
    low, high = replace(ALARMS["evasion"], false_alarms=count).false_alarm_interval
    exact = binomtest(count, 100).proportion_ci()
    assert (low, high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("name", ["evidence.pt", "alarm.json"])
def test_a_full_disk_does_not_hide_an_alarm(
    name: str, tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        *((torch, "save") if name == "evidence.pt" else (alarms_module, "write_text")), full
    )
    tree = merge_trees(online_tree(tmp_path / "run", echo_model), reward("unscorable") | LENIENT)
    with pytest.raises(Halt, match=r"^alarm nothing_scored: no episode has a score$"):
        run_command("ppo", tree)
    assert "the data of the alarm are not saved: the disk is full" in caplog.text
    assert not (tmp_path / "run" / "halted").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("alarm.json", b'{"alarm": "noth', "line 1: broken JSON"),
        ("alarm.json", b"[]", "alarm.json is damaged"),
        ("alarm.json", b'{"alarm": "none", "config": {}}', "alarm.json is damaged"),
        ("alarm.json", b'{"alarm": "nothing_scored"}', "alarm.json is damaged"),
        ("evidence.pt", b"xx", "evidence.pt cannot be read"),
        ("evidence.pt", b"", "evidence.pt cannot be read"),
    ],
)
def test_a_replay_of_damaged_data_is_refused(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: Any
) -> None:
    bundle = tmp_path / "halted"
    bundle.mkdir()
    (bundle / "evidence.pt").touch()
    (bundle / "alarm.json").write_text('{"alarm": "nothing_scored", "config": {"command": "ppo"}}')
    (bundle / name).write_bytes(content)
    assert main(["replay", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_replay_without_the_fault_passes(tmp_path: Path, echo_model: Path, capsys: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        nan_logprobs(patch)
        with pytest.raises(Halt):
            run_command("ppo", online_tree(tmp_path / "run", echo_model))
    assert main(["replay", str(tmp_path / "run")]) == 1
    assert "not reproduced: not_finite" in capsys.readouterr().out
    run_command("ppo", online_tree(tmp_path / "run", echo_model, overwrite=True))
    assert not (tmp_path / "run" / "halted").exists()
    assert main(["replay", str(tmp_path / "run")]) == 2


def test_a_supervised_run_halts_and_is_replayed(
    tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checked = SupervisedTrainer.compute_checked_gradients

    def broken(trainer: SupervisedTrainer, batch: Any) -> Any:
        total = checked(trainer, batch)
        if trainer.progress.step == 3:
            next(iter(trainer.model.parameters())).grad.fill_(math.inf)
        return total

    monkeypatch.setattr(SupervisedTrainer, "compute_checked_gradients", broken)
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    with pytest.raises(Halt, match="diverged in step 4: the gradient is not finite"):
        run_command("sft", offline_tree(tmp_path / "run", echo_model, data))
    assert main(["replay", str(tmp_path / "run")]) == 0
    assert "diverged in step 4" in capsys.readouterr().out


def test_an_alarm_of_logged_metrics_is_replayed(
    tmp_path: Path, echo_model: Path, capsys: Any
) -> None:
    tree = online_tree(tmp_path / "run", echo_model, num_steps=8)
    tree["rollout"] = {"max_new_tokens": 1}
    halting = tree | {"alarms": {"length_limited": "halt"}}
    with pytest.raises(Halt, match="alarm length_limited at step 5"):
        run_command("ppo", halting)
    assert main(["replay", str(tmp_path / "run")]) == 0
    assert "reproduced: length_limited" in capsys.readouterr().out
    run_command("ppo", tree | {"resume": True})  # with the default action it continues
    assert metrics_of(tmp_path / "run")[-1]["step"] == 8


def test_a_run_that_trains_nothing_warns_and_can_be_made_to_fail(
    tmp_path: Path, echo_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All groups of DAPO have equal scores, so that no step takes an update."""
    keys = {"env": {"id": "text/Echo-v0", "reward": 0}, **reward("constant")}
    tree = online_tree(tmp_path / "run", echo_model, algorithm={"group_size": 4}, **keys)
    with caplog.at_level(logging.INFO):
        run_command("dapo", tree)
    assert "nothing was trained" in caplog.text
    with pytest.raises(Halt, match="train/updates is 0 in all 4 logged steps"):
        run_command("dapo", tree | {"alarms": {"no_updates": "halt"}, "overwrite": True})
    assert not (tmp_path / "run" / "final").exists()


def test_a_detached_weight_is_a_warning(
    tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    accumulate = optimize.accumulate_gradients

    def detached(trainer: OnlineTrainer, *args: Any, **kwargs: Any) -> Any:
        sums = accumulate(trainer, *args, **kwargs)
        trainer.policy.model.model.norm.weight.grad = None
        return sums

    monkeypatch.setattr(optimize, "accumulate_gradients", detached)
    with caplog.at_level(logging.INFO):
        run_command("ppo", online_tree(tmp_path / "run", echo_model, num_steps=6))
    assert [row["train/no_gradient"] for row in metrics_of(tmp_path / "run")] == [1.0] * 6
    assert caplog.text.count("no gradient in step 1: model.norm.weight") == 1
    assert caplog.text.count("warning, step 5: 1 of the parameter tensors have no gradient") == 1


def test_a_step_counts_gradients_once_and_checks_weights_once(
    tmp_path: Path, echo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    checked: list[int] = []

    def count(trainer: OnlineTrainer) -> None:
        counted.append(trainer.progress.step)

    monkeypatch.setattr(OnlineTrainer, "record_weights_without_gradient", count)
    monkeypatch.setattr(loop, "_check_weights_finite", lambda t: checked.append(t.progress.step))
    keys = {"algorithm": {"num_epochs": 2, "num_minibatches": 2}, "save_every": 3}
    evaluation = {"episodes": 4, "every": 2}
    tree = online_tree(tmp_path / "run", echo_model, num_steps=4, evaluation=evaluation, **keys)
    run_command("ppo", tree)
    assert counted == [0, 1, 2, 3]
    assert checked == [2, 3, 4]


def test_the_warm_up_of_a_critic_is_not_counted(tmp_path: Path, echo_model: Path) -> None:
    tree = online_tree(tmp_path / "run", echo_model, critic_warmup_steps=2)
    run_command("ppo", tree)
    assert not any("train/no_gradient" in row for row in metrics_of(tmp_path / "run"))


def test_an_expert_without_tokens_is_not_counted() -> None:
    gate = torch.nn.Linear(2, 2, bias=False)
    experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model = torch.nn.ModuleDict({"gate": gate, "experts": experts})
    assert parameter_names_without_gradient(model) == ["gate.weight"]
    gate.weight.requires_grad_(False)
    assert parameter_names_without_gradient(model) == []


def test_weights_that_the_last_update_makes_infinite_are_not_saved(
    tmp_path: Path, echo_model: Path
) -> None:
    run_command("ppo", online_tree(tmp_path / "whole", echo_model))
    step = OnlineTrainer.step

    def overflowing(trainer: OnlineTrainer, number: int, run: Any) -> Any:
        metrics = step(trainer, number, run)
        if number == 3:
            with torch.no_grad():
                trainer.policy.model.model.norm.weight[0] = math.inf
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineTrainer, "step", overflowing)
        with pytest.raises(
            Halt, match=r"after step 4, 1 of \d+ parameter tensors are .*norm\.weight"
        ):
            run_command("ppo", online_tree(tmp_path / "run", echo_model))
    assert not (tmp_path / "run/final").exists()
    run_command("ppo", online_tree(tmp_path / "run", echo_model, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_supervised_run_does_not_save_infinite_weights(
    engine: str, tmp_path: Path, echo_model: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    options = {"max_steps": 1, "learning_rate": 1e39}
    tree = offline_tree(tmp_path / "run", echo_model, data, engine=engine, trainer=options)
    with pytest.raises(Halt, match=r"after step 1, \d+ of \d+ parameter tensors are not"):
        run_command("sft", tree)
    assert not (tmp_path / "run/final").exists()
    assert not list((tmp_path / "run/checkpoints").glob("*"))


def constant(conversations: Any) -> list[float]:
    """Equal scores."""
    return [1.0] * len(conversations)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ({"entropy": "halt"}, "entropy"),
        ({"entropy_collapse": "stop"}, "entropy_collapse"),
        ({"not_finite": "warn"}, "must be halt, got"),
    ],
)
def test_wrong_actions_are_refused(actions: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        configure("ppo", online_tree(tmp_path / "run", tmp_path, alarms=actions))
