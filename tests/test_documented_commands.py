"""Every command and configuration in README, CONTRIBUTING and docs is accepted.

`rlhf` commands run with `--print-config` appended, which reads and checks all arguments and files
and then stops: the models and data that they name need not exist. Of commands of other programs the
modules, paths and extras must exist. Python blocks of docs are executed by the tests of each page.
"""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("rlhf", "python", "python3", "pip", "pytest", "sh", "xargs", "pre-commit", "bash")


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    pairs = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [content for language, content in pairs if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Command lines of a page, split into arguments, without comments."""
    lines = "".join(blocks(page, "", "bash", "console")).splitlines()
    parts = [part for line in lines for part in line.removeprefix("$ ").split(" && ")]
    split = [shlex.split(part, comments=True) for part in parts if part.startswith(PROGRAMS)]
    return [arguments for arguments in split if arguments[0] in PROGRAMS]


def cases(*programs: str) -> list[Any]:
    return [
        pytest.param(page, arguments, id=f"{page.name}: {shlex.join(arguments)}")
        for page in PAGES
        for arguments in commands(page)
        if arguments[0] in programs
    ]


def command_of(config: dict[str, Any]) -> str:
    """The command that a complete configuration of the documentation is for."""
    by_key = {
        "stages": "run",
        "kind": "reward",
        "policies": "evaluate",
        "trials": "tune",
        "environments": "bench",
        "proxies": "overoptimize",
        "env": "ppo",
    }
    return next((command for key, command in by_key.items() if key in config), "sft")


def complete_configs(page: Path) -> list[dict[str, Any]]:
    """Configurations of a page that name an output directory."""
    texts = [text for text in blocks(page, "yaml") if re.search("^output_dir:", text, re.MULTILINE)]
    return [yaml.safe_load(text) for text in texts]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's configurations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs" / "tune-laptop").mkdir(parents=True)
    (tmp_path / "runs" / "tune-laptop" / "tuned.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "arguments"), cases("rlhf"))
def test_an_rlhf_command_is_accepted(page, arguments, folder, capsys):
    if "--config" in arguments and not arguments[arguments.index("--config") + 1].startswith(
        "runs"
    ):
        name = arguments[arguments.index("--config") + 1]
        (folder / name).write_text(yaml.safe_dump(complete_configs(page)[0]))
    assert main([*arguments[1:], "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "config"),
    [
        pytest.param(page, config, id=f"{page.name}: {config['output_dir']}")
        for page in PAGES
        for config in complete_configs(page)
    ],
)
def test_a_configuration_is_accepted(page, config, folder, capsys):
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = command_of(config)
    positional = "config" in COMMANDS[command].arguments
    given = ["config.yaml"] if positional else ["--config", "config.yaml"]
    assert main([command, *given, "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "arguments"), cases("python", "python3", "pip", "pytest", "pre-commit", "bash")
)
def test_a_command_of_another_program_names_what_exists(page, arguments):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    if "-m" in arguments[:2]:
        assert importlib.util.find_spec(arguments[2]) is not None
    for argument in arguments[1:]:
        if match := re.fullmatch(r"\.\[(.*)\]", argument):
            assert set(match.group(1).split(",")) <= extras
        elif argument.startswith(("tests/", "constraints", ".ci/")):
            assert (ROOT / argument).exists()


def test_the_python_example_of_the_readme_is_accepted(folder, monkeypatch, capsys):
    (folder / "ppo.yaml").write_text(yaml.safe_dump(complete_configs(ROOT / "README.md")[0]))

    def check_stage(command: str, config: str, **overrides: Any) -> None:
        flags = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
        assert main([command, "--config", config, *flags, "--print-config"]) == 0

    class Result:
        def to_markdown(self) -> str:
            return "the comparison"

    monkeypatch.setattr(rlhf, "stage", check_stage)
    monkeypatch.setattr(rlhf, "compare", lambda *runs: Result())
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "the comparison" in capsys.readouterr().out


def test_commands_are_found():
    found = [shlex.join(arguments[:2]) for page in PAGES for arguments in commands(page)]
    expected = {"rlhf ppo", "rlhf bench", "rlhf data", "rlhf reward-report", "rlhf compare"}
    assert expected <= set(found)
