"""The examples run in a fresh directory and do what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.notebook import executed

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def run(arguments: list[str], folder: Path) -> str:
    """Standard output of a Python process that can import the package and the examples."""
    path = os.pathsep.join([str(ROOT), str(EXAMPLES)])
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_has_at_most_100_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 100


def test_ppo_from_scratch_learns(tmp_path):
    output = run([str(EXAMPLES / "ppo_from_scratch.py")], tmp_path)
    returns = [float(value) for value in re.findall(r"mean return (\S+)", output)]
    assert len(returns) == 20
    assert sum(returns[-5:]) > 2 * sum(returns[:5])


@pytest.mark.parametrize("name", ["custom_reward", "custom_environment", "custom_algorithm"])
def test_an_example_trains_and_writes_a_report(name, tmp_path):
    output = run([str(EXAMPLES / f"{name}.py")], tmp_path)
    assert f"report: runs/{name}/report.html" in output
    assert (tmp_path / "runs" / name / "report.html").exists()
    assert "check:" not in output  # findings of the environment check
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 5


def test_dpo_on_own_data_writes_completions_of_both_models(tmp_path):
    output = run([str(EXAMPLES / "dpo_on_own_data.py")], tmp_path)
    assert "sft " in output
    assert "dpo " in output


def test_the_notebook_runs_in_a_kernel_and_compares_both_policies(tmp_path):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    outputs = executed(tmp_path, *code)
    shown = [str(output.get("data", {}).get("text/html")) for cell in outputs for output in cell]
    assert any("reward/mean" in html and "data:image/svg+xml" in html for html in shown)
    assert any("ppo - sft" in html for html in shown)
    assert (tmp_path / "runs" / "ppo" / "report.html").exists()


def test_every_example_is_run():
    executed = set(re.findall(r"\b(\w+)\.py\"|\"(custom_\w+)\"", Path(__file__).read_text()))
    assert {path.stem for path in SCRIPTS} == {name for pair in executed for name in pair if name}
