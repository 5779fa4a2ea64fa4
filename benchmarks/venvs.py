"""Virtual environments for what cannot share ours, made once and kept in the user's cache."""

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
    """Packages of one environment.

    Args:
        packages: with their versions.
        shared: packages taken in the version that runs here, so that only the rest differs.
        note: what is said if it cannot be made.
    """

    packages: tuple[str, ...]
    shared: tuple[str, ...]
    note: str


RECIPES = {
    # The last release with trl.experimental.ppo; trl#7020 deleted it.
    "trl-ppo": Recipe(
        packages=("trl==1.12.0",),
        shared=("torch", "transformers", "accelerate", "datasets", "numpy"),
        note="the PPO of TRL 1.12",
    ),
    # There are no wheels on the index: pip compiles it, which needs a C++ compiler and minutes.
    "llama": Recipe(packages=("llama-cpp-python==0.3.36",), shared=("numpy",), note="llama.cpp"),
}


def python_of(name: str) -> str:
    """The interpreter of an environment, which is made if need be; "" is the one that runs.

    Raises:
        UserError: pip could not install it.
    """
    if not name:
        return sys.executable
    recipe = RECIPES[name]
    folder = work_directory("venvs") / name
    python = folder / "bin" / "python"
    wanted = requirements(recipe)
    stamp = folder / "requirements.txt"
    if stamp.exists() and stamp.read_text().split() == wanted:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making an environment for {recipe.note} in {folder} ...", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)], recipe)
    # torch first and alone: a find-links folder or index may offer a build without CUDA.
    for group in (wanted[:1], wanted):
        _run([str(python), "-m", "pip", "install", "--quiet", *group], recipe)
    stamp.write_text("\n".join(wanted))
    return str(python)


def requirements(recipe: Recipe) -> list[str]:
    """What pip is asked for; local version labels such as ``+cpu`` are left out."""
    shared = [f"{name}=={version(name).partition('+')[0]}" for name in recipe.shared]
    return [*shared, *recipe.packages]


def _run(command: list[str], recipe: Recipe) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{recipe.note} cannot be installed: {reason}")
