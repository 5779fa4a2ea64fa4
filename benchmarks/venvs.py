"""Create virtual environments for sides with incompatible packages, and store them in the cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

from benchmarks.paths import work_directory
from rlhf.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Packages of one virtual environment.

    Args:
        packages: requirements with versions.
        shared: packages whose versions are the same as in the current environment.
        note: description for the log and for error messages.
    """

    packages: tuple[str, ...]
    shared: tuple[str, ...]
    note: str


RECIPES = {
    # This is the last release with trl.experimental.ppo, which trl#7020 deleted.
    "trl-ppo": Recipe(
        packages=("trl==1.12.0",),
        shared=("torch", "transformers", "accelerate", "datasets", "numpy"),
        note="the PPO of TRL 1.12",
    ),
    # There are no wheels, so pip compiles the package. This takes minutes and needs a C++ compiler.
    "llama": Recipe(packages=("llama-cpp-python==0.3.36",), shared=("numpy",), note="llama.cpp"),
}


def python_of(name: str) -> str:
    """Return the Python interpreter of a virtual environment; create the environment if necessary.

    ``name`` is a key of ``RECIPES``, or an empty string for the current environment.

    Raises:
        UserError: pip could not install the packages.
    """
    if not name:
        return sys.executable
    recipe = RECIPES[name]
    folder = work_directory("venvs") / name
    python = folder / "bin" / "python"
    wanted = pip_requirements(recipe)
    stamp = folder / "requirements.txt"
    if stamp.exists() and stamp.read_text().split() == wanted:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"creating a virtual environment for {recipe.note} in {folder}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)], recipe)
    # Install torch first, separately, because the package index may offer a build without CUDA.
    for group in (wanted[:1], wanted):
        _run([str(python), "-m", "pip", "install", "--quiet", *group], recipe)
    stamp.write_text("\n".join(wanted))
    return str(python)


def pip_requirements(recipe: Recipe) -> list[str]:
    """Return the requirements for pip, without local version labels such as ``+cpu``."""
    shared = [f"{name}=={version(name).partition('+')[0]}" for name in recipe.shared]
    return [*shared, *recipe.packages]


def _run(command: list[str], recipe: Recipe) -> None:
    """Run a command; raise UserError if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{recipe.note} cannot be installed: {reason}")
