"""Every command, configuration and Python block in README, CONTRIBUTING and docs is executed.

`rlhf` commands run with `--print-config` appended, which reads and checks all arguments and files
and then stops: the models and data that they name need not exist. Of commands of other programs the
modules, paths and extras must exist. The Python blocks of a page run in one process, in order, and
must print what their comments say.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import rlhf
from rlhf.api.inputs import to_training_config
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.common.files import read_jsonl
from tests.helpers.documentation import blocks, promised
from tests.helpers.hub_server import HubServer
from tests.helpers.training import offline_tree, save_model, sft_rows, write_rows
from tests.reward_models.conftest import save_decoder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").rglob("*.md")) - set((ROOT / "docs" / "tutorials").glob("*.md"))),
]
"""Pages; `test_tutorials.py` runs the tutorials."""
PROGRAMS = ("rlhf", "python", "python3", "pip", "pytest", "sh", "xargs", "pre-commit", "bash")


def commands(page: Path) -> list[list[str]]:
    """Command lines of a page, split into arguments, without comments."""
    lines = "".join(blocks(page, "", "bash", "console")).splitlines()
    parts = [part for line in lines for part in line.removeprefix("$ ").split(" && ")]
    split = [shlex.split(part, comments=True) for part in parts if part.startswith(PROGRAMS)]
    return [arguments for arguments in split if arguments[0] in PROGRAMS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_its_title(page):
    assert page.read_text(encoding="utf-8").startswith("# ")


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
        "grid": "sweep",
        "environments": "bench",
        "proxies": "overoptimize",
        "algorithm": "grpo",
        "env": "ppo",
    }
    return next((command for key, command in by_key.items() if key in config), "sft")


def fragments(page: Path) -> Iterator[dict[str, Any]]:
    """Parts of configurations of a page; a repeated key begins an alternative."""
    for text in blocks(page, "yaml"):
        if not re.search("^output_dir:", text, re.MULTILINE):
            parts = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
            keys = [part.partition(":")[0] for part in parts]
            alternatives = parts if len(set(keys)) < len(keys) else [text]
            yield from map(yaml.safe_load, alternatives)


def completed(fragment: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the keys of a fragment."""
    required: dict[str, Any] = {"output_dir": "runs/new", "model": {"path": "model"}}
    if "algorithm" in fragment:
        required["env"] = {"id": "text/Echo-v0"}
    elif "proxies" not in fragment:
        required["data"] = [{"path": "rows.jsonl"}]
    return required | fragment


def complete_configs(page: Path) -> list[dict[str, Any]]:
    """Configurations of a page that name an output directory."""
    texts = [text for text in blocks(page, "yaml") if re.search("^output_dir:", text, re.MULTILINE)]
    return [yaml.safe_load(text) for text in texts]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's configurations."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
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


def accept(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = command_of(config)
    positional = "config" in COMMANDS[command].arguments
    given = ["config.yaml"] if positional else ["--config", "config.yaml"]
    assert main([command, *given, "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "config"),
    [
        pytest.param(page, config, id=f"{page.name}: {config['output_dir']}")
        for page in PAGES
        for config in complete_configs(page)
    ],
)
def test_a_configuration_is_accepted(page, config, folder, capsys):
    accept(config, folder, capsys)


@pytest.mark.parametrize(
    "fragment",
    [
        pytest.param(completed(fragment), id=f"{page.name}: {', '.join(fragment)}")
        for page in PAGES
        for fragment in fragments(page)
    ],
)
def test_a_part_of_a_configuration_is_accepted(fragment, folder, capsys):
    accept(fragment, folder, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_of_the_repository_exist(page):
    folders = r"rlhf|envs|reward_models|tests|benchmarks|configs|examples|docs|\.ci|\.github"
    paths = re.findall(rf"`((?:{folders})/[^` ]*)`", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not any(ROOT.glob(path))] == []


def test_the_code_layout_names_every_package():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = ("envs", "reward_models")  # the layout names the folders at the top level
    packages = {file.parent.name for file in (ROOT / "rlhf").glob("*/__init__.py")} - {*links}
    assert {name for name in packages if f"`rlhf/{name}`" not in text} == set()


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

    def check_ppo(config: str, **options: Any) -> Any:
        COMMANDS.read_config("ppo", [config, to_training_config(options)], [])
        policy = SimpleNamespace(generate=lambda prompt: "a reply")
        return SimpleNamespace(metrics={"reward/mean": 0.5}, policy=policy)

    result = SimpleNamespace(to_markdown=lambda: "the comparison")
    monkeypatch.setattr(rlhf, "ppo", check_ppo)
    monkeypatch.setattr(rlhf, "compare", lambda *runs: result)
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "the comparison" in capsys.readouterr().out


def prepare_rewards(folder: Path) -> None:
    save_decoder(folder / "runs" / "reward" / "final")


def prepare_lifecycle(folder: Path) -> None:
    """A run with adapters, moved as a whole."""
    model = save_model(folder / "model")
    data = write_rows(folder / "rows.jsonl", sft_rows(8))
    config = offline_tree(folder / "run", model, data)
    config["model"]["lora"] = {"rank": 2}
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    assert main(["sft", "--config", str(folder / "sft.yaml")]) == 0
    (folder / "run").rename(folder / "moved")


def prepare_export(folder: Path) -> None:
    """A finished run of SFT."""
    model = save_model(folder / "model")
    data = write_rows(folder / "rows.jsonl", sft_rows(8))
    (folder / "sft.yaml").write_text(yaml.safe_dump(offline_tree(folder / "runs/sft", model, data)))
    assert main(["sft", "--config", str(folder / "sft.yaml")]) == 0


PREPARE = {
    "rewards.md": prepare_rewards,
    "explain.md": prepare_rewards,
    "lifecycle.md": prepare_lifecycle,
    "export.md": prepare_export,
}
SERVERS = {"coming-from-trl.md": HubServer}
"""Page -> server that its Python blocks use instead of one in the Internet."""


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "README.md" and blocks(page, "python")],
    ids=lambda page: page.name,
)
def test_python_blocks_of_a_page_run_and_print_what_they_say(page, tmp_path):
    PREPARE.get(page.name, lambda folder: None)(tmp_path)
    code = "\n".join(blocks(page, "python"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        if page.name in SERVERS:
            environment |= stack.enter_context(SERVERS[page.name]()).environment
        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr[-3000:]
    printed = process.stdout.splitlines()
    for line in promised(code):
        start = line.removesuffix(" ...")
        matches = (text == line if start == line else text.startswith(start) for text in printed)
        assert any(matches), (line, printed)


def test_the_ten_habits_of_a_trl_user_are_short_snippets():
    page = ROOT / "docs" / "coming-from-trl.md"
    habits = re.findall(r"^## \d+\. (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(habits) == 10
    snippets = blocks(page, "python")
    assert len(snippets) == 1 + len(habits)
    assert [code for code in snippets if len(code.splitlines()) > 15] == []


def test_promises_are_found():
    numbers = {page.name: len(promised("\n".join(blocks(page, "python")))) for page in PAGES}
    assert numbers["data.md"] == 11
    assert numbers["rewards.md"] >= 5
    assert numbers["statistics.md"] == 7


def test_the_talkative_demonstrations_are_those_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "overoptimization.md", "python")
    exec(compile(code, "docs/overoptimization.md", "exec"), {})
    kept = ROOT / "configs" / "overoptimize" / "talkative.jsonl.gz"
    assert read_jsonl(tmp_path / "talkative.jsonl.gz") == read_jsonl(kept)


def test_commands_are_found():
    found = [shlex.join(arguments[:2]) for page in PAGES for arguments in commands(page)]
    expected = {"rlhf ppo", "rlhf bench", "rlhf data", "rlhf reward-report", "rlhf compare"}
    assert expected <= set(found)
