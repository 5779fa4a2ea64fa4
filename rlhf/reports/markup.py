"""Build the HTML elements of reports: text, numbers, and tables with CSV and JSON downloads."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.common.numbers import decimal_text
from rlhf.common.text import escape_invisible, formula_safe_csv_cell
from rlhf.stats import Interval
from rlhf.stats.units import EQUAL_UNITS_REASON

_ACRONYMS = re.compile(
    r"\b(sft|rm|ppo|dpo|kto|grpo|rloo|dapo|gspo|ipo|orpo|kl|lora)(?=\b|[-_\d])", re.IGNORECASE
)

_NAME_COLUMNS = frozenset({"stage", "policy", "difference", "verdict"})
"""Columns whose text cells contain names, in which acronyms are written in capitals."""
_RANGE_COLUMNS = frozenset({"range"})
"""Columns whose text cells contain numbers."""

_MIN_WIDE_COLUMNS = 9
"""If a table of one row has at least this many columns, its cells that are empty, text or a mean of
equal values are in the caption."""

_NUMERAL = re.compile(r"[\d.]+%?")

Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    """A table of a report. An Interval is one cell in HTML and four columns in CSV and JSON."""

    slug: str
    """File name of the downloads, without extension."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_html(self) -> str:
        """Return the table as HTML in a scrollable box, with links that save it as CSV and JSON.

        Columns with equal cells are moved to a caption below the table, see `_is_shown_in_caption`.
        """
        shown = [i for i in range(len(self.columns)) if not self._is_shown_in_caption(i)]
        numeric = {i for i in shown if any(not isinstance(row[i], str | None) for row in self.rows)}
        head = "".join(
            f'<th scope="col"{_alignment_attribute(i in numeric)}>'
            f"{capital_acronyms_html(self.columns[i])}</th>"
            for i in shown
        )
        body = "".join(
            "<tr>"
            + "".join(self._cell_html(row, i, is_number=i in numeric) for i in shown)
            + "</tr>"
            for row in self.rows
        )
        links = f"{self._download_link('csv')} {self._download_link('json')}"
        save = f'<p class="saves">Save as {links}</p>'
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="table" tabindex="0">{table}</div>{self._caption_html()}{save}'

    def _download_link(self, ending: str) -> str:
        """Return a data URL link that saves the whole table as `ending` ("csv" or "json")."""
        text = self.to_csv() if ending == "csv" else self.to_json()
        encoded = base64.b64encode(text.encode(errors="backslashreplace")).decode()
        kind = {"csv": "text/csv", "json": "application/json"}[ending]
        return (
            f'<a download="{esc(self.slug)}.{ending}" '
            f'href="data:{kind};base64,{encoded}">{ending.upper()}</a>'
        )

    def _cell_html(self, row: Sequence[Cell], column: int, *, is_number: bool) -> str:
        """Return the HTML of the cell of a row in a column."""
        cell = row[column]
        if isinstance(cell, str):
            cell = self._display_text(cell, column)
        long = ' class="long"' if isinstance(cell, str) and len(cell) > 40 else ""
        return f"<td{_alignment_attribute(is_number) or long}>{cell_content_html(cell)}</td>"

    def _display_text(self, text: str, column: int) -> str:
        """Return the displayed text of a cell: with minus signs, capital acronyms, or unchanged."""
        name = self.columns[column]
        if name in _RANGE_COLUMNS:
            return with_minus_signs(text)
        return capitalize_acronyms(text) if name in _NAME_COLUMNS else text

    def _is_shown_in_caption(self, column: int) -> bool:
        """Return whether a column is shown in the caption instead of the table.

        A column of a table with several rows is shown in the caption if all its cells are equal.
        Except for the first, a column of a wide table with one row is shown there if its cell is
        empty, text or a mean of equal values. A column with a numeric name is a point of a curve,
        as in a performance profile, and stays in the table.
        """
        if _NUMERAL.fullmatch(self.columns[column]):
            return False
        if len(self.rows) > 1:
            return len({repr(row[column]) for row in self.rows}) == 1
        wide = len(self.rows) == 1 and len(self.columns) >= _MIN_WIDE_COLUMNS
        return wide and column > 0 and _is_movable_to_caption(self.rows[0][column])

    def _caption_html(self) -> str:
        """Return the note with the columns in the caption, or an empty string."""
        facts = [
            f"{capital_acronyms_html(self.columns[i])} {self._common_cell_html(i)}"
            for i in range(len(self.columns))
            if self._is_shown_in_caption(i) and self.rows[0][i] is not None
        ]
        lead = "In every row" if len(self.rows) > 1 else "Also"
        return f'<p class="note">{lead}: {"; ".join(facts)}.</p>' if facts else ""

    def _common_cell_html(self, column: int) -> str:
        """Return the HTML of the common cell of a column in the caption."""
        cell = self.rows[0][column]
        if isinstance(cell, Interval):
            return esc(number_text(cell.value))
        return cell_content_html(
            self._display_text(cell, column) if isinstance(cell, str) else cell
        )

    def to_csv(self) -> str:
        """Return comma-separated values with a header line.

        An Interval in column `x` becomes the columns `x`, `x low`, `x high` and `x n`.
        """
        records = self.to_records()
        names = list(dict.fromkeys(key for record in records for key in record))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(map(formula_safe_csv_cell, names or self.columns))
        writer.writerows(
            [formula_safe_csv_cell(record.get(name)) for name in names] for record in records
        )
        return out.getvalue()

    def to_json(self) -> str:
        """Return the result of `to_records` as JSON text."""
        return json.dumps(self.to_records(), indent=1, ensure_ascii=False) + "\n"

    def to_records(self) -> list[dict[str, str | int | float | None]]:
        """Return one dictionary for each row: column -> value.

        An Interval in column `x` becomes the keys `x`, `x low`, `x high` and `x n`.
        """
        return [
            {
                key: value
                for name, cell in zip(self.columns, row, strict=True)
                for key, value in _cell_columns(name, cell)
            }
            for row in self.rows
        ]


def esc(text: object) -> str:
    """Return text escaped for HTML, including quotes.

    Control characters and characters that change the text direction are replaced by visible
    escapes.
    """
    return html.escape(escape_invisible(str(text)))


def breakable_html(text: str) -> str:
    """Return escaped text with possible line breaks after slashes, underscores and dots."""
    return re.sub(r"([/\\_.])(?=\w)", r"\1<wbr>", esc(text))


def capitalize_acronyms(text: str) -> str:
    """Return the text with acronyms in capitals: `ppo-seed0` -> `PPO-seed0`."""
    return _ACRONYMS.sub(lambda match: match.group().upper(), text)


def capital_acronyms_html(text: str) -> str:
    """Return the escaped text with acronyms in capitals."""
    return esc(capitalize_acronyms(text))


def sentence_html(text: str) -> str:
    """Return a sentence as HTML: first letter and acronyms in capitals, backticks as code."""
    return re.sub(
        r"`([^`]+)`", r"<code>\1</code>", capital_acronyms_html(text[:1].upper() + text[1:])
    )


def with_minus_signs(text: str) -> str:
    """Return the text with a minus sign instead of a hyphen before negative numbers."""
    return re.sub(r"(?<![^\s\[(])-(?=[\d.])", "−", text)


def number_text(value: float) -> str:
    """Return a number formatted by `decimal_text`, with a minus sign instead of the hyphen."""
    return decimal_text(value).replace("-", "−")


def interval_text(estimate: Interval) -> str:
    """Return the interval as text, such as `[0.380, 0.444]`, or why there is no interval."""
    if not estimate.known:
        return f"no interval: {estimate.needs or f'n = {estimate.units}'}"
    return f"[{number_text(estimate.low)}, {number_text(estimate.high)}]"


def cell_content_html(cell: Cell) -> str:
    """Return the HTML content of a table cell."""
    if cell is None:
        return '<span class="note">–</span>'
    if isinstance(cell, Interval):
        style = "interval" if cell.known else "interval missing"
        return f'{number_text(cell.value)} <span class="{style}">{interval_text(cell)}</span>'
    if isinstance(cell, str):
        return esc(cell)
    return number_text(cell) if isinstance(cell, float) else with_minus_signs(str(cell))


def duration_text(seconds: float) -> str:
    """Return a duration such as `45 s`, `4 min 12 s` or `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def section_html(title: str, *parts: str) -> str:
    """Return the HTML of a section with a heading, or an empty string if all parts are empty."""
    body = "".join(parts)
    if not body:
        return ""
    return f'<section id="{section_id(title)}"><h2>{esc(title)}</h2>{body}</section>'


def section_id(title: str) -> str:
    """Return the id of a section: `Proxy and gold` becomes `proxy-and-gold`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def table_of_contents_html(body: str) -> str:
    """Return links to the sections in `body`, or an empty string for fewer than three sections."""
    titles = dict.fromkeys(re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', body))
    if len(titles) < 3:
        return ""
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in titles)
    return f'<nav class="contents" aria-label="Contents">{links}</nav>'


def _alignment_attribute(is_numeric: bool) -> str:
    """Return the attribute that right-aligns a cell, or an empty string."""
    return ' class="n"' if is_numeric else ""


def _is_movable_to_caption(cell: Cell) -> bool:
    """Return whether a cell is text, empty, or an Interval of equal units."""
    if isinstance(cell, Interval):
        return EQUAL_UNITS_REASON in cell.needs
    return isinstance(cell, str | None)


def _cell_columns(name: str, cell: Cell) -> list[tuple[str, str | int | float | None]]:
    """Return the (column, value) pairs of a cell, four for an Interval."""
    if not isinstance(cell, Interval):
        return [(name, cell)]
    values = cell.as_dict()
    return [
        (name, values["mean"]),
        (f"{name} low", values["low"]),
        (f"{name} high", values["high"]),
        (f"{name} n", values["n"]),
    ]
