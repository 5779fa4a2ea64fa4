"""Write the table and the figure of docs/performance.md from the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.paths import PERFORMANCE_FIGURE, PERFORMANCE_PAGE
from benchmarks.results import Result
from benchmarks.workloads import WORKLOADS
from rlhf.errors import UserError

BEGIN, END = "<!-- results -->", "<!-- /results -->"
TABLE_HEAD = (
    "| workload | side | median s | work per second | peak GiB | ours is faster by | target | "
    "pairs, steps dropped |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def write_page(
    results: Mapping[str, Mapping[str, Result]],
    *,
    page: Path = PERFORMANCE_PAGE,
    picture: Path = PERFORMANCE_FIGURE,
) -> None:
    """Write the results between the BEGIN and END markers of a page, and draw the figure.

    Args:
        results: machine -> workload -> newest result.
        page: Markdown file to update.
        picture: path of the figure.

    Raises:
        UserError: the page does not have both markers.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page} must contain the lines {BEGIN} and {END} around the results")
    ordered = {
        machine: {name: found[name] for name in WORKLOADS if name in found}
        for machine, found in results.items()
    }
    body = "\n\n".join(machine_section(machine, found) for machine, found in ordered.items())
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")
    plot_speed_ratios(ordered, picture)


def machine_section(machine: str, results: Mapping[str, Result]) -> str:
    """Return the Markdown section of one machine."""
    parts = [
        f"### {machine}",
        provenance_text(results),
        comparison_table(results),
        tables_of_sideless_workloads(results),
    ]
    return "\n\n".join(part for part in parts if part)


def provenance_text(results: Mapping[str, Result]) -> str:
    """Return the date, commit and package versions of the results as text.

    If these values differ between workloads, there is one line for each combination of values.
    """
    seen: dict[str, list[str]] = {}
    for name, result in results.items():
        versions = result["versions"]
        packages = ", ".join(
            f"{package} {versions[package]}" for package in ("torch", "transformers", "trl")
        )
        line = (
            f"Python {versions['python']}, {packages}, {result['date'][:10]}, commit "
            f"{(result['commit'] or 'unknown')[:9]}"
        )
        seen.setdefault(line, []).append(name)
    if len(seen) == 1:
        return f"Measured with {next(iter(seen))}."
    return "\n".join(f"* {', '.join(names)}: {line}" for line, names in seen.items())


def comparison_table(results: Mapping[str, Result]) -> str:
    """Return a Markdown table with one row for each side of each workload."""
    lines = [
        side_row(name, result, side)
        for name, result in results.items()
        for side in result.get("sides", ())
    ]
    return "\n".join([TABLE_HEAD, *lines]) if lines else ""


def side_row(name: str, result: Result, side: str) -> str:
    """Return the table row of a side; the toolkit's row begins with the title of the workload."""
    row, side_result = WORKLOADS[name], result["sides"][side]
    ratio = result["ratios"].get(side)
    peak = "" if side_result["peak_gib"] is None else f"{side_result['peak_gib']:.1f}"
    cells = [
        "" if ratio else row.title,
        side_result["label"],
        f"{side_result['seconds']:.3g}",
        rate_text(side_result["rate"], result["unit"]),
        peak,
        speed_ratio_text(ratio) if ratio else "",
        target_text(name, side),
        f"{ratio['pairs']}, {side_result['dropped']}"
        if ratio
        else f"{side_result['kept']}, {side_result['dropped']}",
    ]
    return f"| {' | '.join(cells)} |"


def rate_text(rate: float, unit: str) -> str:
    """Return a throughput per second as text, such as "1,200 new tokens" or "0.35 TFLOP"."""
    digits = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"
    return f"{rate / 1e12:.2f} TFLOP" if unit == "FLOP" else f"{digits} {unit}"


def speed_ratio_text(ratio: Mapping[str, Any]) -> str:
    """Return a speed ratio as text, with the quartiles of the ratios within rounds."""
    low, high = ratio["quartiles"]
    return f"{ratio['speed']:.2f}× [{low:.2f}, {high:.2f}]"


def target_text(name: str, side: str) -> str:
    """Return the target of a side as text, or an empty string if there is none.

    The target is a minimum throughput of the toolkit, a minimum speed ratio to the side, or a
    maximum memory ratio.
    """
    row = WORKLOADS[name]
    if side == next(iter(row.sides)):
        return "" if row.floor is None else f"{row.floor:,.0f} {row.unit}/s"
    parts = [f"≥ {row.min_speed_ratios[side]:g}×"] if side in row.min_speed_ratios else []
    parts += (
        [f"≤ {row.max_memory_ratios[side]:g} of its memory"]
        if side in row.max_memory_ratios
        else []
    )
    return ", ".join(parts)


def tables_of_sideless_workloads(results: Mapping[str, Result]) -> str:
    """Return the Markdown tables of the workloads without sides."""
    tables = []
    for result in results.values():
        if rows := result.get("rows"):
            lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
            lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def plot_speed_ratios(results: Mapping[str, Mapping[str, Result]], path: Path) -> None:
    """Plot the speed ratios with quartiles, with one panel for each machine.

    Red lines are the targets. The figure is written to ``path``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        machine: {
            (name, side): ratio
            for name, result in found.items()
            for side, ratio in result.get("ratios", {}).items()
        }
        for machine, found in results.items()
    }
    panels = {machine: found for machine, found in panels.items() if found}
    every = {pair for found in panels.values() for pair in found}
    rows = [(name, side) for name in WORKLOADS for side in WORKLOADS[name].sides]
    rows = [row for row in rows if row in every]
    if not rows:
        return
    figure, every_axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(4 + 4 * len(panels), 0.5 * len(rows) + 1),
        layout="constrained",
        sharey=True,
        sharex=True,
        squeeze=False,
    )
    for axes, (machine, found) in zip(every_axes[0], panels.items(), strict=True):
        for place, (name, side) in enumerate(rows):
            if (ratio := found.get((name, side))) is None:
                continue
            low, high = ratio["quartiles"]
            axes.barh(place, ratio["speed"], color="#4477aa", height=0.6)
            axes.plot([low, high], [place, place], color="black", linewidth=1.5)
            if (bar := WORKLOADS[name].min_speed_ratios.get(side)) is not None:
                axes.plot([bar, bar], [place - 0.4, place + 0.4], color="#cc3311", linewidth=2)
        axes.axvline(1.0, color="gray", linewidth=0.8)
        axes.set_title(machine, fontsize=8)
    titles = [
        f"{WORKLOADS[name].title}\nagainst {WORKLOADS[name].sides[side].label}"
        for name, side in rows
    ]
    every_axes[0, 0].set_yticks(range(len(rows)), titles, fontsize=7)
    every_axes[0, 0].invert_yaxis()
    figure.supxlabel(
        "throughput ratio, this toolkit / baseline (line: quartiles of pairs; red: target)",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
