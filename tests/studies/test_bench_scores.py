"""From returns to normalized scores, aggregates, verdicts and files; numbers worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.studies.bench import result as bench_result
from rlhf.studies.bench.regression_check import (
    ALL_ENVIRONMENTS,
    check_regression,
    read_bench_result,
)
from rlhf.studies.bench.report import write_bench_report
from rlhf.studies.bench.result import protocol_sentences, verdict_lines
from rlhf.studies.bench.scores import analyze_scores, read_scores
from tests.studies.fake_bench import planted_bench

SFT = {"echo": [0.25, 0.25, 0.25, 0.25, 0.25], "maze": [0.1, 0.2, 0.1, 0.2, 0.15]}
GOOD = {"echo": [0.90, 0.92, 0.91, 0.93, 0.89], "maze": [0.5, 0.55, 0.5, 0.55, 0.52]}
TWIN = {"echo": [0.92, 0.90, 0.93, 0.89, 0.91], "maze": [0.55, 0.5, 0.52, 0.5, 0.55]}
RETURNS = {"sft": SFT, "good": GOOD, "twin": TWIN}


def found(bench):
    scores = read_scores(bench)
    return scores, analyze_scores(scores, baseline=bench.baseline)


def test_scores_are_fractions_of_the_way_from_random_to_optimal(tmp_path):
    scores, _ = found(planted_bench(tmp_path / "b", RETURNS))
    # Echo: (.25 - 1/16) / (15/16) = .2;  maze: (.2 - .1) / .5 = .2
    assert scores.trained["sft"][1] == pytest.approx([0.2, 0.2])
    assert scores.trained["good"][:, 1] == pytest.approx([0.8, 0.9, 0.8, 0.9, 0.84])
    assert scores.untrained["random"].tolist() == [[0.0, 0.0]]
    assert scores.untrained["expert"] == pytest.approx(np.ones((1, 2)))
    # Halfway the return was .45: (.45 - .0625) / .9375
    assert scores.curves["good"][0, 0] == pytest.approx([0.41333333, 0.89333333])


def test_bounds_of_the_manifest_win_and_an_unknown_optimum_is_asked_for(tmp_path):
    bench = planted_bench(tmp_path / "b", RETURNS)
    tree = {"environments": {"maze": {"random": 0.0, "optimal": 2.0}}}
    entry = bench.config.environments["maze"] | tree["environments"]["maze"]
    environments = {"echo": bench.config.environments["echo"], "maze": entry}
    scores, _ = found(planted_bench(tmp_path / "c", RETURNS, environments=environments))
    assert scores.trained["sft"][:, 1] == pytest.approx([0.05, 0.1, 0.05, 0.1, 0.075])
    for path in (tmp_path / "b/runs/maze/seed0/evaluate").rglob("summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"optimal": None}))
    with pytest.raises(
        UserError, match=r"environments\.maze: .*set the key optimal in the manifest"
    ):
        read_scores(bench)


def test_a_missing_run_is_no_silent_hole(tmp_path):
    bench = planted_bench(tmp_path / "b", RETURNS)
    (tmp_path / "b/runs/echo/seed3/good/evaluation/good/summary.json").unlink()
    with pytest.raises(UserError, match=r"seed3/good/.* is missing: .*--resume"):
        read_scores(bench)


def test_only_what_lies_outside_the_noise_is_called_better(tmp_path):
    bench = planted_bench(tmp_path / "b", RETURNS)
    _, findings = found(bench)
    winners = {(d.method, d.baseline): d.winner for d in findings.against_baseline}
    assert winners == {("good", "sft"): "good", ("twin", "sft"): "twin"}
    assert [d.winner for d in findings.pairs] == [None]
    lines = verdict_lines(findings)
    assert lines[0].startswith("good is significantly better than sft (95%, 5 training seeds)")
    assert any(line.startswith("1 of 1 pairs of algorithms have no winner") for line in lines)
    assert findings.improvement["good"].value == 1.0
    assert findings.aggregates["expert"]["IQM"].known is False


def test_all_verdicts_share_one_error_rate(tmp_path):
    """Two comparisons with sft and one pair: each is tested at 5% / 3."""
    _, findings = found(planted_bench(tmp_path / "b", RETURNS))
    assert any(
        "each pair is tested at significance level 1.67%" in line
        for line in verdict_lines(findings)
    )
    # log2(2 / 0.0167) = 6.9: at this level the sign-flip test needs 7 seeds.
    assert "at least 7" in findings.pairs[0].verdict
    _, findings = found(planted_bench(tmp_path / "c", RETURNS, baseline="good"))
    names = [{d.method, d.baseline} for d in findings.differences]
    assert names == [{"sft", "good"}, {"twin", "good"}]


def test_four_seeds_call_nobody_better(tmp_path):
    four = {row: {env: v[:4] for env, v in table.items()} for row, table in RETURNS.items()}
    _, findings = found(planted_bench(tmp_path / "b", four))
    assert [d.winner for d in findings.against_baseline] == [None, None]
    assert "significantly" not in " ".join(verdict_lines(findings))


def test_the_iqm_is_that_of_all_runs_together(tmp_path):
    scores, findings = found(planted_bench(tmp_path / "b", RETURNS))
    middle = np.sort(scores.trained["good"].ravel())[2:8]
    assert findings.aggregates["good"]["IQM"].value == pytest.approx(middle.mean())
    curve = findings.curves["good"]
    assert curve[0].value == pytest.approx(findings.aggregates["sft"]["IQM"].value)
    assert curve[-1].value == pytest.approx(findings.aggregates["good"]["IQM"].value)


def test_everything_is_written_and_the_same_scores_give_the_same_text(tmp_path):
    texts = []
    for name in ("b", "c"):
        bench = planted_bench(tmp_path / name, RETURNS)
        scores, findings = found(bench)
        page = write_bench_report(bench, scores, findings)
        texts.append((tmp_path / name / "bench.md").read_text())
        html = page.read_text()
        assert "Performance profile" in html
        assert "Sample efficiency" in html
        assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert texts[0].removeprefix("# b") == texts[1].removeprefix("# c")
    assert "| good | 0.89 [" in texts[0]
    result = read_bench_result(tmp_path / "b/bench.json")
    assert result["scores"]["good"]["maze"] == pytest.approx([0.8, 0.9, 0.8, 0.9, 0.84])
    assert result["training_episodes"]["echo"] == {"good": 128, "twin": 128}
    lines = (tmp_path / "b/tables/scores.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 + 3 * 2 * 5
    assert (tmp_path / "b/pages/maze.html").stat().st_size > 5000


def test_no_single_budget_is_stated_where_budgets_differ(tmp_path, monkeypatch):
    bench = planted_bench(tmp_path / "b", RETURNS)
    episodes = {"echo": {"good": 128, "twin": 64}, "maze": {"good": 128, "twin": 128}}
    monkeypatch.setattr(bench_result, "training_episode_counts", lambda _: episodes)
    lines = protocol_sentences(bench)
    assert "Budgets differ on echo: good 128, twin 64 training episodes." in lines
    assert "Training episodes of each algorithm: maze 128." in lines


def test_the_budget_of_tuning_is_told(tmp_path):
    tuning = {"trials": 12, "seeds": [100], "algorithms": ["good", "twin"]}
    bench = planted_bench(tmp_path / "b", RETURNS, tuning=tuning)
    assert (
        "tuned with 12 trials for each of good, twin, on seeds 100" in protocol_sentences(bench)[-1]
    )


def result_of(folder, returns, **keys):
    bench = planted_bench(folder, returns, **keys)
    write_bench_report(bench, *found(bench))
    return read_bench_result(folder / "bench.json")


def test_the_gate_finds_what_got_worse_and_nothing_else(tmp_path):
    before = result_of(tmp_path / "before", RETURNS)
    same = result_of(tmp_path / "same", RETURNS)
    assert check_regression(same, before).significant_losses == []
    assert (
        check_regression(same, before)
        .summary_line()
        .startswith("bench: no score is significantly worse")
    )
    noisy = RETURNS | {"good": TWIN, "twin": GOOD}
    assert check_regression(result_of(tmp_path / "noisy", noisy), before).significant_losses == []
    drops = (0.36, 0.44, 0.4, 0.42, 0.38)
    low = [value - drop for value, drop in zip(GOOD["echo"], drops, strict=True)]
    lame = {"echo": low, "maze": GOOD["maze"]}
    outcome = check_regression(result_of(tmp_path / "lame", RETURNS | {"good": lame}), before)
    assert {(d.method, d.env) for d in outcome.significant_losses} == {
        ("good", "echo"),
        ("good", ALL_ENVIRONMENTS),
    }
    assert "WORSE" in outcome.summary_line()
    assert "good on echo by -0.427" in outcome.summary_line()
    assert "\n" not in outcome.summary_line()
    # Five equal differences have no spread, and the exact test says p = 0.0625.
    equal = {"echo": [v - 0.4 for v in GOOD["echo"]], "maze": GOOD["maze"]}
    assert (
        check_regression(
            result_of(tmp_path / "equal", RETURNS | {"good": equal}), before
        ).significant_losses
        == []
    )
    # What got better is no alarm.
    assert (
        check_regression(
            before, result_of(tmp_path / "lamer", RETURNS | {"good": lame})
        ).significant_losses
        == []
    )


def test_the_gate_refuses_to_judge_by_too_few_seeds(tmp_path):
    four = {row: {env: v[:4] for env, v in table.items()} for row, table in RETURNS.items()}
    before, now = result_of(tmp_path / "b", four), result_of(tmp_path / "c", RETURNS)
    with pytest.raises(UserError, match="share 4 training seeds"):
        check_regression(now, before)


def test_the_gate_says_when_it_does_not_compare_like_with_like(tmp_path):
    before = result_of(tmp_path / "b", RETURNS)
    now = result_of(tmp_path / "c", {"sft": SFT, "good": GOOD}, episodes=9)
    assert check_regression(now, before).notes == [
        "the manifests differ in algorithms, episodes",
        "not measured now: twin",
    ]


@pytest.mark.parametrize(
    ("text", "words"), [(None, "does not exist"), ("{", "not JSON"), ("{}", "is not a bench")]
)
def test_a_baseline_that_is_none_is_refused(tmp_path, text, words):
    path = tmp_path / "baseline.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_bench_result(path)
