"""The package metadata agrees with the code: dependencies, version, citation."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

import rlhf

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PRODUCT = ("rlhf", "envs", "reward_models")

# Distributions whose module has another name.
MODULES = {
    "ipython": "IPython",
    "pyyaml": "yaml",
    "scikit_learn": "sklearn",
    "vadersentiment": "vaderSentiment",
}
# Functions that import the module they are given, such as `rlhf.envs.adapters.import_from_extra`.
IMPORTERS = ("importlib.import_module", "import_module", "import_from_extra")
# Needed by transformers at run time; see the comment in pyproject.toml.
INDIRECT = {"gguf"}
# Extras of people who change the toolkit; the others are features of it.
DEVELOPMENT_EXTRAS = {"benchmarks", "docs", "test", "dev"}
# Needed at run time by torch (TensorBoard, ONNX), by Jupyter, and by llama.cpp's converter.
INDIRECT_OPTIONAL = {"tensorboard", "onnx", "onnxscript", "ipykernel", "sentencepiece"}


def module_of(requirement: str) -> str:
    """Name of the module that a requirement such as ``pyyaml>=6`` installs."""
    name = re.match(r"[\w.-]+", requirement).group().lower().replace("-", "_")
    return MODULES.get(name, name)


def imported_modules() -> set[str]:
    """Third-party top-level modules that the product imports, also by ``import_module``."""
    names = set()
    for path in (path for package in PRODUCT for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in IMPORTERS
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                names.add(node.args[0].value)
    return {name.partition(".")[0] for name in names} - set(PRODUCT) - sys.stdlib_module_names


REQUIRED = {module_of(line) for line in PROJECT["dependencies"]}
OPTIONAL = {
    module_of(line) for lines in PROJECT["optional-dependencies"].values() for line in lines
}


def test_every_import_is_declared():
    assert imported_modules() - REQUIRED - OPTIONAL == set()


def test_every_required_dependency_is_imported():
    assert REQUIRED - imported_modules() == INDIRECT


def test_every_dependency_of_a_feature_is_imported():
    extras = PROJECT["optional-dependencies"]
    declared = {
        module_of(line) for name in extras.keys() - DEVELOPMENT_EXTRAS for line in extras[name]
    }
    assert declared - imported_modules() - {"rlhf_kit"} == INDIRECT_OPTIONAL


def test_every_lint_exception_matches_a_file():
    patterns = PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]
    assert [pattern for pattern in patterns if not any(ROOT.glob(pattern))] == []


def test_required_dependencies_are_imported_without_an_extra():
    assert not REQUIRED & OPTIONAL


def test_constraints_pin_every_declared_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {module_of(line) for line in lines}
    unpinned = {"mlflow", "trackio", "wandb", "rlhf_kit"}  # trackers that .ci/run does not install
    assert REQUIRED | OPTIONAL - unpinned <= pinned


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rlhf.__version__
    assert citation["license"] == PROJECT["license"]
    assert "version" in PROJECT["dynamic"]


def test_workflows_run_the_oldest_and_newest_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yaml").read_text())
    oldest, newest = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={oldest}"
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"]]
    versions = [name for name in classifiers if re.fullmatch(r"3\.\d+", name)]
    assert (versions[0], versions[-1]) == (oldest, newest)
