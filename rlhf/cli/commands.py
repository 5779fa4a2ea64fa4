"""What each verb of the command line does with its arguments."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli.table import configure, from_record, help_of, run_command, settings_in_force
from rlhf.common.names import nearest
from rlhf.config.help import help_text
from rlhf.config.load import as_tree, assemble, parse_overrides, set_key
from rlhf.errors import UserError

FLAGS = ("--dry-run", "--print-config", "--help", "-h")


def take_flags(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Arguments without the flags, and the flags that were among them."""
    flags = {argument for argument in arguments if argument in FLAGS}
    return [argument for argument in arguments if argument not in FLAGS], flags


def asks_for_help(arguments: list[str], verb: Callable[..., Any]) -> bool:
    """Whether help is wanted; prints what the verb's function says of itself."""
    if not {"--help", "-h"} & set(arguments):
        return False
    print(inspect.getdoc(verb))
    return True


def stage(verb: str, arguments: list[str]) -> int:
    """A verb that makes a run directory."""
    rest, flags = take_flags(arguments)
    files, overrides = parse_overrides(rest)
    tree = from_record(verb, assemble(files, []))
    for key, value in overrides:
        set_key(tree, key, value)
    if flags & {"--help", "-h"}:
        print(help_of(verb, tree))
        return 0
    if "--print-config" in flags:
        settings = settings_in_force(verb, configure(verb, tree))
        print(yaml.safe_dump({"verb": verb, **settings}, sort_keys=False))
        return 0
    if "--dry-run" in flags:
        from rlhf.cli.dry_run import plan

        print(plan(verb, tree))
        return 0
    print(run_command(verb, tree))
    return 0


def run(arguments: list[str]) -> int:
    """`rlhf run PIPELINE.yaml`."""
    from rlhf.pipeline import read_pipeline, run_pipeline

    rest, flags = take_flags(arguments)
    if "--help" in flags or "-h" in flags or not rest:
        from rlhf import pipeline as module

        print(module.__doc__)
        return 0
    files, overrides = parse_overrides([part for part in as_config(rest)])
    pipeline = read_pipeline(files, overrides)
    if "--print-config" in flags:
        print(yaml.safe_dump(as_tree(pipeline), sort_keys=False))
        return 0
    if "--dry-run" in flags:
        from rlhf.cli.dry_run import plan_stage

        for item in pipeline.stages:
            print(f"== {item['name']}")
            try:
                print(plan_stage(pipeline, item))
            except UserError as error:
                raise UserError(f"stage {item['name']}: {error}") from error
        return 0
    print(run_pipeline(pipeline))
    return 0


def as_config(arguments: list[str]) -> list[str]:
    """A leading path stands for --config."""
    lead = [] if arguments[0].startswith("--") else ["--config"]
    return [*lead, *arguments]


def report(arguments: list[str]) -> int:
    """`rlhf report DIR`, or several side by side: `rlhf report DIR DIR... [--output FILE.html]`."""
    from rlhf.reports import write_comparison_report, write_report

    if asks_for_help(arguments, report):
        return 0
    paths, options = _split(arguments, "report", {"output"})
    folders = _paths(paths, "report")
    if len(folders) > 1:
        output = Path(options.get("output", "comparison.html"))
        if output.is_dir():
            raise UserError(f"report: --output {output} is a folder: name a file, such as a.html")
        print(write_comparison_report(folders, output))
    elif options:
        raise UserError("report: --output is for several runs; the page of one lies in its folder")
    else:
        print(write_report(folders[0]))
    return 0


def compare(arguments: list[str]) -> int:
    """`rlhf compare RUN RUN... [--metric NAME] [--baseline ARM] [--json]`.

    Metrics: return, success, cost, turns, invalid, tokens, normalized, and every reward by name. By
    default gold if it was measured, else the return, and on prompts the reward that was trained on.
    """
    from rlhf.evaluation.compare import compare as compare_runs

    if asks_for_help(arguments, compare):
        return 0
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    paths, options = _split(arguments, "compare", {"metric", "baseline"})
    result = compare_runs(
        _paths(paths, "compare"),
        metric=options.get("metric"),
        baseline=options.get("baseline"),
    )
    print(result.to_json() if as_json else result.to_markdown())
    return 0


def _split(arguments: list[str], verb: str, known: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Paths, and the ``--key value`` pairs among them."""
    paths: list[str] = []
    pairs: list[str] = []
    rest = list(arguments)
    while rest:
        head = rest.pop(0)
        if not head.startswith("--"):
            paths.append(head)
            continue
        pairs.append(head)
        if "=" not in head and rest:
            pairs.append(rest.pop(0))
    options = dict(parse_overrides(pairs)[1])
    if unknown := sorted(options.keys() - known):
        raise UserError(f"{verb}: unknown option --{unknown[0]}{nearest(unknown[0], known)}")
    return paths, options


def _paths(arguments: list[str], verb: str) -> list[Path]:
    if not arguments:
        raise UserError(f"{verb}: give at least one run directory")
    return [Path(argument) for argument in arguments]


def generate(arguments: list[str]) -> int:
    """`rlhf generate --model.path M --prompt TEXT` (or --input FILE --output FILE)."""
    from rlhf.commands.generate import GenerateConfig
    from rlhf.commands.generate import generate as run_generate

    return _small("generate", GenerateConfig, run_generate, arguments)


def score(arguments: list[str]) -> int:
    """`rlhf score --reward PATH --input FILE`."""
    from rlhf.commands.score import ScoreConfig
    from rlhf.commands.score import score as run_score

    return _small("score", ScoreConfig, run_score, arguments)


def _small(verb: str, cls: type, work: Any, arguments: list[str]) -> int:
    """A verb with a configuration and no run directory; prints what the work yields."""
    from rlhf.config.load import build

    rest, flags = take_flags(arguments)
    if flags & {"--help", "-h"}:
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        print(help_text(cls, command=f"rlhf {verb}", summary=summary))
        return 0
    config: Any = build(cls, assemble(*parse_overrides(rest)))
    if "--print-config" in flags:
        print(yaml.safe_dump(as_tree(config), sort_keys=False))
        return 0
    for line in work(config):
        print(line)
    return 0


def data(arguments: list[str]) -> int:
    """`rlhf data check FILE... [--kind KIND] [--against FILE]`; exit code 1 on a fault."""
    from rlhf.commands.score import CheckConfig, check

    if arguments[:1] != ["check"] and asks_for_help(arguments, data):
        return 0
    if not arguments or arguments[0] != "check":
        raise UserError("data: the one thing to do is `rlhf data check FILE...`")
    rest = arguments[1:]
    end = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    paths = [["--path", file] for file in rest[:end]] or [[]]
    faults = []

    def page(config: CheckConfig) -> Iterator[str]:
        text, fine = check(config)
        faults.extend([config.path] * (not fine))
        yield text

    for path in paths:
        _small("data check", CheckConfig, page, [*path, *rest[end:]])
    return 1 if faults else 0


def models(arguments: list[str]) -> int:
    """`rlhf models list`, `rlhf models get NAME`, `rlhf models merge ADAPTER TARGET`."""
    from rlhf.models.hub import SHORT_NAMES, fetch

    if asks_for_help(arguments, models):
        return 0
    match arguments:
        case ["list"]:
            for name, row in SHORT_NAMES.items():
                print(f"{name}  {row.parameters}  {row.licence}  {row.hub}")
        case ["get", name]:
            if name not in SHORT_NAMES:
                from rlhf.models.hub import resolve

                print(resolve(name))
            else:
                print(fetch(name))
        case ["merge", adapter, target]:
            from rlhf.models.loading import merge_adapter

            print(merge_adapter(adapter, Path(target)))
        case _:
            raise UserError("models: list | get NAME | merge ADAPTER_FOLDER TARGET_FOLDER")
    return 0


def envs(arguments: list[str]) -> int:
    """`rlhf envs list [--json] | demos ID ... | play ID | check ID`."""
    if arguments[:1] != ["demos"] and asks_for_help(arguments, envs):
        return 0
    match arguments:
        case ["list", *rest]:
            from rlhf.envs.catalogue import catalogue

            rows = catalogue()
            if "--json" in rest:
                print(json.dumps(rows, indent=2))
            else:
                _print_table(rows, ("id", "horizon", "optimum", "random", "source", "summary"))
        case ["check", target]:
            from rlhf.envs.check import check

            findings = check(target)
            for finding in findings:
                print(finding)
            print(f"{target}: {len(findings)} finding{'s' * (len(findings) != 1)}")
            return 2 if findings else 0
        case ["play", target]:
            from rlhf.envs.play import play

            play(target)
        case ["demos", target, *rest]:
            from rlhf.commands.preparation import EnvDemosConfig, env_demos

            return _small("envs demos", EnvDemosConfig, env_demos, ["--env", target, *rest])
        case _:
            raise UserError("envs: list [--json] | demos ID | play ID | check ID")
    return 0


def algorithms(arguments: list[str]) -> int:
    """`rlhf algorithms [--json]`, or one of them in full."""
    from rlhf.algorithms.registry import table

    if asks_for_help(arguments, algorithms):
        return 0
    rows = table()
    if arguments == ["--json"]:
        print(json.dumps(rows, indent=2))
    elif arguments:
        chosen = [row for row in rows if row["name"] == arguments[0]]
        if not chosen:
            raise UserError(f"algorithms: there is no {arguments[0]!r}")
        for key, value in chosen[0].items():
            print(f"{key:>12}: {value}")
    else:
        _print_table(rows, ("name", "critic", "unbiased", "summary", "paper"))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        cells = (row.get(column) for column in columns)
        table.add_row(*map(_cell, cells))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
