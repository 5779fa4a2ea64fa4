"""MkDocs hook: one page of the API reference for each public package.

The pages list the modules that exist, so a renamed module needs no edit here.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "algorithms",
    "rollout",
    "envs",
    "reward_models",
    "data",
    "models",
    "training",
    "evaluation",
    "explain",
    "export",
    "stats",
    "config",
)


def public_module_names(package: str) -> list[str]:
    """Dotted names of the public modules of a package, the package first."""
    folder = ROOT / "rlhf" / package
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.name == "__init__.py":
            parts = parts[:-1]
        if "notation" not in parts and not parts[-1].startswith("_"):  # a parser, not public
            names.append(".".join(parts))
    return sorted(names, key=lambda name: (name.count(".") > 1, name))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    public = (
        "api.training",
        "api.evaluation",
        "api.results",
        "api.live_plot",
        "api.commands",
        "api.options",
        "plugins",
        "errors",
    )
    pages = {"rlhf": [f"rlhf.{name}" for name in public]}
    pages |= {package: public_module_names(package) for package in PACKAGES}
    for package, names in pages.items():
        title = "rlhf" if package == "rlhf" else f"rlhf.{package}"
        blocks = "\n\n".join(f"::: {name}" for name in names)
        text = f"# `{title}`\n\n{blocks}\n"
        files.append(File.generated(config, f"api/{package}.md", content=text))
    return files
