"""Cells that run in a real kernel of Jupyter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def executed(folder: Path, *cells: str) -> list[list[Any]]:
    """Run cells in order in a kernel whose working directory is a folder; return their outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    preamble = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    notebook.cells.insert(0, preamble)
    context = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=context).execute()
    return [cell.outputs for cell in notebook.cells[1:]]
