"""Prepare text for output: escape it for terminals, Markdown and CSV, and mask secrets."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rlhf.common.numbers import is_number

# The pattern matches:
# - control characters, except newline, tab and the return of "\r\n";
# - characters of the bidirectional algorithm, which reorder the text that follows;
# - lone surrogates, which cannot be encoded;
# - line separators.
_INVISIBLE_PATTERN = re.compile(
    r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_MARKDOWN_PATTERN = re.compile(
    r"^(?=[#>]|[+-]\s)"  # a heading, a quotation or a list
    r"|[\\`|*~]|(?<!\w)_|_(?!\w)"  # code, cells of a table, emphasis
    r"|\](?=[(\[:])"  # the target of a link or an image
    r"|<(?=[\w/!?])|&(?=[#\w])"  # HTML
)

_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

SECRET_KEY = re.compile(
    r"(.*[-_])?((api|secret|access|private)[-_]?key|secret|passw(or)?d|passphrase|credentials?"
    r"|authorization|cookie)|(.*[-_])?(hub|hf|access|auth|bearer|api|refresh|secret)[-_]?token|token",
    re.IGNORECASE,
)
"""Pattern of the names of configuration keys and options whose values are secret."""
_SECRET_VARIABLE = re.compile(
    r".*(token|key|secret|passw(or)?d|credentials?|authorization)|(.*_)?(pass|pw)", re.IGNORECASE
)
"""Pattern of the names of environment variables whose values are secret."""

_SECRET_PATTERN = re.compile(
    # The name and the password in a URL. A slash in the password is accepted, although it should be
    # escaped. One slash after the scheme is accepted, because pathlib removes the other one.
    r"(?P<url>\b[a-z][a-z0-9+.-]*:(?://(?=[^\s/?#]+@|[^\s/?#@:\[]+:(?!\d*[/?#])[^\s@]+@)"
    r"|/(?=[^\s/?#@:]+:[^\s/?#@]+@)))(?:[^\s/?#]+|[^\s@]+)@"
    r"|(?P<query>[?&](?:api_?key|key|token|access_token|passw(?:or)?d|pass|secret|sig|signature"
    r"|x-(?:amz|goog)-(?:signature|security-token))=)[^\s&#]+"
    r"|(?P<header>\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|digest|token|apikey)\s+"
    r"|api[-_]?key[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d))[\w.~+/=-]{8,}"  # a digit excludes prose
    r"|(?P<bearer>\bbearer\s+)[\w.~+/=-]{8,}"
    r"|\b(?:sk|pk|rk)-[\w-]{16,}|\bhf_\w{16,}|\bgh[opsur]_\w{20,}|\bgithub_pat_\w{20,}"
    r"|\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bglpat-[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]{0,16384}?-----END [A-Z ]*PRIVATE KEY-----)?",
    re.IGNORECASE,
)
SECRET_MASK = "***"


def escape_invisible(text: str) -> str:
    r"""Replace control characters and similar characters by their JSON escapes.

    These are control characters except tabs and line ends, characters that reorder text, line
    separators and lone surrogates. If the text is JSON, the result is JSON with the same value.

    >>> escape_invisible("a" + chr(27) + "[2J")
    'a\\u001b[2J'
    """
    return _INVISIBLE_PATTERN.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def escape_markdown(text: str) -> str:
    r"""Return text on one line with Markdown's special characters escaped.

    >>> escape_markdown("a|b [c](d) _e_ f_g [0.1, 0.2]")
    'a\\|b [c\\](d) \\_e\\_ f_g [0.1, 0.2]'
    """
    return _MARKDOWN_PATTERN.sub(
        lambda match: "\\" + match.group(), escape_invisible(" ".join(text.split()))
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. Column names and cells are plain text and are escaped."""
    head, *body = (f"| {' | '.join(map(escape_markdown, cells))} |\n" for cells in [columns, *rows])
    return "".join([head, f"|{'---|' * len(columns)}\n", *body])


def formula_safe_csv_cell(cell: Any) -> Any:
    """Return a cell for a CSV file whose text a spreadsheet does not evaluate as a formula.

    An apostrophe is added before text that begins with ``= + - @``, one of their full-width forms,
    a tab or a line end. Numbers such as ``-0.5`` get no apostrophe. Every text is escaped with
    `escape_invisible`. Values that are not text are returned unchanged.
    """
    if not isinstance(cell, str):
        return cell
    text = escape_invisible(cell)
    return f"'{text}" if text.startswith(_FORMULA_PREFIXES) and not _is_number(text) else text


def count_text(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 stage`, `3 stages`.

    Args:
        count: The count.
        noun: The noun in the singular.
        plural: Its plural, if it does not only add an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def reason_counts_text(counts: Mapping[str, int]) -> str:
    """Return the counts of reasons, without those that are 0: `2 no margin, 1 tie`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)


def mask_secrets(text: str) -> str:
    """Replace secrets by ``***``.

    Secrets are credentials in URLs and authorization headers, keys in well-known formats, and
    values of at least 8 characters of environment variables with secret names, except paths of
    existing files.

    >>> mask_secrets("http://me:pw@host/v1?token=abc")
    'http://***@host/v1?token=***'
    """
    for name, value in os.environ.items():
        value = value.strip()
        # The value of a variable such as SSH_KEY can be a path, which is not a secret.
        if len(value) >= 8 and _SECRET_VARIABLE.fullmatch(name) and not os.path.exists(value):
            for secret in (value, quote(value, safe="", errors="replace")):
                text = text.replace(secret, SECRET_MASK)
    return _SECRET_PATTERN.sub(_replace_secret, text)


def mask_secret_options(words: Sequence[str]) -> list[str]:
    """Return a command line with ``***`` instead of secrets and of the values of secret options."""
    result, hide = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        name = option.lstrip("-").rpartition(".")[2].replace("-", "_")
        is_secret = word.startswith("-") and SECRET_KEY.fullmatch(name) is not None
        hidden = f"{option}={SECRET_MASK}" if is_secret and equals else mask_secrets(word)
        result.append(SECRET_MASK if hide and not word.startswith("--") else hidden)
        hide = is_secret and not equals
    return result


def first_secret_key(tree: Any) -> str | None:
    """Return the dotted key of the first secret value in plain data, or None without secrets.

    A text is secret if `SECRET_KEY` matches its key or `mask_secrets` changes it, and a number if
    `SECRET_KEY` matches its key.
    """
    return next(_secret_keys(tree, ""), None)


class SafeLogFormatter(logging.Formatter):
    """Formatter that escapes control codes and masks secrets in log messages."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record, with control characters escaped and secrets masked."""
        return mask_secrets(escape_invisible(super().format(record)))


def set_up_logging(level: int) -> None:
    """Write log messages whose level is at least ``level`` to standard error.

    If the root logger already has a handler, the function has no effect.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SafeLogFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _replace_secret(match: re.Match[str]) -> str:
    prefix = next(filter(None, match.group("url", "query", "header", "bearer")), "")
    return prefix + SECRET_MASK + ("@" if match["url"] else "")


def _secret_keys(node: Any, key: str) -> Iterator[str]:
    """Yield the dotted keys of the secret values in ``node``, whose own dotted key is ``key``."""
    name = next((part for part in reversed(key.split(".")) if not part.isdecimal()), "")
    named_secret = SECRET_KEY.fullmatch(name) is not None  # also in a list under a secret key
    if isinstance(node, str) and node:
        if named_secret or mask_secrets(node) != node:
            yield key
    elif is_number(node) and named_secret:
        yield key
    elif isinstance(node, Mapping | list | tuple):
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for name, value in items:
            yield from _secret_keys(value, f"{key}.{name}" if key else str(name))


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def after_thinking(text: str) -> str:
    """Return the text after the last ``</think>``, and before a ``<think>`` that is not closed."""
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]
