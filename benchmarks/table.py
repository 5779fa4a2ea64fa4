"""Table and picture of docs/performance.md, drawn from the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.places import PAGE, PICTURE
from benchmarks.results import Result
from benchmarks.workloads import WORKLOADS
from rlhf.errors import UserError

BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = (
    "| workload | side | median s | work per second | peak GiB | ours is faster by | asked | "
    "pairs, steps dropped |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def write_page(
    results: Mapping[str, Result], *, page: Path = PAGE, picture: Path = PICTURE
) -> None:
    """Replace what stands between the page's two marks, and draw the picture.

    Raises:
        UserError: the page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page} needs the lines {BEGIN} and {END} around its results")
    ordered = {name: results[name] for name in WORKLOADS if name in results}
    parts = [machines(ordered), comparisons(ordered), environments(ordered)]
    body = "\n\n".join(part for part in parts if part)
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")
    draw(ordered, picture)


def machines(results: Mapping[str, Result]) -> str:
    """Where and when the results were measured; one line for each set of circumstances."""
    seen: dict[str, list[str]] = {}
    for name, result in results.items():
        machine, versions = result["machine"], result["versions"]
        packages = ", ".join(
            f"{package} {versions[package]}" for package in ("torch", "transformers", "trl")
        )
        line = (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"Python {versions['python']}, {packages}, {result['date'][:10]}, commit "
            f"{(result['commit'] or 'unknown')[:9]}"
        )
        seen.setdefault(line, []).append(name)
    if len(seen) == 1:
        return f"Measured on: {next(iter(seen))}."
    return "\n".join(f"* {', '.join(names)}: {line}" for line, names in seen.items())


def comparisons(results: Mapping[str, Result]) -> str:
    """One line for each side of each workload."""
    lines = [
        side_line(name, result, side)
        for name, result in results.items()
        for side in result.get("sides", ())
    ]
    return "\n".join([HEAD, *lines]) if lines else ""


def side_line(name: str, result: Result, side: str) -> str:
    """A row of the table; ours carries the workload's title."""
    row, told = WORKLOADS[name], result["sides"][side]
    ratio = result["ratios"].get(side)
    peak = "" if told["peak_gib"] is None else f"{told['peak_gib']:.1f}"
    cells = [
        "" if ratio else row.title,
        told["label"],
        f"{told['seconds']:.3g}",
        rate_text(told["rate"], result["unit"]),
        peak,
        faster(ratio) if ratio else "",
        asked(name, side),
        f"{ratio['pairs']}, {told['dropped']}" if ratio else f"{told['kept']}, {told['dropped']}",
    ]
    return f"| {' | '.join(cells)} |"


def rate_text(rate: float, unit: str) -> str:
    """Work per second; floating-point operations in tera."""
    digits = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"
    return f"{rate / 1e12:.2f} TFLOP" if unit == "FLOP" else f"{digits} {unit}"


def faster(ratio: Mapping[str, Any]) -> str:
    """A ratio of medians with the quartiles of the pairs."""
    low, high = ratio["quartiles"]
    return f"{ratio['speed']:.2f}× [{low:.2f}, {high:.2f}]"


def asked(name: str, side: str) -> str:
    """What this project asks of itself there."""
    row = WORKLOADS[name]
    if side == next(iter(row.sides)):
        return "" if row.floor is None else f"{row.floor:,.0f} {row.unit}/s"
    parts = [f"≥ {row.bars[side]:g}×"] if side in row.bars else []
    parts += [f"≤ {row.memory_bars[side]:g} of its memory"] if side in row.memory_bars else []
    return ", ".join(parts)


def environments(results: Mapping[str, Result]) -> str:
    """Rows of workloads that measure without comparing."""
    tables = []
    for result in results.values():
        if rows := result.get("rows"):
            lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
            lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def draw(results: Mapping[str, Result], path: Path) -> None:
    """Speed ratios with their quartiles as bars; a tick marks what was asked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{WORKLOADS[name].title}\nagainst {result['sides'][side]['label']}", name, side, ratio)
        for name, result in results.items()
        for side, ratio in result.get("ratios", {}).items()
    ]
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(bars) + 1), layout="constrained")
    for place, (_, name, side, ratio) in enumerate(bars):
        low, high = ratio["quartiles"]
        axes.barh(place, ratio["speed"], color="#4477aa", height=0.6)
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
        if (bar := WORKLOADS[name].bars.get(side)) is not None:
            axes.plot([bar, bar], [place - 0.4, place + 0.4], color="#cc3311", linewidth=2)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("work per second, ours over theirs (line: quartiles of pairs; red: asked)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
