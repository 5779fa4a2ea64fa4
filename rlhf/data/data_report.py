"""Report of `rlhf data check` on a dataset, with one line per finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf.common.text import count_text
from rlhf.config.data import DataSpec, Kind
from rlhf.data import checks
from rlhf.data.checks import CountTokens, Finding, Row
from rlhf.data.load import LoadedRows, load
from rlhf.errors import UserError


@dataclass(frozen=True)
class DataReport:
    """All findings on one dataset."""

    findings: tuple[Finding, ...]
    lengths: dict[str, dict[str, float]]
    """Field and unit, such as "prompt, characters" -> median, p95 and max of the lengths."""
    total: int
    """Number of rows of all sources, see `LoadedRows.total`."""

    @property
    def ok(self) -> bool:
        """True if no finding is a fault."""
        return all(finding.level != "fault" for finding in self.findings)

    def verdict(self) -> str:
        """Return the number and the names of the faults in one line."""
        faults = [finding for finding in self.findings if finding.level == "fault"]
        if not faults:
            return f"no fault found in {count_text(self.total, 'row')}"
        named = ", ".join(f"{f.name} ({f.count:,})" for f in faults)
        return f"{count_text(len(faults), 'fault')} in {count_text(self.total, 'row')}: {named}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict(),
            "total": self.total,
            "lengths": self.lengths,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def to_markdown(self) -> str:
        """Return the report as Markdown: verdict, findings with quoted rows, table of lengths."""
        verdict = self.verdict()
        lines = [f"**{verdict[0].upper()}{verdict[1:]}.**", ""]
        for f in self.findings:
            lines.append(f"- {f.level}: {f.name}: {f.verdict}")
            lines += ["  - `{}`".format(text.replace("`", "'")) for text in f.examples]
        lines += ["", "| part | median | 95% | max |", "| --- | ---: | ---: | ---: |"]
        for part, s in self.lengths.items():
            lines.append(f"| {part} | {s['median']:,.0f} | {s['p95']:,.0f} | {s['max']:,.0f} |")
        return "\n".join(lines) + "\n"


def make_data_report(
    loaded: LoadedRows,
    *,
    against: LoadedRows | None = None,
    count_tokens: CountTokens | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> DataReport:
    """Run the checks that apply to the kind of the loaded rows.

    Args:
        loaded: Rows of any kind.
        against: Rows of a second dataset, such as the test set, whose prompts must not occur in
            `loaded`.
        count_tokens: Function that returns the length of a text in tokens. If it is given, the
            report also has lengths in tokens.
        max_length: Maximum number of tokens per row in training, for the check of over-long rows;
            requires `count_tokens`.
        seed: Seed of the folds in the search for suspects (pairs only).

    Raises:
        UserError: There are no rows, or `max_length` is given without `count_tokens`.
    """
    if not loaded.rows:
        raise UserError("there are no rows to check")
    if max_length and not count_tokens:
        raise UserError("max_length is a number of tokens: also give count_tokens (a tokenizer)")
    rows = loaded.rows
    findings = [
        checks.unusable_rows(loaded),
        checks.duplicates(rows),
        checks.unused_columns(loaded),
    ]
    if "chosen" in rows[0]:
        findings += [checks.contradictory_pairs(rows), checks.pairs_equal_after_normalization(rows)]
        if any("margin" in row for row in rows):
            findings.append(checks.reversed_scores(rows))
        findings += [checks.length_bias(rows), checks.suspicious_pair_labels(rows, seed=seed)]
    if "label" in rows[0]:
        findings += [checks.contradictory_labels(rows), checks.label_balance(rows)]
    if any("answer" in turn for row in rows for turn in row.get("prompt", ())):
        findings.append(checks.contradictory_answers(rows))
    if count_tokens and max_length:
        findings.append(checks.over_long_rows(rows, count_tokens, max_length=max_length))
    if against is not None:
        findings += [
            checks.leaked_prompts(rows, against.rows),
            checks.partly_leaked_prompts(rows, against.rows),
        ]
    lengths = _length_statistics(rows, len, "characters")
    if count_tokens:
        lengths |= _length_statistics(rows, count_tokens, "tokens")
    return DataReport(tuple(findings), lengths, loaded.total)


def check_dataset(
    specs: DataSpec | Sequence[DataSpec],
    kind: Kind,
    *,
    against: DataSpec | Sequence[DataSpec] | None = None,
    count_tokens: CountTokens | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> DataReport:
    """Load and check datasets, as `rlhf data check` does.

    The arguments and errors are described at `load` and `make_data_report`. The datasets `against`
    are loaded in the same way as `specs`.
    """
    return make_data_report(
        load(specs, kind, seed=seed),
        against=None if against is None else load(against, kind, seed=seed),
        count_tokens=count_tokens,
        max_length=max_length,
        seed=seed,
    )


def _length_statistics(
    rows: Sequence[Row], measure: Callable[[str], int], unit: str
) -> dict[str, dict[str, float]]:
    """Return "FIELD, UNIT" -> median, p95 and max of the lengths of the texts of a field."""
    lengths: dict[str, list[int]] = {}
    for row in rows:
        for name, texts in checks.texts_by_field(row).items():
            lengths.setdefault(name, []).extend(map(measure, texts))
    table = {}
    for name, values in lengths.items():
        table[f"{name}, {unit}"] = {
            "median": float(np.median(values)),
            "p95": float(np.quantile(values, 0.95)),
            "max": float(max(values)),
        }
    return table
