"""The independent unit of an evaluation, from the environment to the page."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest

from rlhf.cli.table import run_command
from rlhf.evaluation.episodes import summarize_episodes
from rlhf.evaluation.metrics import binary_values, independent_unit_of, start_entry_id, unit_name
from rlhf.evaluation.records import Evaluation
from rlhf.reports import write_report
from rlhf.reward_models import as_reward, build
from rlhf.reward_models.core import Reward, Scores, binary_outcomes_by_name
from tests.helpers.training import read_rows

TEXTS = ("red", "green", "red", "blue")
"""Four rows, three different prompts."""


def evaluate(folder: Path, model: Path, **keys) -> Path:
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Repeat: {text}"}) + "\n" for text in TEXTS)
    )
    tree = {
        "output_dir": str(folder / "run"),
        "policies": [{"name": "mine", "model": {"path": str(model)}}],
        "env": {"prompts": [{"path": str(folder / "prompts.jsonl")}]},
        "rewards": [{"kind": "length", "high": 1}],
        "rollout": {"max_new_tokens": 3},
        "episodes": 12,
        "decoding": "greedy",
    } | keys
    return run_command("evaluate", tree)


def read(run: Path) -> tuple[dict, list[dict]]:
    folder = run / "evaluation" / "mine"
    rows = [
        json.loads(line) for line in (folder / "episodes.jsonl").read_text().split("\n") if line
    ]
    return json.loads((folder / "summary.json").read_text()), rows


def test_repeated_prompts_are_one_unit_everywhere(tmp_path, echo_model, caplog):
    with caplog.at_level(logging.WARNING):
        run = evaluate(tmp_path, echo_model)
    summary, rows = read(run)
    assert sorted({row["prompt_index"] for row in rows}) == [0, 1, 2, 3]
    by_text = {row["messages"][-2]["content"]: row["prompt_id"] for row in rows}
    assert len(set(by_text.values())) == len(by_text) == 3
    assert (summary["unit"], summary["units"], summary["episodes"]) == ("prompts", 3, 12)
    assert {metric["n"] for metric in summary["metrics"].values()} == {3}
    (note,) = summary["notes"]
    assert note.startswith("12 greedy episodes repeat 3 prompts: n = 3")
    assert note in caplog.text
    page = write_report(run).read_text()
    assert note in page
    with (run / "report_tables" / "evaluations.csv").open() as file:
        (cells,) = csv.DictReader(file)
    assert cells["over"] == "3 prompts"
    for name, metric in summary["metrics"].items():
        for key in ("low", "high", "n"):
            cell = cells[f"{name} {key}"]
            assert (float(cell) if cell else None) == metric[key]


@pytest.mark.parametrize(("answers", "words"), [(0, "0 of 12 scored"), (2, "6 of 12 scored")])
def test_what_could_not_be_scored_is_said(tmp_path, echo_model, caplog, answers, words):
    keys = {}
    if answers:
        known = [{"prompt": f"Repeat: {text}", "answer": text} for text in TEXTS[1::2]]
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in known))
        keys = {"answers": str(path)}
    with caplog.at_level(logging.WARNING):
        run = evaluate(tmp_path, echo_model, rewards=[{"kind": "exact_match", **keys}])
    summary, _ = read(run)
    entry = summary["unscored"]["exact_match"]
    assert (entry["scored"], entry["episodes"]) == (6 if answers else 0, 12)
    assert list(entry["reasons"].values()) == [12 - entry["scored"]]
    assert ("exact_match" in summary["metrics"]) == bool(answers)
    (reason,) = entry["reasons"]
    note = f"exact_match: {words}: {reason}"
    assert note in summary["notes"]
    assert note in caplog.text
    assert note in write_report(run).read_text()


def test_prompts_of_several_turns_are_told_apart_by_their_last(tmp_path, echo_model):
    """And the examples of a policy are no part of its prompts."""
    earlier = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    path = tmp_path / "turns.jsonl"
    with path.open("w") as file:
        for text in ("red", "blue", "red"):
            row = {"prompt": [*earlier, {"role": "user", "content": text}]}
            file.write(json.dumps(row) + "\n")
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"prompt": "blue", "completion": "red"}) + "\n")
    mine = {"name": "mine", "model": {"path": str(echo_model)}}
    policies = [mine, mine | {"name": "shown", "examples": [{"path": str(shots)}]}]
    env = {"prompts": [{"path": str(path)}]}
    run = evaluate(tmp_path, echo_model, policies=policies, env=env, episodes=6)
    ids = [
        [row["prompt_id"] for row in read_rows(run / "evaluation" / name / "episodes.jsonl")]
        for name in ("mine", "shown")
    ]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2
    old = [row | {"prompt_id": None, "env": "prompts"} for row in read(run)[1]]
    assert [independent_unit_of(row) for row in old] == ids[0]


def test_an_environment_names_the_entry_of_its_list():
    question = [{"role": "user", "content": "2 + 2?"}]
    assert start_entry_id(question, {"item": 3}) == start_entry_id(question, {"item": 8})
    assert start_entry_id(question, {"game": 3}) != start_entry_id(question, {"game": 8})
    assert start_entry_id(question, {"valid": True}) is None
    other = [{"role": "user", "content": "2 + 3?"}]
    assert start_entry_id(question, {"item": 3}) != start_entry_id(other, {"item": 3})


def test_a_start_state_that_is_drawn_anew_is_known_by_its_seed():
    assert independent_unit_of({"env": "text/Echo-v0", "seed": 7, "messages": []}) == 7
    assert unit_name([1, 2, 3]) == "episodes"
    assert unit_name([1, 1, 2]) == "start states"
    assert unit_name(["a", "b"]) == "prompts"


def test_prompts_of_runs_without_ids_are_known_by_their_text():
    def row(seed: int, text: str) -> dict:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
        return {"env": "prompts", "seed": seed, "messages": messages}

    assert (
        independent_unit_of(row(1, "a"))
        == independent_unit_of(row(2, "a"))
        != independent_unit_of(row(1, "b"))
    )


def rows_of(values: list[float], **fields) -> list[dict]:
    shared = {"success": None, "cost": 0.0, "turns": 1, "invalid": 0, "tokens": 3}
    shared |= {"decoding": "sampled", "messages": [], "sample": 0} | fields
    return [
        {**shared, "seed": seed, "return": value, "components": {"math": value, "style": value}}
        for seed, value in enumerate(values)
    ]


def test_outcomes_of_0_and_1_have_the_interval_of_a_share_under_every_name():
    summary = summarize_episodes(
        rows_of([1.0] * 8), name="p", env="e", random_return=0.0625, optimal_return=1.0
    )
    low = 0.05 ** (1 / 8)
    for name in ("return", "math"):
        assert summary["metrics"][name]["low"] == pytest.approx(low)
    assert summary["metrics"]["normalized"]["low"] == pytest.approx((low - 0.0625) / 0.9375)
    assert summary["metrics"]["normalized"]["high"] == 1.0
    for name in ("turns", "style"):
        assert "have the same value" in summary["metrics"][name]["needs"]


class Polite(Reward):
    """A user's reward with two scores; a subclass is all that the statistics need."""

    name = "polite"
    outcomes = (-1.0, 1.0)

    def score(self, conversations):
        return Scores([1.0] * len(conversations), {self.name: [1.0] * len(conversations)})


def test_a_reward_of_two_declared_scores_has_the_interval_of_a_proportion():
    def quiet(conversations):
        return [0.0] * len(conversations)

    quiet.outcomes = (0.0, 1.0)
    own = Polite() * 2.0 + as_reward(quiet, name="style")
    outcomes = binary_outcomes_by_name([own, build({"kind": "length"})])
    assert outcomes == {"polite": (-1.0, 1.0), "style": (0.0, 1.0)}
    rows = rows_of([1.0] * 8)
    for row in rows:
        row["components"] = {"polite": 1.0, "style": 0.0, "length": 1.0, "math": 1.0}
    summary = summarize_episodes(rows, name="p", env="e", outcomes=outcomes)
    low = 0.05 ** (1 / 8)
    metrics = summary["metrics"]
    polite, style = metrics["polite"], metrics["style"]
    assert (polite["low"], polite["high"]) == (pytest.approx(2 * low - 1), 1.0)
    assert (style["low"], style["high"]) == (0.0, pytest.approx(1 - low))
    for name in ("length", "math"):  # a reward of this name that does not declare two scores
        assert "have the same value" in metrics[name]["needs"]
    stored = json.loads(json.dumps(summary))
    limits = Evaluation("p", stored, rows).limits
    assert limits.outcomes == outcomes
    assert binary_values("polite", [1.0] * 8, limits) == (-1.0, 1.0)
    assert binary_values("polite", [0.5] * 8, limits) is None


def test_a_renamed_rule_keeps_its_two_scores(tmp_path, echo_model):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"prompt": f"Repeat: {text}", "answer": "x"}) + "\n" for text in TEXTS)
    )
    reward = {"kind": "exact_match", "name": "right", "answers": str(answers)}
    run = evaluate(tmp_path, echo_model, rewards=[reward])
    summary, _ = read(run)
    assert summary["outcomes"] == {"right": [0.0, 1.0]}
    # No reply of three prompts is right.
    assert summary["metrics"]["right"]["high"] == pytest.approx(1 - 0.05 ** (1 / 3))


def test_counts_of_turns_are_bounded_by_the_turn_limit():
    """The mid-p test of 0 events in 8 units gives an upper bound of 1 - 0.05^(1/8)."""
    most = 1 - 0.05 ** (1 / 8)
    for limit in (1, 3):
        summary = summarize_episodes(rows_of([1.0] * 8), name="p", env="e", turn_limit=limit)
        turns, invalid, tokens = (
            summary["metrics"][name] for name in ("turns", "invalid", "tokens")
        )
        assert (turns["low"], turns["high"]) == (1.0, pytest.approx(1 + (limit - 1) * most))
        assert (invalid["low"], invalid["high"]) == (0.0, pytest.approx(limit * most))
        assert summary["turn_limit"] == limit
        assert "have the same value" in tokens["needs"]


def test_a_turn_limit_below_the_counts_is_not_used():
    summary = summarize_episodes(rows_of([1.0] * 8, turns=4), name="p", env="e", turn_limit=3)
    assert "have the same value" in summary["metrics"]["turns"]["needs"]


@pytest.mark.parametrize(("random", "optimal"), [(0.0, 10.0), (-1.0, 1.0), (None, None)])
def test_equal_returns_are_not_those_of_a_binary_outcome(random, optimal):
    """Returns of 0 or 10: 36% of samples of twenty with P = 0.05 are all 0, their mean is 0.5."""
    for value in (0.0, 1.0):
        summary = summarize_episodes(
            rows_of([value] * 20), name="p", env="e", random_return=random, optimal_return=optimal
        )
        for name in {"return", "normalized"} & {*summary["metrics"]}:
            assert summary["metrics"][name]["low"] is None
            assert "variance cannot be estimated" in summary["metrics"][name]["needs"]
        assert summary["metrics"]["math"]["low"] is not None
    mixed = summarize_episodes(rows_of([0.0, 1.0] * 5), name="p", env="e")["metrics"]
    assert mixed["return"]["low"] == mixed["style"]["low"] == mixed["math"]["low"]


def test_repeated_evaluation_seeds_are_noted():
    rows = rows_of([0.5, 0.25, 0.75])
    summary = summarize_episodes([*rows, {**rows[0]}], name="p", env="e")
    assert summary["metrics"]["return"]["n"] == 3
    assert any("1 of 4 episodes repeat an evaluation seed" in note for note in summary["notes"])


def test_greedy_samples_of_a_start_state_are_not_called_prompts():
    rows = [row | {"decoding": "greedy"} for row in rows_of([0.5, 0.25])]
    twice = [row | {"sample": sample} for row in rows for sample in range(2)]
    (note,) = summarize_episodes(twice, name="p", env="e")["notes"]
    assert note.startswith("4 greedy episodes repeat 2 start states: n = 2; to narrow the ")
    assert "evaluate more start states" in note


def test_truncated_texts_are_noted():
    summary = summarize_episodes(
        rows_of([0.5] * 6), name="p", env="e", counts={"learned: truncated": 2}
    )
    assert "learned: 2 of 6 texts were truncated before they were scored" in summary["notes"]


def test_dropped_episodes_are_noted_with_their_reasons():
    counts = {"environment: ValueError: broken": 2, "environment: KeyError: 'x'": 1}
    (note,) = summarize_episodes(rows_of([0.5, 0.25, 0.75]), name="p", env="e", counts=counts)[
        "notes"
    ]
    assert note.startswith("3 of 6 episodes were dropped because their environment failed")
    assert note.endswith(": ValueError: broken (2); KeyError: 'x' (1)")


def test_a_list_that_nobody_named_is_suspected():
    """Greedy episodes of an environment that repeats its tasks without saying so."""
    rows = [
        {**row, "decoding": "greedy", "messages": [{"role": "user", "content": str(seed % 3)}]}
        for seed, row in enumerate(rows_of([0.5, 0.25, 0.75] * 4))
    ]
    (note,) = summarize_episodes(rows, name="p", env="e")["notes"]
    assert "12 greedy episodes contain 3 different conversations" in note
