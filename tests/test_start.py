"""`rlhf init` and `rlhf doctor`: a project from an installed package, and what a machine has."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf.cli.main import main
from rlhf.commands.init import TEMPLATES
from rlhf.models.precision import default_device


def run(words: list[str], folder: Path, path: Path, **variables: str) -> str:
    """Run a program in a folder with an installed package; return its standard output."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_of_a_template_are_complete_and_valid(template, tmp_path, capsys):
    assert main(["init", template, str(tmp_path / "mine")]) == 0
    output = capsys.readouterr().out
    written = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert {str(path) for path in written} == set(output.splitlines()[:-1])
    assert "start with: cd" in output
    for path in written:
        text = path.read_text()
        assert text.endswith("\n")
        assert max(map(len, text.splitlines())) <= 121
        if path.suffix == ".py":
            compile(text, str(path), "exec")
        if path.suffix == ".yaml":
            assert yaml.safe_load(text)
    for name in re.findall(r"`([\w./]+\.(?:py|yaml))`", (tmp_path / "mine/README.md").read_text()):
        assert (tmp_path / "mine" / name).exists()
    assert main(["init", template, str(tmp_path / "mine")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_first_command_can_be_pasted_also_with_a_space_in_the_folder(tmp_path, capsys):
    assert main(["init", "python", str(tmp_path / "für uns")]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("start with: ")
    assert shlex.split(command)[:3] == ["cd", str(tmp_path / "für uns"), "&&"]


def test_a_project_without_runs_has_no_report(tmp_path, capsys):
    assert main(["init", "project", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert "contains no runs; its pipeline.yaml writes them to runs/project" in (
        capsys.readouterr().err
    )


def test_an_unknown_template_is_named(capsys):
    assert main(["init", "projekt"]) == 2
    assert "did you mean 'project'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_project_from_a_wheel_in_an_empty_folder(tmp_path, wheel):
    """The whole pipeline with fewer steps; the environment, reward and algorithm are plug-ins."""
    run(["-m", "rlhf", "init"], tmp_path, wheel)
    check = ["envs", "check", "project/Colors-v0", "--plugins", "plugins/environment.py"]
    run(["-m", "rlhf", *check], tmp_path, wheel)
    options = [
        "--online.num_steps",
        "2",
        "--online.evaluation.every",
        "1",
        "--sft.trainer.max_steps",
        "20",
    ]
    output = run(["-m", "rlhf", "run", "pipeline.yaml", *options], tmp_path, wheel)
    assert (tmp_path / output.strip()).exists()
    done = subprocess.run(
        [sys.executable, "gate.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr  # two steps are not enough
    assert "the policy is not good enough" in done.stdout


@pytest.mark.sweep
@pytest.mark.parametrize("seed", [0, 1])
def test_the_project_learns_and_passes_its_gate(tmp_path, seed):
    root = Path(__file__).resolve().parents[1]
    run(["-m", "rlhf", "init"], tmp_path, root)
    run(["-m", "rlhf", "run", "pipeline.yaml", "--seed", str(seed)], tmp_path, root)
    assert "success" in run(["gate.py"], tmp_path, root)


@pytest.mark.sweep
def test_the_python_template_learns(tmp_path):
    root = Path(__file__).resolve().parents[1]
    run(["-m", "rlhf", "init", "python"], tmp_path, root)
    output = run(["train.py"], tmp_path, root, RLHF_CACHE=str(tmp_path / "cache"))
    scores = [float(value) for value in re.findall(r"score (\S+)", output)]
    assert len(scores) == 3
    assert scores[-1] > 0.8


def test_the_doctor_states_what_is_chosen_and_missing(capsys, echo_model, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no sbatch
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["doctor", "--json", "--model.path", str(echo_model)]) == 0
    report = json.loads(capsys.readouterr().out)
    chosen = report["automatic settings"]
    assert chosen["device"].startswith(str(default_device()))
    assert chosen["dtype"] == "torch.float32"
    assert chosen["threads"] == str(torch.get_num_threads())
    assert chosen["decoder"] == "FusedDecoder"
    assert chosen["attention"] == "packed, packed sequences"
    assert report["versions and hardware"]["torch"] == torch.__version__
    features = report["features"]
    assert features["--launcher slurm"] == "missing: sbatch is not on PATH"
    assert "HF_HUB_OFFLINE" in features["models of the Hugging Face Hub"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from rlhf.commands.doctor import _feature_availability

    assert _feature_availability()["rlhf tune"] == 'missing: pip install "rlhf-kit[tuning]"'


def test_the_extras_of_the_doctor_exist():
    import tomllib

    from rlhf.commands.doctor import OPTIONAL_PACKAGES

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {extra for _, extra in OPTIONAL_PACKAGES.values()} <= set(
        project["optional-dependencies"]
    )


def test_the_gpu_of_apple_is_chosen_and_marked_untested(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device() == torch.device("mps")
