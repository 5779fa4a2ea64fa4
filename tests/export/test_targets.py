"""An export does not replace or change what it reads, and damaged files have one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.export.source import find_model_source
from rlhf.runs.inputs import fingerprint
from tests.export.conftest import LORA, export, short
from tests.helpers.training import offline_tree, save_model, sft_rows, write_rows


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(source: Path, target: Path, **keys: object) -> str:
    with pytest.raises(UserError) as error:
        export(source, target, overwrite=True, **keys)
    return str(error.value)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """An earlier export, which may be replaced."""
    return export(save_model(tmp_path / "model"), tmp_path / "earlier")


def save_adapter(base: Path, folder: Path) -> Path:
    """An adapter that names its base model by its path."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder)
    return folder


def test_an_export_does_not_replace_its_source(earlier: Path):
    nested = earlier / "runs" / "other"
    shutil.copytree(earlier.parent / "model", nested)
    before = files_of(earlier)
    for source in (earlier, nested):
        assert "would replace" in refusal(source, earlier)
    assert files_of(earlier) == before


def test_an_export_does_not_replace_the_base_of_an_adapter(earlier: Path, tmp_path: Path):
    adapter, before = save_adapter(earlier, tmp_path / "adapter"), files_of(earlier)
    assert f"would replace {earlier}" in refusal(adapter, earlier)
    assert files_of(earlier) == before


def test_an_export_does_not_replace_evaluations_or_programs(earlier: Path, tmp_path: Path):
    folder = earlier / "evaluation"
    folder.mkdir()
    summary = {"env": "x", "metrics": {"score": {"value": 1.0}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "would replace" in refusal(tmp_path / "model", earlier, evaluations=[str(folder)])
    assert folder.is_dir()


def test_an_export_is_not_written_into_the_folder_of_its_model(tmp_path: Path):
    model = save_model(tmp_path / "model")
    before = files_of(model)
    assert "is in the folder of the model" in refusal(model, model / "export")
    assert files_of(model) == before


def test_targets_that_cannot_be_written(tmp_path: Path):
    model = save_model(tmp_path / "model")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert "is a file" in refusal(model, tmp_path / "file" / "a" / "b")
    assert "is a symbolic link" in refusal(model, tmp_path / "link")
    assert "no null character" in refusal(model, Path("a\0b"))


def test_an_unknown_home_directory_is_part_of_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"~nobody.* is not a folder"):
        export(Path("~nobody-has-this-name/model"), tmp_path / "x")


def test_a_file_is_not_suggested_as_the_source(tmp_path: Path):
    (tmp_path / "final").mkdir()
    (tmp_path / "finel").write_text("a file")
    with pytest.raises(UserError, match=r"finel is not a folder; did you mean 'final'\?"):
        find_model_source(str(tmp_path / "finel"))


@pytest.mark.parametrize("change", ["added", "added link", "edited card", "without a list"])
def test_an_export_does_not_replace_files_of_the_user(change: str, earlier: Path, tmp_path: Path):
    files: dict[str, Any] = {
        "added": lambda: (earlier / "notes.txt").write_text("mine"),
        "added link": lambda: (earlier / "data").symlink_to(tmp_path),
        "edited card": lambda: (earlier / "README.md").write_text("mine"),
        "without a list": lambda: (earlier / ".rlhf-export").write_text('{"runs": []}'),
    }
    files[change]()
    before = files_of(earlier)
    assert "is not replaced" in refusal(tmp_path / "model", earlier)
    assert files_of(earlier) == before


def test_an_unchanged_export_is_replaced_also_through_a_link(earlier: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(earlier)
    (earlier / "README.md").unlink()  # a missing file is no loss
    export(tmp_path / "model", tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (earlier / "README.md").is_file()


@pytest.mark.parametrize("target", [".", "..", "../earlier"])
def test_an_export_does_not_replace_the_working_directory(
    target: str, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (earlier / "below").mkdir()
    monkeypatch.chdir(earlier / "below" if target == ".." else earlier)
    before = files_of(earlier)
    assert "contains the working directory" in refusal(tmp_path / "model", Path(target))
    assert files_of(earlier) == before


def test_earlier_runs_with_adapters_are_found_after_a_move(tmp_path: Path):
    runs, moved = tmp_path / "runs", tmp_path / "moved"
    base, rows = save_model(runs / "base"), write_rows(runs / "rows.jsonl", sft_rows(24))
    for name, start in (("first", base), ("second", runs / "first" / "final")):
        tree = short(offline_tree(runs / name, start, rows))
        run_command("sft", tree | {"model": {"path": str(start), "lora": LORA}})
    before = fingerprint(runs / "first" / "final")
    runs.rename(moved)
    assert fingerprint(moved / "first" / "final") == before
    card = (export(moved / "second", tmp_path / "export") / "README.md").read_text()
    assert "| first | rlhf sft |" in card
    assert "| second | rlhf sft | the result of first |" in card


@pytest.mark.parametrize("content", ["", '{"peft_type": ', "[1]", "{}"])
def test_a_damaged_adapter_is_named(content: str, tmp_path: Path):
    adapter = save_adapter(save_model(tmp_path / "model"), tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refusal(adapter, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("content", ["", '{"a": ', "[1]"])
def test_a_damaged_tokenizer_configuration_is_named(content: str, tmp_path: Path):
    model = save_model(tmp_path / "model")
    (model / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json" in refusal(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()
