"""``python -m benchmarks WORKLOAD ...``: measure, keep the results, draw the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import paths as places
from benchmarks.harness import Plan, run_workload, say
from benchmarks.results import append, machine_of, newest, read, stamp
from benchmarks.workloads import GROUPS, WORKLOADS
from rlhf.common.names import nearest
from rlhf.errors import UserError


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    standard = Plan()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ", ".join([*WORKLOADS, *GROUPS, "all"])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=names)
    parser.add_argument("--warmup", type=int, default=standard.warmup, help="rounds not counted")
    parser.add_argument("--rounds", type=int, default=standard.rounds, help="rounds that count")
    parser.add_argument(
        "--quiet", type=float, default=standard.quiet, help="cores that others may use in a step"
    )
    parser.add_argument(
        "--patience", type=float, default=standard.patience, help="seconds to wait for quiet"
    )
    parser.add_argument("--model", default=standard.model, help="short name, hub id or folder")
    parser.add_argument("--sides", nargs="*", default=(), help="of the workload; default all")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="measure our side against that of another checkout; nothing is kept",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what was measured on this commit and machine",
    )
    parser.add_argument("--output", type=Path, default=places.RESULTS, help="file of the results")
    parser.add_argument(
        "--table", action="store_true", help="draw table and picture of docs/performance.md"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.workloads and not chosen.table:
        parser.error("name a workload, or give --table")
    return chosen


def expand(names: list[str]) -> list[str]:
    """Workloads that names, groups and "all" stand for.

    Raises:
        UserError: there is none of that name.
    """
    found: list[str] = []
    for name in names:
        if name not in (*WORKLOADS, *GROUPS, "all"):
            raise UserError(f"unknown workload {name!r}{nearest(name, [*WORKLOADS, *GROUPS])}")
        found += WORKLOADS if name == "all" else GROUPS.get(name, (name,))
    return list(dict.fromkeys(found))


def measure(names: list[str], chosen: argparse.Namespace) -> list[str]:
    """Measure each workload and keep its result at once; returns the names of those that failed."""
    plan = Plan(
        warmup=chosen.warmup,
        rounds=chosen.rounds,
        quiet=chosen.quiet,
        patience=chosen.patience,
        model=chosen.model,
        sides=tuple(chosen.sides),
        against=chosen.against and chosen.against.resolve(),
    )
    at = stamp()
    resumes = chosen.resume and chosen.output.exists()
    known = newest(read(chosen.output)).get(machine_of(at), {}) if resumes else {}
    failed = []
    for name in names:
        if name in known and known[name]["commit"] == at["commit"]:
            say(f"{name}: measured already")
            continue
        try:
            result = run_workload(name, plan)
        except UserError as error:
            say(f"{name}: {error}")
            failed.append(name)
            continue
        if plan.against is None:
            append(chosen.output, {**result, "partial": bool(plan.sides), **stamp()})
        report(result)
    return failed


def report(result: dict) -> None:
    """Print a result in words."""
    for row in result.get("rows", ()):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    for side in result.get("sides", {}).values():
        low, high = side["seconds_quartiles"]
        peak = "" if side["peak_gib"] is None else f", peak {side['peak_gib']:.1f} GiB"
        print(
            f"{result['workload']}: {side['label']}: {side['seconds']:.3f} s "
            f"[{low:.3f}, {high:.3f}], {side['rate']:,.1f} {result['unit']}/s{peak}; "
            f"{side['kept']} steps, {side['dropped']} dropped"
        )
    for other, ratio in result.get("ratios", {}).items():
        low, high = ratio["quartiles"]
        known = ratio["interval"]
        mean = f", 95% of the mean [{known[0]:.3f}, {known[1]:.3f}]" if known else ""
        print(
            f"{result['workload']}: {ratio['speed']:.2f}x {other} [{low:.2f}, {high:.2f}]{mean}, "
            f"{ratio['pairs']} undisturbed pairs"
        )


def main() -> int:
    """The command line's exit code: 2 for a mistake, 1 where a workload failed."""
    chosen = parse(sys.argv[1:])
    try:
        failed = measure(expand(chosen.workloads), chosen)
        if chosen.table:
            from benchmarks.table import write_page

            write_page(newest(read(chosen.output)))
    except UserError as error:
        say(str(error))
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
