"""`compare` over run directories written by hand."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from rlhf.errors import UserError
from rlhf.evaluation.compare import compare, headline_metric
from rlhf.evaluation.records import read_runs
from rlhf.evaluation.significance import compare_means
from rlhf.reports.results import compare_by_each_metric
from tests.helpers.runs import write_run


def test_two_models_pair_by_evaluation_seed(tmp_path: Path):
    old = write_run(tmp_path / "sft", {0: 1.0, 1: 5.0, 2: 3.0})
    new = write_run(tmp_path / "ppo", {2: 4.0, 0: 2.5, 1: 6.5})
    result = compare([old, new])
    (difference,) = result.differences
    assert (difference.method, difference.baseline, difference.unit) == ("ppo", "sft", "episodes")
    assert difference.estimate.value == pytest.approx(4 / 3)
    # Three differences of one sign: p = 2 / 2^3
    assert (difference.winner, difference.p_value) == (None, 0.25)
    assert "3 episodes are not enough" in difference.verdict
    assert any("one training run for each method" in note for note in result.notes)


def test_five_seeds_are_one_arm_and_the_unit_is_the_seed(tmp_path: Path):
    dirs = []
    for seed in range(5):
        base = {episode: float(episode + 10 * seed) for episode in range(4)}
        better = {episode: value + 1 + 0.1 * seed for episode, value in base.items()}
        dirs.append(write_run(tmp_path / f"seed{seed}" / "sft", base))
        dirs.append(write_run(tmp_path / f"seed{seed}" / "ppo", better))
    result = compare(dirs)
    assert [(row.method, row.unit, row.estimate.units, row.episodes) for row in result.rows] == [
        ("sft", "training seeds", 5, 20),
        ("ppo", "training seeds", 5, 20),
    ]
    (difference,) = result.differences
    # seed differences 1, 1.1, 1.2, 1.3, 1.4: sd sqrt(.025), t(.975, 4) = 2.776445
    assert difference.estimate.value == pytest.approx(1.2)
    half = 2.776445 * math.sqrt(0.025) / math.sqrt(5)
    assert difference.estimate.low == pytest.approx(1.2 - half, abs=1e-6)
    # The sign-flip test cannot reach 5% with five pairs: the t test of differing seeds decides.
    assert (difference.winner, difference.p_value) == ("ppo", 0.0625)


def test_baseline_of_one_run_stands_against_every_seed(tmp_path: Path):
    base = write_run(tmp_path / "sft", {0: 0.0, 1: 0.0})
    runs = [write_run(tmp_path / f"ppo-seed{s}", {0: 1.0 + s, 1: 1.0}) for s in range(3)]
    result = compare([base, *runs])
    assert result.differences[0].estimate.value == pytest.approx(1.5)
    assert result.differences[0].estimate.units == 3
    assert result.differences[0].winner is None
    assert any("single run" in note for note in result.notes)


def test_one_decided_metric_leads_where_prompts_have_no_return(tmp_path: Path):
    """The environment's return of a prompt is 0 for every reply: it would call all identical."""
    runs = []
    for name, level in (("sft", 0.0), ("ppo", 1.0)):
        run = write_run(tmp_path / name, dict.fromkeys(range(12), 0.0), env="prompts")
        (run / "config.yaml").write_text("rewards: [{kind: learned, path: r}]\n")
        path = next((run / "evaluation").glob("*/episodes.jsonl"))
        rows = [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]
        for index, row in enumerate(rows):
            row["prompt_id"] = f"p{index % 6}"
            row["components"] = {"aside": 0.0, "learned": level + 0.1 * (index % 6) + index // 6}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(run)
    result = compare(runs)
    (found,) = result.differences
    assert (result.metric, found.unit, found.estimate.units) == ("learned", "prompts", 6)
    assert found.estimate.value == pytest.approx(1.0)
    assert (found.winner, found.p_value) == ("ppo", pytest.approx(2 / 2**6))
    assert any("compared by learned" in note for note in result.notes)
    assert "| 6 prompts | 12 |" in result.to_markdown()
    assert "equal values in every pair" in compare(runs, metric="return").differences[0].verdict


def test_runs_of_another_task_are_named(tmp_path: Path):
    configs = {
        "short": "{env: {id: e, kwargs: {words: 4}}, rewards: [{kind: gold, weight: 1}]}",
        "long": "{env: {id: e, kwargs: {words: 6}}, rewards: [{kind: gold, weight: 2, low: 3}]}",
        "unevaluated": "{env: {id: e}}",
    }
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    runs = [write_run(tmp_path / name, {0: 1.0, 1: 2.0}) for name in ("short", "long")]
    notes = compare([*runs, tmp_path / "unevaluated"], metric="gold").notes
    assert "not the same task: short and long differ in env.kwargs of e" in notes
    assert "not the same task: short and long differ in reward gold" in notes
    assert "unevaluated: no episodes were evaluated" in notes


def test_prompt_runs_with_no_common_reward_are_not_identical(tmp_path: Path):
    runs = [write_run(tmp_path / name, {0: 0.0, 1: 0.0}, env="prompts") for name in "ab"]
    path = next((runs[1] / "evaluation").glob("*/episodes.jsonl"))
    path.write_text(path.read_text().replace('"gold"', '"other"'))
    with pytest.raises(UserError, match="no reward has scores in all of these runs"):
        compare(runs)


def test_a_metric_that_nothing_could_score_says_so(tmp_path: Path):
    run = write_run(tmp_path / "sft", {0: None, 1: None})
    with pytest.raises(UserError, match="no episode has a score for gold"):
        compare([run], metric="gold")


def test_pipeline_directory_expands_to_its_stages_in_order(tmp_path: Path):
    pipeline = tmp_path / "quickstart"
    write_run(pipeline / "ppo", {0: 2.0, 1: 3.0})
    write_run(pipeline / "sft", {0: 1.0, 1: 1.0})
    (pipeline / "pipeline.yaml").write_text("stages:\n- {name: sft}\n- {name: ppo}\n")
    assert compare([pipeline]).baseline == "sft"


def test_evaluate_stage_speaks_for_the_runs_beside_it(tmp_path: Path):
    """Its order is the table's, and it replaces what a run measured of itself."""
    pipeline = tmp_path / "quickstart"
    write_run(pipeline / "ppo", {0: 70.0, 1: 70.0}, policy="ppo")
    stage = pipeline / "evaluate"
    for policy, value in (("ppo", 2.0), ("dpo", 3.0), ("random", 0.0), ("sft", 1.0)):
        write_run(stage, {0: value, 1: value + 0.5}, policy=policy)
        folder = stage / "evaluation"
        (folder / f"{policy}-greedy-echo").rename(folder / policy)
    names = "".join(f"- {{name: {name}}}\n" for name in ("random", "sft", "ppo", "dpo"))
    (stage / "config.yaml").write_text(f"policies:\n{names}")
    result = compare([pipeline])
    assert result.baseline == "sft"
    assert [(row.method, row.estimate.value) for row in result.rows] == [
        ("random", 0.25),
        ("sft", 1.25),
        ("ppo", 2.25),
        ("dpo", 3.25),
    ]


def test_evaluate_stages_of_several_seeds_are_arms_over_seeds(tmp_path: Path):
    pipelines = []
    for seed in range(3):
        stage = tmp_path / f"quickstart-seed{seed}" / "evaluate"
        for policy in ("sft", "ppo"):
            write_run(stage, {0: float(seed), 1: 1.0 + (policy == "ppo")}, policy=policy)
        pipelines.append(stage.parent)
    result = compare(pipelines, baseline="sft")
    assert [(row.method, row.unit, row.estimate.units) for row in result.rows] == [
        ("ppo", "training seeds", 3),
        ("sft", "training seeds", 3),
    ]
    assert result.differences[0].estimate.value == pytest.approx(0.5)


def test_five_runs_are_not_significantly_better_than_a_single_one(tmp_path: Path):
    base = write_run(tmp_path / "sft", {0: 0.0, 1: 0.0})
    runs = [write_run(tmp_path / f"ppo-seed{s}", {0: 1 + 0.01 * s, 1: 1.0}) for s in range(5)]
    (found,) = compare([base, *runs]).differences
    assert found.estimate.units == 5
    assert found.winner is None
    assert "a single run of one method is not enough" in found.verdict
    assert "significant" not in found.verdict


def test_a_policy_that_nobody_trained_meets_every_decoding_and_has_no_training_noise(tmp_path):
    states = range(10)
    for s in range(9):
        write_run(tmp_path / f"ppo-seed{s}", {state: 1 + 0.01 * s for state in states})
    runs = sorted(tmp_path.iterdir())
    chance = {state: 0.01 * state for state in states}
    write_run(tmp_path / "judged", chance, policy="random", decoding="random")
    result = compare([*runs, tmp_path / "judged"], baseline="random")
    (found,) = result.differences
    assert (found.method, found.decoding, found.winner) == ("ppo", "greedy", "ppo")
    assert not any("single run" in note for note in result.notes)


def test_a_function_as_baseline_is_compared_only_within_its_decoding(tmp_path):
    """A function or a model on a server was evaluated with one decoding, unlike `random`."""
    for decoding in ("greedy", "sampled"):
        write_run(tmp_path / "ppo", dict.fromkeys(range(10), 1.0), decoding=decoding)
    run = write_run(tmp_path / "rule", dict.fromkeys(range(10), 0.5), policy="rule")
    summary = {"env": "echo", "policy": "rule", "decoding": "greedy", "fixed_policy": True}
    (run / "evaluation/rule-greedy-echo/summary.json").write_text(json.dumps(summary))
    found = compare([tmp_path / "ppo", run], baseline="rule").differences
    assert [difference.decoding for difference in found] == ["greedy"]


def test_the_error_of_one_reference_evaluation_is_not_reduced_by_training_seeds(tmp_path: Path):
    """Ten seeds return 0.3 on every start state; the random policy returns 0.00, 0.05, ... 0.45."""
    values = dict.fromkeys(range(10), 0.3)
    runs = [
        write_run(tmp_path / f"ppo-seed{s}", {k: v + 0.001 * s for k, v in values.items()})
        for s in range(10)
    ]
    chance = {state: 0.05 * state for state in range(10)}
    write_run(tmp_path / "judged", chance, policy="random", decoding="random")
    (found,) = compare([*runs, tmp_path / "judged"], baseline="random").differences
    assert found.estimate.value == pytest.approx(0.0795)
    # The sign-flip test of the seeds alone gives 2 / 2^10, and its error of the mean is far below
    # that of the random policy: the squared deviations of its returns sum up to 0.0025 * 82.5.
    error = (0.0025 * 82.5 / 9 / 10) ** 0.5
    assert found.p_value == pytest.approx(2 * t.sf(0.0795 / error, 9), abs=0.02)
    assert found.winner is None
    assert found.estimate.low == pytest.approx(0.0795 - t.ppf(0.975, 9) * error, abs=0.001)
    assert found.estimate.high == pytest.approx(0.0795 + t.ppf(0.975, 9) * error, abs=0.001)


def test_equal_returns_of_a_reference_do_not_mean_that_it_has_no_error(tmp_path: Path):
    """A policy that earns 1 in 10% of its episodes often earns 0 in all of ten episodes."""
    runs = [
        write_run(tmp_path / f"ppo-seed{s}", dict.fromkeys(range(10), 0.1 + 0.001 * s))
        for s in range(10)
    ]
    write_run(
        tmp_path / "judged", dict.fromkeys(range(10), 0.0), policy="random", decoding="random"
    )
    (found,) = compare([*runs, tmp_path / "judged"], baseline="random").differences
    assert (found.winner, found.p_value, found.estimate.known) == (None, 1.0, False)
    assert found.estimate.needs.startswith("common error: all 10 units have the same value")


def test_eight_seeds_are_too_few_for_a_comparison_with_a_reference():
    """0.7^8 = 0.058: with a probability of 5.8%, no run fails of eight that fail with 30%."""
    for n, comparisons, needed in ((8, 1, 9), (9, 1, 9), (11, 3, 12), (12, 3, 12)):
        found = compare_means(
            np.linspace(1.0, 1.1, n), np.zeros(n), method="a", baseline="random",
            unit="training seeds", shared_differences=np.linspace(1.0, 1.1, 20),
            comparisons=comparisons,
        )  # fmt: skip
        assert 0.7**needed <= 0.05 / comparisons < 0.7 ** (needed - 1)
        assert found.winner == ("a" if n == needed else None)
        if n < needed:
            assert f"{n} training seeds are not enough" in found.verdict
            assert f"(at least {needed} seeds)" in found.verdict
        assert found.estimate.known == (n >= 9)
    few = compare_means(
        np.ones(8), np.zeros(8), method="a", baseline="random", unit="training seeds",
        shared_differences=np.ones(20), span=1.0,
    )  # fmt: skip
    assert few.estimate.needs == "8 training seeds, a comparison with a reference needs 9"


def test_a_binary_reference_that_always_fails_has_the_adjusted_wald_error():
    found = compare_means(
        [1.0] * 9, [0.0] * 9, method="a", baseline="random", unit="training seeds", span=1.0,
        shared_differences=[1.0] * 62,
    )  # fmt: skip
    # One gain and one loss are added: the mean is 62/64, the variance 1 - (62/64)^2, over 64 units.
    error = ((1 - (62 / 64) ** 2) / 64) ** 0.5
    assert found.winner == "a"
    assert 1 - found.estimate.low > t.ppf(0.975, 63) * error


def test_one_episode_of_a_reference_decides_nothing(tmp_path: Path):
    runs = [write_run(tmp_path / f"ppo-seed{s}", {0: 1 + 0.01 * s}) for s in range(9)]
    write_run(tmp_path / "judged", {0: 0.0}, policy="random", decoding="random")
    (found,) = compare([*runs, tmp_path / "judged"], baseline="random").differences
    assert (found.winner, found.p_value, found.estimate.known) == (None, 1.0, False)
    assert found.estimate.needs == "common error: 1 unit, a reference needs 10"
    assert found.verdict.endswith("the difference is not significant")


def test_a_baseline_without_scores_is_named_with_the_reason(tmp_path: Path):
    scored = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    unscored = write_run(tmp_path / "ppo", {0: None, 1: None})
    with pytest.raises(
        UserError, match=r"named 'ppo' was evaluated \(sft\); ppo: 2 episodes have no return"
    ):
        compare([scored, unscored], baseline="ppo")


def test_evaluations_of_one_name_are_not_dropped_silently(tmp_path: Path):
    """Two evaluations of the policies x and y: the second one was ignored without a note."""
    for name, values in (("first", {0: 0.0, 1: 1.0}), ("second", {2: 5.0, 3: 6.0})):
        for policy in ("x", "y"):
            write_run(tmp_path / name, values, policy=policy)
        (tmp_path / name / "config.yaml").write_text("policies: [{name: x}, {name: y}]")
    result = compare([tmp_path / "first", tmp_path / "second"])
    assert [(row.method, row.estimate.value) for row in result.rows] == [("x", 0.5), ("y", 0.5)]
    for method in ("x", "y"):
        assert any(
            note.startswith(f"second: the evaluation of {method} is omitted, because first has")
            for note in result.notes
        )


def test_one_pair_is_too_few(tmp_path: Path):
    runs = [write_run(tmp_path / name, {0: value}) for name, value in (("a", 0.0), ("b", 1.0))]
    (found,) = compare(runs).differences
    assert found.verdict == "no result: one episode is not enough to compare b with a"


def test_nothing_to_compare_is_said(tmp_path: Path):
    run = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    assert any("nothing was compared" in note for note in compare([run]).notes)
    with pytest.raises(UserError, match="given twice"):
        compare([run, run])


def test_an_episode_without_its_seed_is_named(tmp_path: Path):
    run = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    path = run / "evaluation" / "model-greedy-echo" / "episodes.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + second.replace('"seed"', '"sed"') + "\n")
    with pytest.raises(UserError, match=r"episodes\.jsonl, line 2: no seed"):
        compare([run])


def test_several_decodings_of_one_seed_are_averaged(tmp_path: Path):
    run = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    path = run / "evaluation" / "model-greedy-echo" / "episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]
    rows.append({**rows[0], "return": 4.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = compare([run])
    (row,) = result.rows
    assert row.estimate.value == pytest.approx((2.5 + 2.0) / 2)
    assert (row.estimate.units, row.episodes) == (2, 3)
    assert any("1 episode with a repeated evaluation seed" in note for note in result.notes)


def test_a_folder_whose_name_ends_in_a_number_is_read(tmp_path: Path):
    run = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    folder = run / "evaluation" / "model-greedy-echo"
    folder.rename(folder.with_name("qwen2.5"))
    assert compare([run]).rows[0].estimate.value == pytest.approx(1.5)


def test_innermost_seed_of_the_path_is_the_training_seed(tmp_path: Path):
    dirs = []
    for seed in (0, 1):
        for method in ("sft", "ppo"):
            dirs.append(write_run(tmp_path / "seed7" / method / f"seed{seed}", {0: 1.0 * seed}))
    result = compare(dirs)
    assert [(row.method, row.estimate.units) for row in result.rows] == [("sft", 2), ("ppo", 2)]


def test_reference_policies_are_arms_of_their_own(tmp_path: Path):
    run = write_run(tmp_path / "ppo", {0: 2.0, 1: 3.0})
    write_run(run, {0: 0.0, 1: 0.5}, policy="random")
    result = compare([run])
    assert [row.method for row in result.rows] == ["ppo", "random"]
    assert result.differences[0].method == "random"
    assert result.differences[0].baseline == "ppo"


def test_settings_never_mix(tmp_path: Path):
    old = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    new = write_run(tmp_path / "ppo", {0: 2.0, 1: 3.0}, decoding="sampled")
    write_run(new, {0: 1.5, 1: 2.0})
    assert [d.decoding for d in compare([old, new]).differences] == ["greedy"]


def test_component_metric_and_unscored_episodes(tmp_path: Path):
    old = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0, 2: 9.0})
    new = write_run(tmp_path / "ppo", {0: 2.0, 1: 3.5, 2: None})
    result = compare([old, new], metric="gold")
    assert result.differences[0].estimate.value == pytest.approx(2.5)
    assert "ppo: 1 episode has no gold and is omitted" in result.notes
    assert any("2 of 3 evaluation seeds" in note for note in result.notes)


def test_normalized_runs_from_the_random_policy_to_the_optimal_one(tmp_path: Path):
    low = write_run(tmp_path / "low", {0: 2.0, 1: 4.0})
    high = write_run(tmp_path / "high", {0: 9.0, 1: 10.0})
    for run in (low, high):
        (folder,) = (run / "evaluation").iterdir()
        (folder / "summary.json").write_text('{"random": 2.0, "optimal": 10.0}')
    result = compare([low, high], metric="normalized")
    assert [row.estimate.value for row in result.rows] == [0.125, 0.9375]
    bare = write_run(tmp_path / "bare", {0: 2.0, 1: 4.0})
    with pytest.raises(UserError, match="'normalized' was not evaluated"):
        compare([bare, low], metric="normalized")
    # Random play that violates the limit of a constrained task can earn more than the optimum.
    for run in (low, high):
        (folder,) = (run / "evaluation").iterdir()
        (folder / "summary.json").write_text('{"random": 10.0, "optimal": 2.0}')
    with pytest.raises(UserError, match="'normalized' was not evaluated"):
        compare([low, high], metric="normalized")


def test_markdown_and_json_say_the_same(tmp_path: Path):
    old = write_run(tmp_path / "sft", {0: 1.0, 1: 5.0, 2: 3.0})
    new = write_run(tmp_path / "ppo", {0: 2.5})
    result = compare([old, new])
    text, tree = result.to_markdown(), json.loads(result.to_json())
    assert (
        "| ppo - sft | echo | greedy | 1.500 (no interval: 1 unit, an interval needs 5) |" in text
    )
    estimate = tree["differences"][0]["estimate"]
    assert estimate == {
        "mean": 1.5,
        "low": None,
        "high": None,
        "n": 1,
        "needs": "1 unit, an interval needs 5",
    }
    assert tree["differences"][0]["winner"] is None


def test_coverage_is_printed(tmp_path: Path):
    old = write_run(tmp_path / "sft", {i: float(i % 3) for i in range(30)})
    new = write_run(tmp_path / "ppo", {i: float(i % 4) for i in range(30)})
    text = compare([old, new]).to_markdown()
    assert "simulated coverage of the 95% intervals with 30 episodes: 9" in text


def test_mistakes_are_told_in_one_line(tmp_path: Path):
    old = write_run(tmp_path / "sft", {0: 1.0})
    far = write_run(tmp_path / "ppo", {7: 1.0})
    cases = {
        "share no evaluation seed": lambda: compare([old, far]),
        "did you mean 'return'": lambda: compare([old], metric="retrun"),
        "did you mean 'sft'": lambda: compare([old], baseline="sftt"),
        "did you mean 'sft'?": lambda: compare([tmp_path / "stf"]),
        "is not a run directory": lambda: compare([old / "evaluation"]),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError, match=words.replace("?", r"\?")) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_unevaluated_run_says_what_to_do(tmp_path: Path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match="rlhf evaluate"):
        compare([tmp_path / "sft"])


def test_arms_without_common_training_seeds_are_refused(tmp_path: Path):
    dirs = [write_run(tmp_path / f"sft-seed{s}", {0: 1.0}) for s in (0, 1)]
    dirs += [write_run(tmp_path / f"ppo-seed{s}", {0: 1.0}) for s in (2, 3)]
    with pytest.raises(ValueError, match="share no training seed"):
        compare(dirs)


def test_half_written_last_line_is_left_out_but_a_broken_one_is_named(tmp_path: Path):
    run = write_run(tmp_path / "sft", {0: 1.0, 1: 2.0})
    path = run / "evaluation" / "model-greedy-echo" / "episodes.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"env": "ec')
    assert compare([run]).rows[0].episodes == 2
    path.write_text("{oops\n" + whole)
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 1: broken JSON"):
        compare([run])


def write_pipeline(root: Path, methods: Mapping[str, Mapping[int, float | None]]) -> Path:
    root.mkdir()
    stages = "".join(f"  - name: {name}\n" for name in methods)
    (root / "pipeline.yaml").write_text(f"stages:\n{stages}")
    for name, returns in methods.items():
        write_run(root / name, returns)
    return root


def test_trained_policies_of_one_pipeline_are_compared_with_each_other(tmp_path: Path):
    levels = {"sft": 0.0, "ppo": 1.0, "dpo": 3.0}
    methods = {name: {i: level + i for i in range(8)} for name, level in levels.items()}
    root = write_pipeline(tmp_path / "run", methods)
    result = compare([root])
    found = {(d.method, d.baseline): d for d in result.differences}
    assert list(found) == [("ppo", "sft"), ("dpo", "sft"), ("dpo", "ppo")]
    assert found["dpo", "ppo"].estimate.value == 2.0
    # p = 2 / 2^8 for each, of three comparisons
    assert [d.winner for d in result.differences] == ["ppo", "dpo", "dpo"]
    assert any("3 comparisons" in note and "0.017" in note for note in result.notes)
    named = compare([root], baseline="sft").differences
    assert [(d.method, d.baseline) for d in named] == [("ppo", "sft"), ("dpo", "sft")]


def test_an_arm_on_other_episodes_is_noted_and_the_rest_is_compared(tmp_path: Path):
    same = {i: float(i) for i in range(8)}
    methods = {"sft": same, "ppo": {i: v + 1 for i, v in same.items()}, "dpo": {100: 1.0}}
    result = compare([write_pipeline(tmp_path / "run", methods)])
    assert [(d.method, d.baseline) for d in result.differences] == [("ppo", "sft")]
    # Judged as the one comparison that it is.
    assert not any("comparisons:" in note for note in result.notes)
    assert sum("share no evaluation seed" in note for note in result.notes) == 2
    with pytest.raises(UserError, match="share no evaluation seed"):
        compare([tmp_path / "run" / "sft", tmp_path / "run" / "dpo"])


def write_prompt_run(
    directory: Path,
    scores: dict[str, list[float]],
    *,
    rewards: tuple[str, ...] = (),
    outcomes: dict[str, tuple[float, float]] | None = None,
) -> Path:
    """An evaluation on prompts, whose returns are 0; `rewards` were trained on."""
    folder = directory / "evaluation" / directory.name
    folder.mkdir(parents=True)
    specs = [{"kind": "function", "path": "m:f", "name": name} for name in rewards]
    (directory / "config.yaml").write_text(json.dumps({"seed": 0, "rewards": specs}))
    summary = {"env": "prompts", "policy": directory.name, "outcomes": outcomes}
    (folder / "summary.json").write_text(json.dumps(summary))
    common = {"env": "prompts", "policy": directory.name, "decoding": "greedy", "return": 0.0}
    with (folder / "episodes.jsonl").open("w") as file:
        for index, values in enumerate(zip(*scores.values(), strict=True)):
            components = dict(zip(scores, values, strict=True))
            row = {**common, "seed": index, "prompt_id": str(index), "components": components}
            file.write(json.dumps(row) + "\n")
    return directory


def test_a_trained_reward_is_no_gold_score_because_of_its_name(tmp_path: Path):
    names = ("gold_words", "brevity")
    scores = {"gold_words": [1.0, 2.0], "brevity": [0.0, 1.0], "score": [1.0, 3.0]}
    runs = [write_prompt_run(tmp_path / name, scores, rewards=names) for name in ("a", "b")]
    assert compare(runs).metric == "score"
    gold = {**scores, "gold": [0.0, 1.0]}
    runs = [write_prompt_run(tmp_path / name, gold, rewards=names) for name in ("c", "d")]
    assert compare(runs).metric == "gold"


def test_the_possible_scores_of_one_evaluation_are_not_those_of_another(tmp_path: Path):
    """The interval of a method does not depend on the order of the directories."""
    binary = write_prompt_run(tmp_path / "a", {"v": [0.0, 1.0] * 3}, outcomes={"v": (0.0, 1.0)})
    other = write_prompt_run(tmp_path / "b", {"v": [0.0] * 5 + [0.3]}, outcomes={})
    for runs in ([binary, other], [other, binary]):
        result = compare(runs, metric="v")
        (row,) = [row for row in result.rows if row.method == "a"]
        # exact mid-p interval of 3 of 6
        assert (row.estimate.low, row.estimate.high) == pytest.approx((0.1466, 0.8534), abs=1e-4)
        (difference,) = result.differences
        assert difference.estimate.method != "adjusted Wald"


def test_a_replaced_evaluation_does_not_decide_about_the_metric(tmp_path: Path):
    """The evaluation at the end of `ppo` has another reward; the stage `evaluate` replaces it."""
    write_prompt_run(tmp_path / "ppo", {"proxy": [1.0] * 6}, rewards=("proxy",))
    stage = tmp_path / "evaluate"
    for name, values in {"sft": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "ppo": [1.0] * 6}.items():
        run = write_prompt_run(tmp_path / "parts" / name, {"gold": values})
        (stage / "evaluation").mkdir(parents=True, exist_ok=True)
        (run / "evaluation" / name).rename(stage / "evaluation" / name)
    policies = [{"name": "sft"}, {"name": "ppo"}]
    (stage / "config.yaml").write_text(json.dumps({"policies": policies}))
    shutil.rmtree(tmp_path / "parts")
    result = compare([tmp_path])
    assert result.metric == headline_metric(read_runs(tmp_path)) == "gold"
    (difference,) = result.differences
    assert difference.estimate.value == pytest.approx(0.75)
    comparisons = compare_by_each_metric(read_runs(tmp_path), "gold")
    assert [comparison.metric for comparison in comparisons] == ["gold"]
