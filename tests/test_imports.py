"""What imports what: one order of packages without circles, nothing heavy before it is needed."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rlhf

ROOT = Path(rlhf.__file__).resolve().parent
HEAVY = ("torch", "transformers", "trl", "datasets", "peft")
LEAVES = ("rlhf.envs", "rlhf.reward_models")

FORBIDDEN = {
    "rlhf.envs": (*HEAVY, "rlhf.reward_models"),
    "rlhf.reward_models": (*HEAVY, "rlhf.envs"),
    "rlhf.stats": (*HEAVY, *LEAVES, "pandas", "sklearn", "scipy.stats"),
    "rlhf": (*HEAVY, *LEAVES),
    "rlhf.algorithms.registry": (*HEAVY, *LEAVES),
    "rlhf.cli.main": (*HEAVY, *LEAVES),
    "rlhf.cli.table": (*HEAVY, *LEAVES),
    "rlhf.plugins": (*HEAVY, *LEAVES),
    "rlhf.config.load": (*HEAVY, *LEAVES),
    "rlhf.config.online": HEAVY,
    "rlhf.config.offline": HEAVY,
    "rlhf.config.reward": HEAVY,
    "rlhf.config.evaluate": HEAVY,
}

# Packages and top-level modules from the bottom to the top: each imports only those before it.
ORDER = (
    "errors",
    "common",
    "stats",
    "algorithms",
    "runs",
    "config",
    "envs",
    "reward_models",
    "data",
    "models",
    "rollout",
    "evaluation",
    "reports",
    "web",
    "labeling",
    "export",
    "training",
    "chat",
    "explain",
    "serving",
    "commands",
    "studies",
    "pipeline",
    "cli",
    "plugins",
    "api",
    "__init__",
    "__main__",
)
# What the packages that work without the rest of the toolkit may import.
ALLOWED = {
    "stats": {"errors", "common"},
    "algorithms": {"errors", "common"},
    "envs": {"errors", "common", "stats"},
    "reward_models": {"errors", "common", "stats"},
}
OBJECT_NAME = re.compile(r"^(rlhf(?:\.\w+)+):\w+$")


def modules() -> dict[str, Path]:
    """Every module of the toolkit with its file."""
    names = {}
    for folder, _, files in os.walk(ROOT, followlinks=True):  # envs and reward_models are links
        for file in files:
            path = Path(folder) / file
            if path.suffix == ".py":
                parts = path.relative_to(ROOT.parent).with_suffix("").parts
                names[".".join(parts).removesuffix(".__init__")] = path
    return names


MODULES = modules()


def imports_of(path: Path) -> Iterator[str]:
    """Modules that a file imports or names as ``module:name``, also under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                # `from rlhf import __version__` reads an attribute, which needs no other module.
                if inner in MODULES or node.module != "rlhf":
                    yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Constant):
            yield from OBJECT_NAME.findall(str(node.value))


GRAPH = {
    name: {target for target in imports_of(path) if target in MODULES and target != name}
    for name, path in MODULES.items()
}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_package_has_a_place_in_the_order():
    assert {package_of(module) for module in MODULES} == set(ORDER)


def test_at_most_six_modules_outside_packages():
    assert len(list(ROOT.glob("*.py"))) <= 6


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_only_downwards(package: str):
    allowed = ALLOWED.get(package, set(ORDER[: ORDER.index(package)])) | {package}
    wrong = {
        module: sorted(targets)
        for module in MODULES
        if package_of(module) == package
        and (targets := {t for t in GRAPH[module] if package_of(t) not in allowed})
    }
    assert wrong == {}


def test_no_module_imports_itself_through_others():
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError with the circle


def test_the_graph_sees_local_imports_and_object_names():
    assert "rlhf.studies.bench.run" in GRAPH["rlhf.cli.table"]
    assert "rlhf.reports" in GRAPH["rlhf.commands.command"]


def test_imports_for_types_only_count(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text("if TYPE_CHECKING:\n    from rlhf.stats import Interval\n")
    assert list(imports_of(file)) == ["rlhf.stats"]


def run_python(code: str, folder: Path, path: Path = ROOT.parent) -> str:
    """Output of a fresh interpreter in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("module", FORBIDDEN)
def test_an_import_loads_nothing_forbidden(module: str, tmp_path: Path):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_python(code, tmp_path))
    assert module in loaded
    assert [name for name in FORBIDDEN[module] if name in loaded] == []


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["envs", "--help"], ["data", "-h"]])
def test_help_loads_nothing_heavy(words: list[str], tmp_path: Path):
    code = (
        "import sys, json; from rlhf.cli.main import main\n"
        f"assert main({words}) == 0\n"
        "print(); print(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(run_python(code, tmp_path).splitlines()[-1])
    assert [name for name in (*HEAVY, *LEAVES) if name in loaded] == []


# Commands that load environments, rewards, data and models.
COMMANDS = [
    ["envs", "list", "--json"],
    ["envs", "check", "text/Echo-v0"],
    ["envs", "demos", "text/Echo-v0", "--path", "demos.jsonl", "--count", "2"],
    ["score", "--rewards", "[{kind: length}]", "--input", "demos.jsonl"],
    ["data", "check", "demos.jsonl"],
    ["evaluate", "--config", "evaluate.yaml"],
    ["report", "run"],
    ["compare", "run"],
    ["algorithms"],
    ["models", "list"],
]
EVALUATE = """\
output_dir: run
policies: [{name: random}, {name: expert}]
env: {id: text/Echo-v0}
rewards: [{kind: length}]
episodes: 2
"""


@pytest.mark.parametrize("source", ["checkout", "wheel"])
def test_no_command_loads_foreign_packages_of_the_same_name(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
):
    """Users have folders `envs` and `reward_models` of their own in the working directory."""
    for name in ("envs", "reward_models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('foreign package')\n")
    (tmp_path / "evaluate.yaml").write_text(EVALUATE)
    path = ROOT.parent if source == "checkout" else request.getfixturevalue("wheel")
    code = (
        "import sys, json, os; sys.path.insert(0, os.getcwd())\n"
        "from rlhf.cli.main import main\n"
        f"codes = [main(words) for words in {COMMANDS}]\n"
        "import rlhf.envs\n"
        "print(); print(json.dumps([rlhf.envs.__file__, codes, sorted(sys.modules)]))"
    )
    file, codes, loaded = json.loads(run_python(code, tmp_path, path).splitlines()[-1])
    assert Path(file).is_relative_to(path)
    assert codes == [0] * len(COMMANDS)
    tops = {name.partition(".")[0] for name in loaded}
    assert tops & {"envs", "reward_models"} == set()
    assert {"rlhf.envs.echo", "rlhf.reward_models.rules"} <= set(loaded)
