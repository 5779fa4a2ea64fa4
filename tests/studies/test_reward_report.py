"""`rlhf reward-report` from configuration to files: pairs, benchmarks, refusals."""

import json

import pytest

from rlhf.cli.table import configure, run_command
from rlhf.common.files import write_jsonl
from rlhf.errors import UserError


def pairs_file(path, n=40):
    write_jsonl(
        path,
        [
            {
                "prompt": f"Question number {i}?",
                "chosen": "good " * (i % 7 + 2) + f"{i}",
                "rejected": "bad " * (i % 5 + 1) + f"{i}",
            }
            for i in range(n)
        ],
    )
    return [{"path": str(path)}]


def summary(run, name):
    return json.loads((run / "evaluation" / name / "summary.json").read_text())


def test_report_on_pairs_of_a_sum_of_rules(tmp_path):
    tree = {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"kind": "regex", "pattern": "good"}, {"kind": "repetition", "weight": 0.1}],
        "data": pairs_file(tmp_path / "pairs.jsonl"),
        "stress_size": 10,
    }
    run = run_command("reward-report", tree)
    report = summary(run, "pairs")
    assert report["reward"] == "regex + repetition"
    assert report["accuracy"]["value"] == 1.0
    assert report["accuracy"]["low"] < 0.95  # 40 certain wins leave some doubt
    assert set(report["stress"]) >= {"truncated", "shuffled_prompt"}
    assert (run / "evaluation" / "pairs" / "report.md").read_text().startswith("# Reward report")
    assert "Reward models" in (run / "report.html").read_text()


def test_benchmark_report(tmp_path):
    row = {"prompt": "q", "chosen": ["sure"], "rejected": ["no", "no!", "never"], "subset": "Math"}
    write_jsonl(
        tmp_path / "bench.jsonl", [row, {**row, "chosen": ["no"], "rejected": ["sure"] * 3}]
    )
    tree = {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"kind": "regex", "pattern": "sure"}],
        "benchmark": "rewardbench2",
        "path": str(tmp_path / "bench.jsonl"),
    }
    run = run_command("reward-report", tree)
    found = summary(run, "rewardbench2")
    assert found["rows"] == 2
    assert found["benchmark"]["subsets"] == {"Math": 0.5}
    assert (
        "| subsets / Math | 0.500 [0.002, 0.998] | 1 |"
        in (run / "evaluation" / "rewardbench2" / "report.md").read_text()
    )
    tree |= {"benchmark": "judgebench", "output_dir": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"judgebench: a row has no column 'label'"):
        run_command("reward-report", tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": "x", "rewards": [{"kind": "length"}]}, "either --reward FOLDER or --rewards"),
        ({"data": []}, "nothing to evaluate the reward on"),
        ({"benchmark": "rmbench"}, "or neither"),
        ({"gold": [{"kind": "length"}]}, "no effect without a policy"),
        ({"save": True}, "give --reward FOLDER"),
        (
            {
                "save": True,
                "reward": "model",
                "rewards": [],
                "data": [],
                "benchmark": "rewardbench2",
                "path": "bench.jsonl",
            },
            "fitted on pairs; give data",
        ),
        ({"samples": 1}, "samples must be >= 2"),
    ],
)
def test_contradictory_settings_are_refused(tmp_path, change, words):
    tree = {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"kind": "length"}],
        "data": [{"path": "pairs.jsonl"}],
    }
    with pytest.raises(UserError, match=words):
        configure("reward-report", {**tree, **change})


def test_policy_spread_and_best_of_n(tmp_path, policy_folder):
    tree = {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"kind": "length", "low": 20, "unit": "characters"}],
        "data": pairs_file(tmp_path / "pairs.jsonl"),
        "policy": {"path": str(policy_folder)},
        "gold": [{"kind": "length", "low": 20, "unit": "characters", "name": "truth"}],
        "rollout": {"max_new_tokens": 6},
        "prompts": 6,
        "samples": 8,
        "stress_size": 0,
    }
    run = run_command("reward-report", tree)
    report = summary(run, "pairs")
    assert (report["policy"]["prompts"], report["policy"]["replies"]) == (6, 48)
    gold = [point["mean"] for point in report["best_of_n"]["gold"]]
    assert gold == sorted(gold)  # chosen by gold itself: it can only rise
    assert gold[0] == pytest.approx(report["policy"]["mean"])
    assert any(line.startswith("Choosing the best of 8") for line in report["verdict"])
    assert len((run / "prompts.jsonl").read_text().splitlines()) == 6
