"""A run directory of version 0.1.0 is read by this version: report, compare, evaluate and --config.

`tests/golden/run-0.1.0` was written by `rlhf ppo` of 0.1.0 (two steps on text/Echo-v0, a model from
scratch); its checkpoints and its page are left out.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.evaluation.records import read_run

GOLDEN = Path(__file__).parent / "golden" / "run-0.1.0"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A copy of the old run, which may be written into."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "run-0.1.0"))


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard output of a command that must succeed."""
    capsys.readouterr()
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_old_record_is_read_under_current_names(old_run: Path):
    run = read_run(old_run)
    assert run.config["command"] == "ppo"
    assert "verb" not in run.config
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert {row["split"] for row in run.samples} == {"before", "train", "after"}
    returns = {
        row["split"]: {"score", "return", "return_trained"} & row.keys() for row in run.samples
    }
    assert returns == {"before": {"score"}, "train": {"return_trained"}, "after": {"score"}}
    (evaluation,) = run.evaluations
    assert [row["return"] for row in evaluation.episodes] == [0.0] * 4
    assert [row["length_limited"] for row in evaluation.episodes] == [1] * 4
    assert not any("cut" in row for row in evaluation.episodes)


def test_old_run_has_a_report_and_a_comparison(capsys, old_run: Path):
    page = Path(output(capsys, "report", str(old_run)).strip())
    assert page == old_run / "report.html"
    assert "run-0.1.0" in page.read_text()
    result = json.loads(output(capsys, "compare", str(old_run), "--metric", "return", "--json"))
    assert "run-0.1.0" in json.dumps(result)


def test_old_configuration_is_taken_by_its_command(capsys, tmp_path: Path):
    config = str(GOLDEN / "config.yaml")
    arguments = ("ppo", "--config", config, "--output_dir", str(tmp_path / "new"))
    shown = yaml.safe_load(output(capsys, *arguments, "--print-config"))
    assert shown["command"] == "ppo"
    assert shown["num_steps"] == 2
    assert 2.0 in shown["algorithm"].values()  # the cap of the importance weights that was set
    assert main(["dpo", "--config", config]) == 2
    assert "is for `rlhf ppo`, not for `rlhf dpo`" in capsys.readouterr().err


def test_old_key_in_a_users_configuration_is_refused_with_its_new_name(capsys, tmp_path: Path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("output_dir: x\nstages: [{name: sft, verb: sft}]\n")
    assert main(["run", str(path)]) == 2
    assert "stages.0.verb was renamed to stages.0.command" in capsys.readouterr().err


OLD_SPELLING = {
    "rewards": [{"kind": "length", "normalise": {"mean": 1, "std": 2}}],
    "gold": [{"kind": "length", "normalise": {"mean": 3, "std": 4}}],
    "shaping": {"scale": "normalise"},
}


def test_old_spelling_in_a_record_is_read_in_the_new_one(old_run: Path):
    path = old_run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | OLD_SPELLING))
    (old_run / "metrics.jsonl").write_text('{"step": 1, "profile/flop_utilisation": 0.5}\n')
    run = read_run(old_run)
    assert {key: run.config[key] for key in OLD_SPELLING} == {
        "rewards": [{"kind": "length", "normalize": {"mean": 1, "std": 2}}],
        "gold": [{"kind": "length", "normalize": {"mean": 3, "std": 4}}],
        "shaping": {"scale": "normalize"},
    }
    assert run.metrics == [{"step": 1, "profile/flop_utilization": 0.5}]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rewards", "rewards.0.normalise was renamed to rewards.0.normalize"),
        ("gold", "gold.0.normalise was renamed to gold.0.normalize"),
        ("shaping", "shaping.scale: normalise was renamed to normalize"),
    ],
)
def test_old_spelling_in_a_users_configuration_is_refused(capsys, tmp_path: Path, key, message):
    path = tmp_path / "ppo.yaml"
    tree = {"output_dir": "x", "model": {"path": "m"}, "env": {"id": "text/Echo-v0"}}
    path.write_text(yaml.safe_dump(tree | {key: OLD_SPELLING[key]}))
    assert main(["ppo", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_old_spelling_in_the_parts_of_a_gated_reward_is_read_and_refused(capsys, tmp_path: Path):
    part = {"kind": "length", "normalise": {"mean": 1, "std": 2}}
    gate = {"kind": "gate", "reward": {"kind": "gate", "reward": part, "condition": part}}
    gate["condition"] = part
    config = {"env": {"id": "text/Echo-v0"}, "model": {"path": "m"}, "rewards": [gate]}
    record, new = tmp_path / "config.yaml", str(tmp_path / "new")
    record.write_text(yaml.safe_dump({"verb": "ppo", **config}))
    arguments = ("ppo", "--config", str(record), "--output_dir", new, "--print-config")
    (shown,) = yaml.safe_load(output(capsys, *arguments))["rewards"]
    expected = {"kind": "length", "normalize": {"mean": 1, "std": 2}}
    assert shown["condition"] == expected
    assert shown["reward"]["reward"] == shown["reward"]["condition"] == expected
    record.write_text(yaml.safe_dump(config))
    assert main(list(arguments)) == 2
    message = "rewards.0.condition.normalise was renamed to rewards.0.condition.normalize"
    assert message in capsys.readouterr().err


def test_old_run_is_not_continued_and_the_message_names_its_version(capsys, old_run: Path):
    config = str(old_run / "config.yaml")
    checkpoint = old_run / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    commands = [
        ["ppo", "--config", config, "--output_dir", str(old_run), "--resume"],
        ["branch", str(checkpoint), str(old_run.parent / "new")],
    ]
    for command in commands:
        assert main(command) == 2
        assert f"{old_run} is a run of version 0.1.0" in capsys.readouterr().err
    assert yaml.safe_load(Path(config).read_text())["verb"] == "ppo"


def test_old_model_is_evaluated(capsys, tmp_path: Path):
    arguments = {
        "output_dir": str(tmp_path / "evaluation"),
        "policies": [{"name": "old", "model": {"path": str(GOLDEN / "final")}}],
        "env": {"id": "text/Echo-v0"},
        "rollout": {"max_new_tokens": 4},
        "episodes": 4,
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(arguments))
    output(capsys, "evaluate", "--config", str(path))
    rows = (tmp_path / "evaluation/evaluation/old/episodes.jsonl").read_text().splitlines()
    assert len(rows) == 4


DAMAGE = [
    ("metrics.jsonl", "step", None, "no step"),
    ("metrics.jsonl", "step", "x", "step is not an integer"),
    ("samples.jsonl", "split", [1], "split is not a text"),
    ("samples.jsonl", "seed", None, "no seed"),
    ("samples.jsonl", "seed", 1e400, "seed is not an integer"),
    ("samples.jsonl", "messages", [1], "messages is not a list of messages"),
    ("evaluation/run-0.1.0/episodes.jsonl", "env", None, "no env"),
    ("evaluation/run-0.1.0/episodes.jsonl", "seed", "x", "seed is not an integer"),
    ("evaluation/run-0.1.0/episodes.jsonl", "sample", {"a": 1}, "sample is not an integer"),
    ("evaluation/run-0.1.0/episodes.jsonl", "components", True, "components is not an object"),
    ("evaluation/run-0.1.0/episodes.jsonl", "messages", "x", "messages is not a list"),
    ("evaluation/run-0.1.0/summary.json", "metrics", {"a": 1}, "metrics is not an object"),
    ("evaluation/run-0.1.0/summary.json", "episodes", "x", "episodes is not an integer"),
    ("environment.json", "versions", None, "no versions"),
]


@pytest.mark.parametrize(("file", "key", "value", "reason"), DAMAGE)
def test_a_damaged_row_is_named_by_file_and_line(capsys, old_run: Path, file, key, value, reason):
    path = old_run / file
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    lines[0] = json.dumps(json.loads(lines[0]) | {key: value})
    path.write_text("\n".join(lines) + "\n")
    where = f"{path}, line 1" if path.suffix == ".jsonl" else str(path)
    assert main(["report", str(old_run)]) == 2
    error = capsys.readouterr().err
    assert f"rlhf: {where}: {reason}" in error
    assert "Traceback" not in error
