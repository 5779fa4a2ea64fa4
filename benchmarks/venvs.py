"""Create a virtual environment for each side that needs other packages than the toolkit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

from benchmarks.paths import work_directory
from rlhf.errors import UserError


@dataclass(frozen=True)
class VenvRecipe:
    """The packages that are installed in one virtual environment.

    Args:
        packages: pip requirements, each with a version.
        shared: names of packages that are installed in the version of the current environment.
        note: name of the measured software, for the log and for error messages.
    """

    packages: tuple[str, ...]
    shared: tuple[str, ...]
    note: str


RECIPES = {
    # 1.12.0 is the last release that contains trl.experimental.ppo; trl#7020 removed this module.
    "trl-ppo": VenvRecipe(
        packages=("trl==1.12.0",),
        shared=("torch", "transformers", "accelerate", "datasets", "numpy"),
        note="the PPO of TRL 1.12",
    ),
    # pip compiles this package, because the package index has no wheel of it. The compilation takes
    # several minutes and needs a C++ compiler.
    "llama": VenvRecipe(
        packages=("llama-cpp-python==0.3.36",), shared=("numpy",), note="llama.cpp"
    ),
}


def ensure_venv_python(name: str) -> str:
    """Return the path of the Python interpreter of a virtual environment.

    The environment is created under the cache folder if it does not exist, or if its packages
    differ from those of its recipe.

    Args:
        name: key of ``RECIPES``, or an empty string for the current environment.

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
    # torch is installed first and alone. Otherwise, pip may choose a build of torch without CUDA.
    for group in (wanted[:1], wanted):
        _run([str(python), "-m", "pip", "install", "--quiet", *group], recipe)
    stamp.write_text("\n".join(wanted))
    return str(python)


def pip_requirements(recipe: VenvRecipe) -> list[str]:
    """Return the pip requirements of a recipe.

    The versions of shared packages have no local label such as ``+cpu``, because the package index
    does not offer versions with a label.
    """
    shared = [f"{name}=={version(name).partition('+')[0]}" for name in recipe.shared]
    return [*shared, *recipe.packages]


def _run(command: list[str], recipe: VenvRecipe) -> None:
    """Run a command; raise UserError if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip could not install {recipe.note}: {reason}")
