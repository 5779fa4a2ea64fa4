"""Arguments of the command line, and what its help prints."""

import re
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main


def help_values(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Key -> value as the help of a command prints them."""
    assert main([*arguments, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(
        match.groups() for line in lines if (match := re.match(r"  --(\S+) \S+ = (.*)", line))
    )


def config_file(path: Path, tree: dict) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def arguments(tree, prefix=""):
    """A tree as command-line options."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += arguments(value, f"{prefix}{key}.")
        else:
            text = str(value).replace("'", '"') if isinstance(value, list | dict) else str(value)
            found += [f"--{prefix}{key}", text]
    return found
