"""Warnings and the choice of the gold curve, on runs made for one fault each."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.evaluation.records import RunRecord
from rlhf.reports.curves import learning_charts_and_constants, metric_keys_without_panel
from rlhf.reports.sections import learning_curves_html, run_warnings
from rlhf.runs.alarms import false_alarm_text
from rlhf.runs.diagnostics import gold_metric_key, over_optimization_peak


def record(columns: dict[str, list[float]], **config: Any) -> RunRecord:
    """A finished run whose metrics are these columns, one step a row."""
    length = len(next(iter(columns.values())))
    rows = [
        {"step": i, **{key: values[i] for key, values in columns.items()}} for i in range(length)
    ]
    return RunRecord(Path("ppo"), "ppo", config=config, metrics=rows, finished=True)


def test_quiet_run_has_no_warning():
    shares = {"train/loss": [2.0, 1.0, 0.5], "rollout/length_limited": [0.0, 0.0, 0.05]}
    assert run_warnings(record(shares)) == []
    assert run_warnings(record({"rollout/evasion_gain": [2.5] * 9 + [-0.1]})) == []
    few = {"rollout/length_limited": [0.3] * 6, "rollout/turns": [4.0] * 6}  # 7.5% of replies
    assert run_warnings(record(few)) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"eval/loss": [1.0, 0.8, 0.85]}, "held-out loss rose from 0.8 at step 1 to 0.85"),
        (  # the initial model is the best, but it is never saved
            {"eval/loss": [1.0, 3.0, 2.0, 2.5]},
            "rose from 1 at step 0 to 2.5; final/ contains the model of step 2",
        ),
        ({"policy/kl": [1.0, 150.0, 2.0]}, "policy/kl reached 150 (first above 100 at step 1)"),
        ({"policy/ratio_max": [1.0, 1.0, 30.0]}, "policy/ratio_max reached 30"),
        ({"rollout/length_limited": [0.0] + [0.5] * 5}, "50% of replies hit the token limit"),
        (  # 3.6 of 4 replies per episode
            {"rollout/length_limited": [3.6] * 6, "rollout/turns": [4.0] * 6},
            "90% of replies hit the token limit",
        ),
        ({"rollout/invalid": [2.0] * 6}, "200% of actions were invalid"),
        ({"rollout/truncated": [0.4] * 6}, "40% of episodes were truncated by a limit"),
        (
            {"rollout/evasion_gain": [-1.0] * 3 + [2.5] * 10},
            "is 2.5 above that of the other episodes",
        ),
        ({"reward/unscored": [0.01] * 6}, "1% of episodes could not be scored"),
        ({"train/loss": [1.0, float("inf")]}, "train/loss is not finite, first at step 1"),
        ({"train/moved": [0.0, 0.0]}, "training did not change the model: at step 1 every trained"),
        (
            {"policy/kl": [0.0] * 5, "policy/ratio_max": [1.0] * 5},
            "the policy did not change: policy/kl is 0 in all 5 logged steps",
        ),
    ],
)
def test_each_fault_is_named(columns: dict[str, list[float]], words: str):
    (message,) = run_warnings(record(columns))
    assert message.startswith("PPO: ")
    assert words in message


def test_a_training_run_without_metrics_is_named():
    for keys, warned in (({"num_steps": 3}, 1), ({"trainer": {}}, 1), ({"episodes": 3}, 0)):
        run = RunRecord(Path("ppo"), "ppo", config=keys, finished=True)
        warnings = run_warnings(run)
        assert len(warnings) == warned
        assert all("metrics.jsonl is missing or empty" in warning for warning in warnings)


def test_reasons_of_unscored_episodes_are_named():
    rows = [{"step": i, "reward/mean": 0.5} for i in range(6)]
    rows[-1]["rewards/unscored/my_reward/valueerror"] = 0.5
    rows[-2]["rewards/unscored/my_reward/valueerror"] = 1.0
    run = RunRecord(Path("ppo"), "ppo", config={}, metrics=rows, finished=True)
    # (1.0 + 0.5) over the last five steps
    warning = (
        "PPO: 30% of episodes could not be scored by my_reward (valueerror) at the end of training."
    )
    assert run_warnings(run) == [f"{warning} ({false_alarm_text('unscored')})"]
    clean = [{"step": i, "reward/mean": 0.5} for i in range(1, 6)]
    long_ago = [{"step": 0, "rewards/unscored/a/b": 1.0}, *clean]
    assert run_warnings(RunRecord(Path("p"), "p", config={}, metrics=long_ago, finished=True)) == []


@pytest.mark.parametrize(
    "columns",
    [
        {"train/moved": [0.0, 1.0]},
        {"train/moved": [0.0, 0.02], "policy/kl": [0.0] * 2},
        {"policy/kl": [0.0, 0.0, 0.0, 0.0, 1e-6], "policy/ratio_max": [1.0] * 5},
        {"policy/kl": [0.0] * 5, "policy/ratio_max": [1.0, 1.0, 1.1, 1.0, 1.0]},
        {"policy/kl": [0.0] * 2},
    ],
)
def test_a_policy_that_moved_or_may_have_is_no_alarm(columns: dict[str, list[float]]):
    assert run_warnings(record(columns)) == []


def test_cut_replies_are_told_once_but_lost_stop_tokens_too():
    both = run_warnings(
        record({"rollout/length_limited": [0.4] * 5, "rollout/missing_eos": [0.4] * 5})
    )
    assert len(both) == 1
    more = run_warnings(
        record({"rollout/length_limited": [0.1] * 5, "rollout/missing_eos": [0.4] * 5})
    )
    (message,) = more
    assert message.startswith("PPO: 40% of replies have no stop token at the end of training. (")
    assert message.endswith(f"{false_alarm_text('missing_eos')})")


def test_best_loss_within_a_twentieth_is_no_overfitting():
    assert run_warnings(record({"eval/loss": [1.0, 0.8, 0.83]})) == []


RISING = [0.0, 1, 2, 3, 4, 5, 6, 7]
TURNING = [0.0, 2, 4, 5, 4, 3, 2, 1]


def test_over_optimization_needs_a_rising_proxy_and_a_falling_gold():
    peak = over_optimization_peak(record({"reward/mean": RISING, "eval/gold": TURNING}))
    assert peak is not None
    assert peak.step == 3
    assert over_optimization_peak(record({"reward/mean": RISING, "eval/gold": RISING})) is None
    # Both fall: the policy got worse at everything, which is no over-optimization.
    assert over_optimization_peak(record({"reward/mean": TURNING, "eval/gold": TURNING})) is None
    dip = [0.0, 2, 4, 5, 5, 5, 5, 4.8]
    assert over_optimization_peak(record({"reward/mean": RISING, "eval/gold": dip})) is None
    # The moving averages of this number differ in the last digit.
    constant = [0.09593011923427566] * len(RISING)
    assert over_optimization_peak(record({"reward/mean": RISING, "eval/gold": constant})) is None


def test_noisy_training_gold_needs_twenty_points():
    columns = {"reward/mean": RISING, "reward/env": TURNING}
    assert over_optimization_peak(record(columns)) is None
    longer = {key: [v for v in values for _ in range(3)] for key, values in columns.items()}
    assert over_optimization_peak(record(longer)) is not None


def test_gold_is_the_configured_reward_and_never_an_empty_return():
    zeros = [0.0] * 8
    columns = {"eval/return": zeros, "reward/env": zeros, "eval/lexicon": RISING}
    assert gold_metric_key(record(columns)) is None
    assert (
        gold_metric_key(record(columns, gold=[{"kind": "x", "name": "lexicon"}])) == "eval/lexicon"
    )
    assert gold_metric_key(record({"eval/return": RISING, "eval/gold": RISING})) == "eval/gold"


def test_constants_become_words_and_repeated_lines_vanish():
    run = record(
        {
            "kl/coef": [0.05] * 3,
            "rollout/length_limited": [0.1, 0.2, 0.3],
            "rollout/missing_eos": [0.1, 0.2, 0.3],
            "rollout/invalid": [0.0] * 3,
        }
    )
    charts, constant = learning_charts_and_constants(run)
    assert constant == ["KL coefficient 0.05"]
    assert [[line.name for line in chart.series] for chart in charts] == [["length limited"]]


def test_each_metric_without_a_panel_has_a_chart_of_its_own():
    rises = [1.0, 2.0, 3.0]
    columns = {"reward/mean": rises, "policy/kl": rises, "policy/entropy": rises}
    columns |= {"time/update": rises, "profile/padding": rises, "reward/env": rises}
    own = {"mine/<b>": rises, "policy/mine": rises, "train/moved": [1.0] * 3}
    run = record(columns | own)
    assert gold_metric_key(run) == "reward/env"
    assert metric_keys_without_panel(run) == list(own)
    page = learning_curves_html([run])
    assert "<b>Entropy per token</b>" in page.partition("<details>")[0]
    others = page.partition("<details>")[2]
    assert others.startswith("<summary>Other metrics: 3</summary>")
    assert "<b>mine/&lt;b&gt;</b>" in others
    assert "<b>policy/mine</b>" in others
    assert "Constant: train/moved 1." in others
    assert "<b>train/moved</b>" not in page


def test_number_of_other_metrics_is_limited():
    page = learning_curves_html([record({f"mine/{i}": [float(i), 0.5] for i in range(70)})])
    assert "<summary>Other metrics: the first 60 of 70</summary>" in page
    assert "<b>mine/59</b>" in page
    assert "<b>mine/60</b>" not in page


def test_series_is_in_order_of_step_and_skips_what_is_no_number():
    rows = [
        {"step": 3, "a": 3.0},
        {"step": 1, "a": 1},
        {"step": 2, "a": float("nan")},
        {"a": 5.0},
        {"step": 4, "a": True},
    ]
    assert RunRecord(Path("x"), "x", metrics=rows).series("a") == ([1.0, 3.0], [1.0, 3.0])
