"""The verbs of whole studies: benchmarks and the tuning before them."""

from __future__ import annotations

from typing import Any

import yaml

from rlhf.cli.commands import as_config, take_flags
from rlhf.config.load import as_tree, parse_overrides
from rlhf.errors import UserError


def bench(arguments: list[str]) -> int:
    """`rlhf bench MANIFEST.yaml`; 1 when --against finds that something got worse."""
    from rlhf.studies.bench import run as study
    from rlhf.studies.bench.manifest import read_bench

    parsed = _manifest(arguments, study, ("jobs", "array", "against", "only"))
    if parsed is None:
        return 0
    files, overrides, options, flags = parsed
    manifest = read_bench(files, overrides)
    if "--print-config" in flags:
        print(yaml.safe_dump(as_tree(manifest.config), sort_keys=False))
    elif "--dry-run" in flags:
        print(study.describe(manifest))
    elif "array" in options:
        from rlhf.studies.bench.array import write_array

        print(*write_array(manifest, options["array"]), sep="\n")
    elif "only" in options:
        print(study.do_one(manifest, str(options["only"])))
    else:
        return study.run_and_judge(manifest, **options)
    return 0


def tune(arguments: list[str]) -> int:
    """`rlhf tune STUDY.yaml`: the best settings of as many trials for every algorithm."""
    from rlhf.studies.tune import run as study

    parsed = _manifest(arguments, study, ("jobs",))
    if parsed is None:
        return 0
    files, overrides, options, flags = parsed
    checked = study.read_study(files, overrides)
    if "--print-config" in flags:
        print(yaml.safe_dump(as_tree(checked.config), sort_keys=False))
    elif "--dry-run" in flags:
        print(study.describe(checked))
    else:
        print(study.run_tune(checked, **options))
    return 0


def _manifest(
    arguments: list[str], module: Any, own: tuple[str, ...]
) -> tuple[list[str], list[tuple[str, Any]], dict[str, Any], set[str]] | None:
    """(files, overrides, the verb's own options, flags); None after --help, which is printed."""
    rest, flags = take_flags(arguments)
    if flags & {"--help", "-h"} or not rest:
        print(module.__doc__)
        return None
    files, overrides = parse_overrides(as_config(rest))
    options = {key: value for key, value in overrides if key in own}
    jobs = options.get("jobs", 1)
    if type(jobs) is not int or jobs < 1:
        raise UserError(f"--jobs must be a number of processes >= 1, got {jobs!r}")
    return files, [(k, v) for k, v in overrides if k not in own], options, flags
