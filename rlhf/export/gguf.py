"""Convert an export to GGUF files with llama.cpp's converter and quantizer.

The converter `convert_hf_to_gguf.py` is a script of the llama.cpp repository. It is on no package
index, so the user names its path.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rlhf.common.files import expand_user, remove
from rlhf.config.export import CONVERTED_TYPES, GGUFSpec
from rlhf.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"


def check_programs_exist(spec: GGUFSpec) -> None:
    """Check that the programs of llama.cpp exist.

    Raises:
        UserError: The converter or the quantizer is missing.
    """
    _converter_path(spec)
    if spec.quantizer is not None and not expand_user(spec.quantizer).is_file():
        raise UserError(
            f"gguf.quantizer: {spec.quantizer} does not exist: give the path of llama-quantize, "
            "which llama.cpp builds"
        )


def write_gguf(folder: Path, name: str, spec: GGUFSpec) -> list[Path]:
    """Convert the model in a folder; return the files, which are in the same folder.

    Args:
        folder: Folder of a language model.
        name: Name of the model, with which the names of the files begin.
        spec: Programs and types.

    Raises:
        UserError: A program is missing or fails, for example because it does not support the
            architecture or the tokenizer of the model.
    """
    converter = _converter_path(spec)
    files = {kind: folder / f"{name}-{kind}.gguf" for kind in spec.types}
    for kind in (kind for kind in spec.types if kind in CONVERTED_TYPES):
        _run_converter(converter, folder, files[kind], kind, name)
    quantized = [kind for kind in spec.types if kind not in CONVERTED_TYPES]
    if quantized:
        source = next((files[kind] for kind in ("f32", "bf16", "f16") if kind in files), None)
        temporary = source is None
        if source is None:
            source = folder / f".{name}-f32.gguf"
            _run_converter(converter, folder, source, "f32", name)
        try:
            for kind in quantized:
                quantizer = str(expand_user(str(spec.quantizer)))
                command = [quantizer, str(source), str(files[kind]), kind.upper()]
                _run_and_check_output(command, files[kind], "gguf.quantizer")
        finally:
            if temporary:
                remove(source)
    return list(files.values())


def _run_converter(converter: Path, folder: Path, target: Path, kind: str, name: str) -> None:
    """Write a GGUF file of type ``kind`` for a model folder; see `_run_and_check_output`."""
    command = [sys.executable, str(converter), str(folder), "--outfile", str(target)]
    _run_and_check_output(
        [*command, "--outtype", kind, f"--model-name={name}"], target, "gguf.converter"
    )


def _converter_path(spec: GGUFSpec) -> Path:
    """Return the path of the converter.

    Raises:
        UserError: The converter does not exist.
    """
    path = expand_user(spec.converter)
    script = path / CONVERTER if path.is_dir() else path
    if not script.is_file():
        raise UserError(
            f"gguf.converter: {script} does not exist: give the path of {CONVERTER} in a checkout "
            "of https://github.com/ggml-org/llama.cpp"
        )
    return script


def _run_and_check_output(command: list[str], target: Path, key: str) -> None:
    """Run a program that writes a file.

    Raises:
        UserError: The program cannot be started, fails, or writes no file.
    """
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="backslashreplace", check=False
        )
    except OSError as error:
        raise UserError(f"{key}: {command[0]} cannot be started ({error.strerror})") from error
    if result.returncode or not target.is_file():
        remove(target)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {result.returncode}"
        if reason.startswith("ModuleNotFoundError"):
            reason += '; install the packages of the converter: pip install "rlhf-kit[gguf]"'
        raise UserError(f"{key}: {target.name} cannot be written: {reason}")
