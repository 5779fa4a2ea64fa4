"""What an import pulls in: leaves know nobody, and nothing heavy comes before it is needed."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "trl", "datasets", "peft")

FORBIDDEN = {
    "rlhf.envs": (*HEAVY, "envs", "rlhf.reward_models"),
    "rlhf.reward_models": (*HEAVY, "reward_models", "rlhf.envs"),
    "rlhf.stats": (*HEAVY, "rlhf.envs", "rlhf.reward_models", "pandas", "sklearn", "scipy.stats"),
    "rlhf": (*HEAVY, "rlhf.envs", "rlhf.reward_models"),
    "rlhf.algorithms.registry": (*HEAVY, "rlhf.envs", "rlhf.reward_models"),
    "rlhf.config.load": (*HEAVY, "rlhf.envs", "rlhf.reward_models"),
    "rlhf.cli.main": (*HEAVY, "rlhf.envs", "rlhf.reward_models"),
    "rlhf.cli.table": (*HEAVY, "rlhf.envs", "rlhf.reward_models"),
    "rlhf.config.online": HEAVY,
    "rlhf.config.offline": HEAVY,
    "rlhf.config.reward": HEAVY,
    "rlhf.config.evaluate": HEAVY,
}

# Inside rlhf a module may import its own layer and those before it.
LAYERS = ("stats", "algorithms", "data", "models", "rollout", "evaluation", "training", "studies")
LEAVES = {"stats": (), "algorithms": (), "data": ("stats",)}


def run_python(code: str) -> str:
    """Output of a fresh interpreter in the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("module", FORBIDDEN)
def test_an_import_pulls_in_nothing_forbidden(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_python(code))
    assert module in loaded
    assert [name for name in FORBIDDEN[module] if name in loaded] == []


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; began = time.process_time()\n"
        "from rlhf.cli.main import main; assert main(['--help']) == 0\n"
        "print('SECONDS', time.process_time() - began)\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    output = run_python(code)
    assert "usage: rlhf COMMAND" in output
    assert "HEAVY []" in output
    # Processor time, so that a busy machine does not fail the test.
    assert float(output.split("SECONDS ")[1].split()[0]) < 0.5


def test_help_answers_within_half_a_second_of_processor_time():
    began = time.process_time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: rlhf COMMAND" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint(HEAVY)
    assert time.process_time() - began < 0.5  # this process only waited


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere but under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_downwards(layer):
    allowed = LEAVES.get(layer, LAYERS[: LAYERS.index(layer)])
    above = {f"rlhf.{name}" for name in LAYERS if name != layer and name not in allowed}
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in (ROOT / "rlhf" / layer).rglob("*.py")
        if (
            bad := {
                m for m in imports_of(path) if any((m + ".").startswith(a + ".") for a in above)
            }
        )
    }
    assert wrong == {}


@pytest.mark.parametrize("package", ["envs", "reward_models"])
def test_leaves_name_nobody_else(package):
    """But for `rlhf.stats`: a reward report and an evaluation make their intervals in one way."""
    allowed = (f"rlhf.{package}.", "rlhf.errors.", "rlhf.common.", "rlhf.stats.")
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in (ROOT / package).rglob("*.py")
        if (
            bad := {
                m
                for m in imports_of(path)
                if m.partition(".")[0] == "rlhf" and not (m + ".").startswith(allowed)
            }
        )
    }
    assert wrong == {}
