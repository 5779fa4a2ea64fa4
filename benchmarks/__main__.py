"""Command line ``python -m benchmarks WORKLOAD ...``: run workloads and store the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import paths
from benchmarks.harness import MeasurementOptions, log_to_stderr, run_workload
from benchmarks.results import (
    append_result,
    describe_measurement,
    machine_name,
    newest_results,
    read_results,
)
from benchmarks.workloads import WORKLOAD_GROUPS, WORKLOADS
from rlhf.common.names import did_you_mean
from rlhf.errors import UserError


def parse_command_line(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line; print a usage error and exit if they are invalid."""
    default = MeasurementOptions()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ", ".join([*WORKLOADS, *WORKLOAD_GROUPS, "all"])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=names)
    parser.add_argument(
        "--warmup", type=int, default=default.warmup, help="number of warm-up rounds"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=default.rounds,
        help="number of rounds to measure; rounds that other processes slowed down do not count",
    )
    parser.add_argument(
        "--quiet",
        type=float,
        default=default.quiet,
        help="maximum number of cores that other processes may use during a step",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=default.patience,
        help="maximum number of seconds to wait for idle cores before a step",
    )
    parser.add_argument(
        "--model",
        default=default.model,
        help="short name, Hugging Face Hub id or folder of the model",
    )
    parser.add_argument(
        "--sides",
        nargs="*",
        default=(),
        help="implementations (sides) of the workload to run; default: all",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="compare with the code of another checkout; the result is not stored",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip workloads with a result for this commit and machine",
    )
    parser.add_argument("--output", type=Path, default=paths.RESULTS_FILE, help="results file")
    parser.add_argument(
        "--table", action="store_true", help="write the table and figure of docs/performance.md"
    )
    parsed = parser.parse_args(arguments)
    if not parsed.workloads and not parsed.table:
        parser.error("give at least one workload, or --table")
    return parsed


def expand_workload_names(names: list[str]) -> list[str]:
    """Expand a list of workload names, group names and "all" to workload names.

    Raises:
        UserError: a name is unknown.
    """
    workloads: list[str] = []
    for name in names:
        if name not in (*WORKLOADS, *WORKLOAD_GROUPS, "all"):
            raise UserError(
                f"unknown workload {name!r}{did_you_mean(name, [*WORKLOADS, *WORKLOAD_GROUPS])}"
            )
        workloads += WORKLOADS if name == "all" else WORKLOAD_GROUPS.get(name, (name,))
    return list(dict.fromkeys(workloads))


def measure_and_store(names: list[str], parsed: argparse.Namespace) -> list[str]:
    """Run each workload and store its result; return the names of the workloads that failed."""
    options = MeasurementOptions(
        warmup=parsed.warmup,
        rounds=parsed.rounds,
        quiet=parsed.quiet,
        patience=parsed.patience,
        model=parsed.model,
        sides=tuple(parsed.sides),
        against=parsed.against and parsed.against.resolve(),
    )
    current = describe_measurement()
    resumes = parsed.resume and parsed.output.exists()
    known = (
        newest_results(read_results(parsed.output)).get(machine_name(current), {})
        if resumes
        else {}
    )
    failed = []
    for name in names:
        if name in known and known[name]["commit"] == current["commit"]:
            log_to_stderr(f"{name}: already measured")
            continue
        try:
            result = run_workload(name, options)
        except UserError as error:
            log_to_stderr(f"{name}: {error}")
            failed.append(name)
            continue
        if options.against is None:
            append_result(
                parsed.output, {**result, "partial": bool(options.sides), **describe_measurement()}
            )
        print_result(result)
    return failed


def print_result(result: dict) -> None:
    """Print the result of a workload."""
    for row in result.get("rows", ()):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    for side in result.get("sides", {}).values():
        low, high = side["seconds_quartiles"]
        peak = "" if side["peak_gib"] is None else f", peak {side['peak_gib']:.1f} GiB"
        print(
            f"{result['workload']}: {side['label']}: {side['seconds']:.3f} s "
            f"[{low:.3f}, {high:.3f}], {side['rate']:,.1f} {result['unit']}/s{peak}; "
            f"{side['kept']} steps, {side['dropped']} slowed by other processes"
        )
    for other, ratio in result.get("ratios", {}).items():
        low, high = ratio["quartiles"]
        ends = ratio["interval"]
        mean = f", 95% interval of the mean [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        print(
            f"{result['workload']}: {ratio['speed']:.2f}x {other} [{low:.2f}, {high:.2f}]{mean}, "
            f"{ratio['pairs']} undisturbed pairs"
        )


def main() -> int:
    """Run the command line; return 2 for a user's mistake, 1 if a workload failed, otherwise 0."""
    parsed = parse_command_line(sys.argv[1:])
    try:
        failed = measure_and_store(expand_workload_names(parsed.workloads), parsed)
        if parsed.table:
            from benchmarks.table import write_page

            write_page(newest_results(read_results(parsed.output)))
    except UserError as error:
        log_to_stderr(str(error))
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
