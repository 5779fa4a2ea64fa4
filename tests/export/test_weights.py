"""Plain Transformers loads every export, with the logits of the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf.errors import UserError
from rlhf.reward_models import build
from tests.export.conftest import Runs, export
from tests.helpers.training import save_model, tensors_of

IDS = torch.tensor([[5, 17, 80, 9, 30, 61], [7, 8, 9, 100, 11, 12]])
MERGED_TOLERANCE = 1e-5


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["sft", "merged"])
def test_unmerged_weights_are_bit_identical(name: str, runs: Runs, exports: dict[str, Path]):
    final = getattr(runs, name) / "final"
    expected = logits_of(AutoModelForCausalLM.from_pretrained(final))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(exports[name])), expected)
    before, after = tensors_of(final), tensors_of(exports[name])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["lora", "chain"])
def test_merged_adapters_have_the_logits_of_peft(name: str, runs: Runs, exports: dict[str, Path]):
    adapted = AutoPeftModelForCausalLM.from_pretrained(getattr(runs, name) / "final")
    expected = logits_of(adapted)
    found = logits_of(AutoModelForCausalLM.from_pretrained(exports[name]))
    gap = (found - expected).abs().max() / expected.abs().max()
    assert gap <= MERGED_TOLERANCE
    assert not (exports[name] / "adapter_config.json").exists()


def test_ppo_is_exported_without_its_value_head(runs: Runs, exports: dict[str, Path]):
    assert (runs.ppo / "final" / "value_head.safetensors").exists()
    assert not (exports["ppo"] / "value_head.safetensors").exists()
    model, info = AutoModelForCausalLM.from_pretrained(exports["ppo"], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = logits_of(AutoModelForCausalLM.from_pretrained(runs.ppo / "final"))
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("name", ["sft", "lora", "chain", "merged", "ppo"])
def test_tokenizer_template_and_generation_config(name: str, runs: Runs, exports: dict[str, Path]):
    talk = [{"role": "user", "content": "Repeat: apple"}]
    texts = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            talk, tokenize=False, add_generation_prompt=True
        )
        for folder in (getattr(runs, name) / "final", exports[name])
    ]
    assert texts[0] == texts[1]
    settings = GenerationConfig.from_pretrained(exports[name])
    tokenizer: Any = AutoTokenizer.from_pretrained(exports[name])
    assert settings.eos_token_id == tokenizer.eos_token_id
    assert settings.pad_token_id == tokenizer.pad_token_id


def test_reward_models_score_alike(runs: Runs, exports: dict[str, Path]):
    talk = [
        {"role": "user", "content": "Repeat: apple"},
        {"role": "assistant", "content": "apple"},
    ]
    before, after = (
        build({"kind": "trained", "path": str(folder)})([talk])
        for folder in (runs.reward / "final", exports["reward"])
    )
    assert before == after
    found = AutoModelForSequenceClassification.from_pretrained(exports["reward"])
    expected = AutoModelForSequenceClassification.from_pretrained(runs.reward / "final")
    assert torch.equal(logits_of(found), logits_of(expected))


def test_a_checkpoint_is_exported_with_the_record_of_its_run(runs: Runs, tmp_path: Path):
    (checkpoint, *_) = sorted((runs.lora / "checkpoints").glob("step-*"), reverse=True)
    folder = export(checkpoint, tmp_path / "early")
    expected = logits_of(AutoPeftModelForCausalLM.from_pretrained(checkpoint))
    found = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    assert (found - expected).abs().max() <= MERGED_TOLERANCE * expected.abs().max()
    assert "rlhf dpo" in (folder / "README.md").read_text()


def test_a_model_without_a_run_has_cards(tmp_path: Path):
    base = save_model(tmp_path / "model")
    folder = export(base, tmp_path / "export")
    assert "no record of a training run" in (folder / "README.md").read_text()
    assert (folder / "generation_config.json").exists()


def test_a_generation_config_is_added(tmp_path: Path):
    base = save_model(tmp_path / "model")
    (base / "generation_config.json").unlink()
    folder = export(base, tmp_path / "export")
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (
        settings["eos_token_id"] == json.loads((base / "config.json").read_text())["eos_token_id"]
    )


def test_no_file_of_an_export_contains_a_local_path(runs: Runs, exports: dict[str, Path]):
    for folder in exports.values():
        for path in folder.rglob("*"):
            if path.suffix not in (".safetensors",) and path.is_file():
                text = path.read_text(encoding="utf-8")
                for private in ("secret-folder", "users with spaces", str(Path.home()), "pytest-"):
                    assert private not in text, path


def test_a_damaged_file_is_refused(runs: Runs, tmp_path: Path):
    shutil.copytree(runs.sft, tmp_path / "copy")
    weights = tmp_path / "copy/final/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        export(tmp_path / "copy", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_export_is_replaced_only_on_request(runs: Runs, tmp_path: Path):
    folder = export(runs.sft, tmp_path / "export")
    before = (folder / "README.md").stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        export(runs.sft, folder)
    assert (folder / "README.md").stat().st_mtime_ns == before
    export(runs.lora, folder, overwrite=True)
    assert "LoRA adapters" in (folder / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("notes")
    with pytest.raises(UserError, match="is not an export"):
        export(runs.sft, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "notes"
