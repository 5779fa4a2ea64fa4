"""`rlhf overoptimize` end to end on a tiny policy, and its results on planted curves."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.cli.table import COMMANDS, configure, run_command
from rlhf.common.numbers import centered_moving_average
from rlhf.errors import UserError
from rlhf.pipeline import read_pipeline
from rlhf.reward_models import as_reward
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.sidecar import Sidecar
from rlhf.runs.checksums import verify_checksums, write_checksums
from rlhf.studies.overoptimize.fits import best_of_n_scores
from rlhf.studies.overoptimize.results import (
    TrainingTrack,
    best_of_n_result,
    combined_proxy_scores,
    powers_of_two_and_limit,
    rl_result,
    verdict_sentences,
)
from rlhf.studies.overoptimize.run import (
    ProxyReward,
    _read_track,
    _score_and_record_standardization,
)
from tests.helpers.training import assistant, unknown_entries, user, write_rows
from tests.reward_models.conftest import save_decoder

NO_SAMPLES = {
    "proxy": "p",
    "how": "single",
    "gold": [{"mean": 0.0}, {"mean": 0.0}],
    "ns": [1, 2],
    "advice": "none",
}


def tree_of(folder, tmp_path, **change):
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(folder), "dtype": "float32"},
        "env": {"id": "text/PreferenceBandit-v0", "kwargs": {"instructions": False}},
        "gold": [{"kind": "length", "low": 4, "high": 20, "unit": "characters", "name": "gold"}],
        "rewards": [{"kind": "length", "low": 40, "unit": "characters", "name": "proxy"}],
        "rollout": {"max_new_tokens": 6},
        "best_of_n": {"prompts": 4, "samples": 8},
        "rl": {
            "seeds": 3,
            "measured": 4,
            "training": {
                "num_steps": 3,
                "episodes_per_step": 8,
                "optimizer": {"learning_rate": 0.01},
                "algorithm": {"kl_coef": 0.0, "group_size": 4},
            },
        },
        **change,
    }


def test_a_given_proxy_is_optimized_by_choice_and_by_training(policy_folder, tmp_path):
    tree = tree_of(policy_folder, tmp_path)
    run = run_command("overoptimize", tree)
    assert not unknown_entries(run)
    found = json.loads((run / "overoptimization.json").read_text())
    [chosen], [trained] = found["best_of_n"], found["rl"]
    assert chosen["ns"] == [1, 2, 4, 8]
    assert chosen["gold"][0]["mean"] == pytest.approx(found["start"])
    scores = [point["mean"] for point in chosen["proxy_score"]]
    assert scores == sorted(scores)
    assert trained["steps"] == [1, 2, 3]
    assert trained["kl"][0] == pytest.approx(0, abs=1e-6)
    assert trained["gold"][0]["n"] == 3
    # The logged divergence and proxy are those of the three runs.
    logs = [
        [json.loads(line) for line in (run / "rl" / f"single-seed{s}" / "metrics.jsonl").open()]
        for s in range(3)
    ]
    last = np.mean([log[-1]["reward/mean"] for log in logs])
    assert trained["proxy_score"][-1]["mean"] == pytest.approx(last)
    assert "Over-optimization" in (run / "report.html").read_text()
    assert not (run / "proxies").exists()


def test_a_standardized_proxy_keeps_valid_checksums(tmp_path):
    """Its description has the scale of its scores. A damaged model could not be exported."""
    final = save_decoder(tmp_path / "final")
    write_checksums(final)
    words = ("yes", "no", "maybe", "the fox")
    asked = {"role": "user", "content": "yes or no"}
    groups = [[[asked, {"role": "assistant", "content": word}] for word in words]]
    proxy = ProxyReward("base0-4", 1, 4, [final], 0.5)
    ((_, scores),) = _score_and_record_standardization(
        configure("overoptimize", tree_of(final, tmp_path)), [proxy], groups
    )
    raw = LearnedReward.load(final).score(groups[0]).values
    assert (Sidecar.read(final).mean, Sidecar.read(final).std) == pytest.approx(
        (np.mean(raw), np.std(raw)), rel=1e-4
    )
    assert scores.shape == (1, 1, 4)
    verify_checksums(final)


def test_prompts_which_have_no_reward_of_their_own_are_optimized_too(policy_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Guest {number} is tired."} for number in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tree_of(policy_folder, tmp_path, env={"prompts": [{"path": str(path)}]})
    run = run_command("overoptimize", tree)
    found = json.loads((run / "overoptimization.json").read_text())
    assert found["rl"][0]["steps"] == [1, 2, 3]


def test_repeated_prompts_are_one_unit(policy_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    env = {"prompts": [{"path": str(path)}]}
    tree = tree_of(policy_folder, tmp_path, env=env, rl=None)
    tree["best_of_n"] = {"prompts": 12, "samples": 8}
    path.write_text("".join(json.dumps({"prompt": f"Guest {i}."}) + "\n" for i in range(4)))
    run = run_command("overoptimize", tree)
    found = json.loads((run / "overoptimization.json").read_text())
    (row, *_) = found["best_of_n"]
    assert {cell["n"] for cell in row["gold"]} == {4}
    assert row["fit"]["alpha"]["n"] == 4
    assert found["start"] == pytest.approx(row["gold"][0]["mean"])
    path.write_text("".join(json.dumps({"prompt": f"Guest {i}."}) + "\n" for i in range(2)))
    with pytest.raises(UserError, match="12 start states have only 2 different prompts"):
        run_command("overoptimize", {**tree, "output_dir": str(tmp_path / "few")})


def test_a_track_scores_replies_and_keeps_steps_without_an_update(tmp_path):
    """A truncated episode ends with an observation, and a skipped step logs no KL."""
    kls = [{"policy/kl": 0.5}, {"train/skipped": 1.0}, {"policy/kl": 2.0}]
    rows = [{"step": i + 1, "reward/mean": float(i), **kl} for i, kl in enumerate(kls)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    talk = [*user("q"), *assistant("aaaa")]
    samples = [
        {"step": step, "split": "train", "seed": 0, "messages": [*talk, *end]}
        for step, end in ((1, []), (2, user("longer observation")), (3, []))
    ]
    write_rows(tmp_path / "samples.jsonl", samples)
    gold = as_reward(lambda talks: [float(len(talk[-1]["content"])) for talk in talks])
    track = _read_track(tmp_path, gold)
    assert track == TrainingTrack([1, 2, 3], [0.5, 0.5, 2.0], [0.0, 1.0, 2.0], [4.0, 4.0, 4.0])


def test_what_cannot_be_meant_is_refused(policy_folder, tmp_path):
    tree = tree_of(policy_folder, tmp_path)
    with pytest.raises(UserError, match="either proxies"):
        configure("overoptimize", {**tree, "rewards": []})
    with pytest.raises(UserError, match=r"needs proxies\.members >= 2"):
        configure("overoptimize", {**tree, "rl": {"against": ["worst"]}})
    with pytest.raises(UserError, match="did you mean 'rloo'"):
        configure("overoptimize", {**tree, "rl": {"algorithm": "rlo"}})
    with pytest.raises(UserError, match="same score"):
        run_command(
            "overoptimize",
            {**tree, "rewards": [{"kind": "regex", "pattern": "x{99}"}], "rl": None},
        )


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"rl": {"training": {"num_step": 3}}}, "did you mean 'num_steps'"),
        ({"proxies": {"training": {"batch_siz": 3}}, "rewards": []}, "did you mean 'batch_size'"),
        (  # the KL of the curves would be unknown
            {"rl": {"algorithm": "dr_grpo", "training": {"num_steps": 3}}},
            "dr_grpo computes no KL .*rl.training.algorithm.kl_placement",
        ),
        (
            {"rl": {"training": {"algorithm": {"kl_placement": "none"}}}},
            "rloo computes no KL",
        ),
    ],
)
def test_keys_of_what_comes_later_are_checked_first(policy_folder, tmp_path, part, words):
    tree = tree_of(policy_folder, tmp_path)
    if "proxies" in part:
        grid = {"bases": [{"path": str(policy_folder)}], "data": [{"path": "x"}], "pairs": [30]}
        part = {**part, "proxies": {**grid, **part["proxies"]}}

    def plan(name, tree):
        return COMMANDS.plan(name, configure(name, tree))

    for act in (run_command, plan):
        with pytest.raises(UserError, match=words):
            act("overoptimize", {**tree, **part})


def test_more_pairs_than_there_are_is_refused(policy_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = {"bases": [{"path": str(policy_folder)}], "data": [{"path": str(path)}], "pairs": [30]}
    tree = tree_of(policy_folder, tmp_path, rewards=[], proxies=grid)
    with pytest.raises(UserError, match="needs 30 pairs, but only"):
        run_command("overoptimize", tree)


def test_several_proxies_give_the_mean_of_their_curves():
    rng = np.random.default_rng(0)
    proxies, gold = rng.normal(size=(3, 5, 16)), rng.normal(size=(5, 16))
    together = best_of_n_scores(proxies, gold, [1, 4])
    apart = [best_of_n_scores(proxy, gold, [1, 4]) for proxy in proxies]
    assert together == pytest.approx(sum(apart) / 3)


def test_ensembles_beat_single_proxies_whose_errors_are_their_own():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(40, 64))
    members = gold + 2 * rng.normal(size=(4, *gold.shape))
    ways = combined_proxy_scores(members, penalty=0.5)
    assert list(ways) == ["single", "mean", "worst", "uncertainty"]
    assert ways["worst"][0] == pytest.approx(members.min(0))
    assert ways["uncertainty"][0] == pytest.approx(members.mean(0) - 0.5 * members.var(0))
    last = {how: best_of_n_result(how, by, gold)["gold"][-1]["mean"] for how, by in ways.items()}
    assert last["mean"] > last["single"] + 0.3


def test_powers_of_two_end_at_the_limit():
    assert powers_of_two_and_limit(8) == [1, 2, 4, 8]
    assert powers_of_two_and_limit(12) == [1, 2, 4, 8, 12]


def test_moving_average_clips_the_window_at_the_ends():
    assert centered_moving_average([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]
    assert centered_moving_average([1.0, 2.0], 1) == [1.0, 2.0]


def test_two_seeds_give_curves_and_no_fit():
    track = TrainingTrack([1, 2, 3], [0.0, 1.0, 4.0], [0.0, 1.0, 2.0], [0.0, 1.0, 0.5])
    found = rl_result("single", [track, track], start=0.0)
    assert found["fit"] is None
    assert found["observed"]["step"] == 2
    assert found["observed"]["gold_after"]["mean"] == -0.5
    assert "inside" not in found["observed"]


@pytest.mark.parametrize("seeds", [3, 10])
def test_flat_gold_is_rarely_said_to_fall(seeds):
    print("seed", seeds)
    rng = np.random.default_rng(seeds)
    steps = list(range(1, 41))
    kl = [(5 * step / 40) ** 2 for step in steps]
    said = 0
    for _ in range(60):
        tracks = [
            TrainingTrack(steps, kl, steps, rng.normal(size=40).tolist()) for _seed in range(seeds)
        ]
        row = rl_result("single", tracks, start=0.0)
        results = {"algorithm": "rloo", "rl": [row], "best_of_n": []}
        said += "then fell" in " ".join(verdict_sentences({**results, "best_of_n": [NO_SAMPLES]}))
    assert said <= 3


@pytest.mark.parametrize("name", ["menu", "stories"])
def test_the_configurations_are_right(name):
    path = Path(__file__).parents[2] / "configs" / "overoptimize" / f"{name}.yaml"
    assert read_pipeline([path], [], COMMANDS).stages[-1]["command"] == "overoptimize"
