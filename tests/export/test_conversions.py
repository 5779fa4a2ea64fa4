"""GGUF by a converter and a quantizer that the user names, and ONNX with a check of its logits."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.cli.main import main
from rlhf.config.export import ExportConfig, GGUFSpec
from rlhf.errors import UserError
from rlhf.export import export_model
from rlhf.export import onnx as onnx_export
from tests.export.conftest import Runs, export

HAS_ONNX = all(importlib.util.find_spec(n) for n in ("onnx", "onnxscript", "onnxruntime"))
CONVERTER = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("folder")
for name in ("outfile", "outtype", "model-name"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
assert (pathlib.Path(args.folder) / "config.json").exists()
pathlib.Path(args.outfile).write_text(f"{args.outtype} {args.model_name}")
"""
QUANTIZER = f"""#!{sys.executable}
import pathlib, sys
source, target, kind = sys.argv[1:]
pathlib.Path(target).write_text(f"{{kind}} of {{pathlib.Path(source).read_text()}}")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Programs that take the arguments of llama.cpp's and write what they were given."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (folder / "llama-quantize").write_text(QUANTIZER)
    (folder / "llama-quantize").chmod(0o755)
    return folder


def test_a_gguf_file_is_written_for_each_type(runs: Runs, checkout: Path, tmp_path: Path):
    spec = GGUFSpec(str(checkout), ["q8_0", "q4_k_m"], str(checkout / "llama-quantize"))
    result = export_model(ExportConfig(str(runs.sft), str(tmp_path / "out"), gguf=spec))
    assert [path.name for path in result.gguf] == ["out-q8_0.gguf", "out-q4_k_m.gguf"]
    assert result.gguf[0].read_text() == "q8_0 out"
    assert result.gguf[1].read_text() == "Q4_K_M of f32 out"
    assert not list((tmp_path / "out").glob(".*f32*"))


def test_an_existing_wide_file_is_quantized(runs: Runs, checkout: Path, tmp_path: Path):
    spec = GGUFSpec(
        str(checkout / "convert_hf_to_gguf.py"), ["f16", "q6_k"], str(checkout / "llama-quantize")
    )
    result = export_model(ExportConfig(str(runs.sft), str(tmp_path / "out"), gguf=spec))
    assert result.gguf[1].read_text() == "Q6_K of f16 out"


def test_a_missing_package_of_the_converter_names_the_extra(
    runs: Runs, checkout: Path, tmp_path: Path
):
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text("import a_package_that_does_not_exist")
    config = ExportConfig(str(runs.sft), str(tmp_path / "out"), gguf=GGUFSpec(str(script)))
    with pytest.raises(UserError, match=r'pip install "rlhf-kit\[gguf\]"'):
        export_model(config)


def test_a_failing_converter_is_one_line(runs: Runs, checkout: Path, tmp_path: Path):
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    config = ExportConfig(str(runs.sft), str(tmp_path / "out"), gguf=GGUFSpec(str(script)))
    with pytest.raises(UserError, match="pre-tokenizer was not recognized") as error:
        export_model(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


WRONG = {
    "a folder that does not exist": (["missing", "out"], "is not a folder"),
    "a folder without a model": (["empty", "out"], "contains neither a model"),
    "a folder of several runs": (["ROOT", "out"], "contains several runs: export one of them"),
    "no target": (["RUN"], "target"),
    "an invalid repository": (["RUN", "out", "--push", "name"], "push must be OWNER/NAME"),
    "public without push": (["RUN", "out", "--private", "false"], "no effect without push"),
    "a missing converter": (
        ["RUN", "out", "--gguf.converter", "missing"],
        "give the path of convert_hf_to_gguf.py",
    ),
    "a type that needs a quantizer": (
        ["RUN", "out", "--gguf.converter", "x", "--gguf.types", "[q4_k_m]"],
        "q4_k_m needs gguf.quantizer",
    ),
    "a quantizer without effect": (
        ["RUN", "out", "--gguf.converter", "x", "--gguf.quantizer", "y"],
        "gguf.quantizer has no effect",
    ),
    "an unknown type": (
        ["RUN", "out", "--gguf.converter", "x", "--gguf.types", "[q9]"],
        "gguf.types.0",
    ),
    "a repeated type": (
        ["RUN", "out", "--gguf.converter", "x", "--gguf.types", "[f16, f16]"],
        "each type must occur once",
    ),
    "a language that the Hub refuses": (
        ["RUN", "out", "--language", "[english]"],
        "language: 'english' is not a code of ISO 639",
    ),
    "a language that YAML reads as false": (
        ["RUN", "out", "--language", "[no]"],
        "must be a valid string, got False; YAML reads some texts as other values unless they are "
        'in quotes: "no"',
    ),
    "a language without brackets": (
        ["RUN", "out", "--language", "en"],
        "language must be a valid list, got 'en'; write a list in brackets: [A, B]",
    ),
    "a license in another notation": (
        ["RUN", "out", "--license", "Apache 2.0"],
        "license: 'Apache 2.0' is not a license as the Hugging Face Hub writes it, such as "
        "apache-2.0; did you mean 'apache-2.0'?",
    ),
    "a negative power": (["RUN", "out", "--power_watts", "-3"], "power_watts"),
    "ONNX of a reward model": (["REWARD", "out", "--onnx", "true"], "only language models"),
    "GGUF of a reward model": (
        ["REWARD", "out", "--gguf.converter", "CONVERTER"],
        "only language models",
    ),
    "an evaluation without results": (
        ["RUN", "out", "--evaluations", "[empty]"],
        "no summary.json with metrics",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_are_one_line(
    case: str,
    runs: Runs,
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if "ONNX" in case and not HAS_ONNX:
        pytest.skip("the extra onnx is not installed")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    words, message = WRONG[case]
    places = {
        "RUN": str(runs.sft),
        "ROOT": str(runs.root),
        "REWARD": str(runs.reward),
        "CONVERTER": str(checkout),
    }
    assert main(["export", *(places.get(word, word) for word in words)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert not captured.out
    assert not (tmp_path / "out").exists()
    assert not [name for name in os.listdir(tmp_path) if name.endswith("rlhf-part")]


def test_an_unfinished_run_names_its_checkpoints(runs: Runs, tmp_path: Path):
    import shutil

    shutil.copytree(runs.sft, tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft/final")
    for step in (9, 10):
        shutil.copytree(
            next(runs.sft.glob("checkpoints/step-*")), tmp_path / f"sft/checkpoints/step-{step}"
        )
    with pytest.raises(UserError, match=r"no final/.*export a checkpoint such as .*step-10$"):
        export(tmp_path / "sft", tmp_path / "out")
    shutil.rmtree(tmp_path / "sft/checkpoints")
    with pytest.raises(UserError, match="it is not finished, or its command trains no model"):
        export(tmp_path / "sft", tmp_path / "out")


@pytest.mark.skipif(not HAS_ONNX, reason="the extra onnx is not installed")
def test_onnx_has_the_logits_of_the_model(runs: Runs, tmp_path: Path):
    import onnxruntime

    config = ExportConfig(str(runs.sft), str(tmp_path / "out"), onnx=True)
    message = export_model(config).onnx
    assert message is not None
    assert message.startswith("model.onnx: its logits in onnxruntime differ by at most"), message
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"))
    ids = torch.randint(5, 80, (4, 23), generator=torch.Generator().manual_seed(0))
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    (logits,) = session.run(["logits"], feed)
    model = AutoModelForCausalLM.from_pretrained(runs.sft / "final").eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (torch.as_tensor(logits) - expected).abs().max() <= 1e-4


@pytest.mark.skipif(not HAS_ONNX, reason="the extra onnx is not installed")
@pytest.mark.parametrize(
    ("differences", "text"), [([1e-6, 0.25, 0.0], "2.5e-01"), ([1e-6, math.nan, 0.0], "nan")]
)
def test_onnx_with_other_logits_is_left_out(
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    differences: list[float],
    text: str,
):
    """One difference for each shape of the inputs, of which one is too large or nan."""
    assert len(differences) == len(onnx_export.INPUT_SHAPES)
    values = iter(differences)
    monkeypatch.setattr(
        onnx_export, "_write_onnx_file", lambda *given: given[-1].write_bytes(b"onnx")
    )
    monkeypatch.setattr(onnx_export, "_largest_logit_difference", lambda *given: next(values))
    words = ["export", str(runs.sft), str(tmp_path / "out"), "--onnx", "true"]
    assert main(words) == 0
    assert (
        f"ONNX was left out: its logits in onnxruntime differ by {text}" in capsys.readouterr().out
    )
    assert not list((tmp_path / "out").glob("*.onnx*"))


def test_a_failed_conversion_to_onnx_is_stated(exports, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **keys: object) -> None:
        raise RuntimeError("unsupported operator\nmore")

    monkeypatch.setattr(onnx_export, "_write_onnx_file", fail)
    message = onnx_export.write_onnx(exports["sft"])
    assert not list(exports["sft"].glob("*.onnx*"))
    assert message.endswith("the conversion failed: unsupported operator")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "rlhf-kit\[onnx\]"'):
        onnx_export.check_packages()
