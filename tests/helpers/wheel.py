"""The installed files of a wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import rlhf


def build_and_install_wheel(folder: Path) -> Path:
    """Build a wheel from this checkout; return the folder of its installed files."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    source = copy_of_sources(folder / "source")
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def copy_of_sources(target: Path) -> Path:
    """Copy what a wheel is built from, so that the build leaves nothing in the checkout."""
    home = Path(rlhf.__file__).resolve().parents[1]
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("rlhf", "envs", "reward_models"):
        shutil.copytree(home / name, target / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(home / name, target / name)
    return target
