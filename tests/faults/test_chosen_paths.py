"""Commands that write to a path that the user chose do not replace the user's files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.commands.engine import _check_folder_is_replaceable
from rlhf.common.files import describe_write_error, expand_user
from rlhf.errors import UserError
from rlhf.labeling.pseudonyms import pseudonym_of
from rlhf.models.loading import merge_adapter
from rlhf.runs.checksums import write_file_list
from rlhf.runs.claim import check_output_path, working_or_home_directory_within
from tests.evaluation.fake_pipeline import write_pipeline
from tests.faults.process import drop_capabilities, rlhf
from tests.helpers.bench import write_manifest
from tests.helpers.training import label_rows, write_rows


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a command that must end with one line and the exit code 2; return the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if line.startswith("rlhf: ")]
    return line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [str(write_pipeline(root / f"seed{seed}", seed=seed)) for seed in (0, 1)]


def test_a_comparison_page_replaces_only_a_page(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = write_rows(tmp_path / "rows.jsonl", label_rows(4))
    before = data.read_bytes()
    assert "is not a page" in refused(["report", *runs, "--output", str(data)], capsys)
    assert data.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [data]
    page = tmp_path / "page.html"
    for _ in range(2):
        assert main(["report", *runs, "--output", str(page)]) == 0


def test_tables_replace_only_tables(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["compare", *runs, "--tables", str(tmp_path / "tables")]
    for _ in range(2):
        assert main(command) == 0
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    for name in names:
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        line = refused(["compare", *runs, "--tables", str(folder)], capsys)
        assert "is not a table" in line or "tables.json" in line
        assert (folder / name).read_text() == "mine"
        assert len(list(folder.iterdir())) == 1


def test_a_job_array_replaces_no_file_with_other_content(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    manifest = write_manifest(tmp_path / "b")
    own = manifest.rename(manifest.with_name("manifest.yaml"))
    before = own.read_bytes()
    command = ["bench", str(own), "--array"]
    assert "exists with other content" in refused([*command, str(own.parent)], capsys)
    assert own.read_bytes() == before
    assert [path.name for path in own.parent.iterdir()] == ["manifest.yaml"]
    for _ in range(2):
        assert main([*command, str(tmp_path / "array")]) == 0


def test_the_model_of_servers_replaces_only_such_a_model(tmp_path: Path):
    model = tmp_path / "model"
    _check_folder_is_replaceable(model)
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a model that"):
        _check_folder_is_replaceable(model)
    write_file_list(model, ".rlhf-engine")
    _check_folder_is_replaceable(model)
    (model / "config.json").write_text("[]")
    with pytest.raises(UserError, match="was added or changed"):
        _check_folder_is_replaceable(model)


def test_a_merge_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def save(adapter: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space")

    monkeypatch.setattr("rlhf.models.loading.save_merged_model", save)
    with pytest.raises(OSError, match="no space"):
        merge_adapter("adapter", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_several_processes_create_one_key(tmp_path: Path):
    code = "import sys; from rlhf.labeling.pseudonyms import *; print(pseudonym_of(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, "ann", str(tmp_path / "key")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = {process.communicate()[0].strip() for process in processes}
    assert names == {pseudonym_of("ann", tmp_path / "key")}
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_is_created_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def link(*_: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr("os.link", link)
    name = pseudonym_of("ann", tmp_path / "key")
    assert pseudonym_of("ann", tmp_path / "key") == name
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_an_output_directory_is_no_folder_with_the_name_of_a_tilde(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ann")
    with pytest.raises(UserError, match="output_dir: write /home/ann/runs/a instead of ~/runs/a"):
        check_output_path(Path("~/runs/a"))
    check_output_path(Path("~nobody-has-this-name/a"))


def test_a_home_directory_that_is_unknown_is_no_error(monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise KeyError("no entry")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert expand_user("~/x") == Path("~/x")
    assert expand_user("~nobody-has-this-name") == Path("~nobody-has-this-name")
    assert working_or_home_directory_within(Path("/")) == "working directory"


@pytest.mark.parametrize("key", ["model", "data", "plugins", "output_dir"])
def test_a_null_character_is_one_line(key: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    trees: dict[str, Callable[[], object]] = {
        "model": lambda: {"path": "a\0b"},
        "data": lambda: [{"path": "a\0b.jsonl"}],
        "plugins": lambda: ["a\0b.py"],
        "output_dir": lambda: "a\0b",
    }
    tree = {"output_dir": str(tmp_path / "run"), "data": [{"path": "none.jsonl"}]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree | {key: trees[key]()}))
    refused(["sft", "--config", str(path)], capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_a_project_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("folder", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / ".github").write_text("mine")
    (tmp_path / "linked" / "pipeline.yaml").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    for name, reason in (
        ("file", "is not a folder"),
        ("link", "is not a folder"),
        ("folder", "is not a folder"),
        ("linked", "exists already"),
    ):
        assert reason in refused(["init", "project", str(tmp_path / name)], capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_dry_run_refuses_an_output_directory_that_cannot_be_written(place: str, tmp_path: Path):
    """A dry run promises that the run will start."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir(mode=0o555)
    config = tmp_path / "evaluate.json"
    tree = {"policies": [{"name": "random"}], "env": {"id": "text/Echo-v0"}}
    config.write_text(json.dumps(tree | {"output_dir": str(tmp_path / place / "runs/run")}))

    code, errors = rlhf("evaluate", "--config", str(config), "--dry-run", fault=drop_capabilities)

    words = {"file": f"{tmp_path / 'file'} is a file", "folder": "permission denied"}
    assert code == 2
    assert words[place] in errors
    assert len(errors.splitlines()) == 1
    assert not list((tmp_path / "folder").iterdir())


def test_a_working_directory_that_was_deleted_is_one_line(tmp_path: Path):
    def delete_working_directory() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    config = tmp_path / "evaluate.json"
    tree = {"policies": [{"name": "random"}], "env": {"id": "text/Echo-v0"}, "output_dir": "run"}
    config.write_text(json.dumps(tree))
    for option in ("--dry-run", "--resume"):
        words = ("evaluate", "--config", str(config), option)
        code, errors = rlhf(*words, fault=delete_working_directory)
        assert code == 2
        assert errors == "rlhf: the working directory was deleted: change to another folder\n"


@pytest.mark.parametrize("name", [".replaced", ".rlhf", ".lock/run", ".old.rlhf-part/run"])
def test_a_run_is_not_written_where_another_run_would_delete_it(name: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.rlhf").write_text("{}")
    with pytest.raises(UserError, match="choose another --output_dir"):
        check_output_path(tmp_path / "run" / name)


@pytest.mark.parametrize(
    ("free", "words"), [(0, "no free inodes; remove files"), (9, "disk is full; free space")]
)
def test_a_file_system_without_inodes_is_not_called_full(
    free: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    status = SimpleNamespace(f_files=10, f_favail=free)
    monkeypatch.setattr("os.statvfs", lambda path: status)
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "new/file"))
    assert words in describe_write_error(error)
