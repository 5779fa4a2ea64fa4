"""Implements `rlhf export`: write a trained model with its cards, and upload it."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.export import ExportConfig


def export(config: ExportConfig) -> Iterator[str]:
    """Export a model; yield its folder, the GGUF files, the ONNX result and the Hub address."""
    from rlhf.export import export_model

    result = export_model(config)
    yield str(result.folder)
    for file in result.gguf:
        yield str(file)
    if result.onnx is not None:
        yield result.onnx
    if result.url is not None:
        yield result.url
