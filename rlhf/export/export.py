"""Export a trained model: weights, cards, and optionally GGUF, ONNX and an upload to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.common.files import atomic_path, expand_user
from rlhf.config.export import ExportConfig
from rlhf.errors import UserError
from rlhf.export import gguf, onnx
from rlhf.export.cards.data_card import DATA_CARD_FILE, make_data_card
from rlhf.export.cards.model_card import MODEL_CARD_FILE, CardContent, make_model_card
from rlhf.export.cards.results import read_evaluations
from rlhf.export.hub import push_folder, validate_cards
from rlhf.export.source import ModelSource, find_model_source
from rlhf.export.weights import is_causal_model, write_model_folder
from rlhf.runs.checksums import check_folder_is_unchanged, write_file_list
from rlhf.runs.claim import (
    check_output_path,
    path_without_dot_dot,
    working_or_home_directory_within,
)

MARKER_FILE = ".rlhf-export"
"""File in the folder of every export. A folder without this file is never replaced."""


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    """Folder with the model and the cards."""
    gguf: tuple[Path, ...] = ()
    """GGUF files."""
    onnx: str | None = None
    """Message on the conversion to ONNX; None if it was not requested."""
    url: str | None = None
    """Address of the repository on the Hub, if the export was uploaded."""


def export_model(config: ExportConfig) -> Export:
    """Export a model, and upload it if the configuration has a repository.

    The folder is written completely before it replaces an earlier export, so that an error before
    the upload leaves the earlier export unchanged.

    Raises:
        UserError: The source is not a model, the target exists, a program or a package is missing,
            a conversion fails, or the Hub refuses the cards or the upload.
    """
    source = find_model_source(config.source)
    target = path_without_dot_dot(expand_user(config.target))
    _check_encoding_is_known(source)
    evaluations = read_evaluations(config.evaluations)
    check_output_path(target, option="target")
    _check_inputs_are_kept(target, source, config)
    _check_target_is_new_or_replaceable(target, overwrite=config.overwrite)
    if config.gguf is not None:
        gguf.check_programs_exist(config.gguf)
    if config.onnx:
        onnx.check_packages()
    recorded = list(source.last_run.record.evaluations) if source.last_run else []
    with atomic_path(target.resolve()) as partial:  # a link to an earlier export is kept
        write_model_folder(source.folder, partial)
        _check_converted_model_is_causal(partial, config)
        content = CardContent(target.name, source, partial, [*recorded, *evaluations], config)
        cards = [
            make_model_card(content),
            make_data_card(target.name, source.stages, language=config.language),
        ]
        for card, name in zip(cards, (MODEL_CARD_FILE, DATA_CARD_FILE), strict=True):
            card.save(partial / name)
        if config.validate or config.push is not None:
            validate_cards(cards)
        files = gguf.write_gguf(partial, target.name, config.gguf) if config.gguf else []
        result = onnx.write_onnx(partial) if config.onnx else None
        write_file_list(partial, MARKER_FILE, runs=[stage.name for stage in source.stages])
    url = None
    if config.push is not None:
        url = push_folder(target, config.push, private=config.private)
    return Export(target, tuple(target / file.name for file in files), result, url)


def _check_encoding_is_known(source: ModelSource) -> None:
    """Check that a reward model of a recorded run has reward_model.json, which checkpoints lack.

    Raises:
        UserError: The file is missing, so users of the exported model could encode texts wrongly.
    """
    run = source.last_run
    if run is not None and run.command == "reward" and source.sidecar is None:
        raise UserError(
            f"{source.folder} is a checkpoint of a reward model without reward_model.json, which "
            f"states how texts are encoded: export the final model, {run.record.directory}"
        )


def _check_target_is_new_or_replaceable(target: Path, *, overwrite: bool) -> None:
    """Check that the target does not exist, or is an unchanged export that may be replaced.

    Raises:
        UserError: The target exists and may not be replaced, or cannot be created.
    """
    if not target.exists():
        above = next(folder for folder in target.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"{target}: {above} is a file: choose another folder")
        return
    if not overwrite:
        raise UserError(f"{target} exists already: choose another folder, or set overwrite")
    if place := working_or_home_directory_within(target):
        raise UserError(
            f"{target} is not replaced, because it is or contains the {place}: choose another "
            "folder"
        )
    check_folder_is_unchanged(target, MARKER_FILE, "an export")


def _check_inputs_are_kept(target: Path, source: ModelSource, config: ExportConfig) -> None:
    """Check that the export does not replace or change a file or folder that it reads.

    Raises:
        UserError: The target is an input, contains one, or is in the folder of the model.
    """
    programs = [config.gguf.converter, config.gguf.quantizer] if config.gguf else []
    given = [path for path in (*config.evaluations, *programs) if path is not None]
    written = target.resolve()
    for path in (*source.local_inputs, *map(expand_user, given)):
        if path.resolve().is_relative_to(written):
            raise UserError(
                f"{target} would replace {path}, which the model or the export needs: choose "
                "another folder"
            )
    if written.is_relative_to(source.folder.resolve()):
        raise UserError(
            f"{target} is in the folder of the model, {source.folder}: choose another folder"
        )


def _check_converted_model_is_causal(folder: Path, config: ExportConfig) -> None:
    """Check that a model that is to be converted is a language model.

    Raises:
        UserError: The configuration has `gguf` or `onnx`, and the model is a reward model.
    """
    if is_causal_model(folder):
        return
    for key in ("gguf", "onnx"):
        if getattr(config, key):
            raise UserError(
                f"{key}: only language models are converted, and {config.source} is a reward model"
            )
