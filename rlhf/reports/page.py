"""Build the HTML document: one file with inline style and script, which makes no requests."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from rlhf.common.files import write_text
from rlhf.errors import UserError
from rlhf.reports.markup import esc, table_of_contents_html

_SCRIPTS = ("report.js", "scatter.js")
"""Files of the script of a page."""
# The content security policy blocks all requests, and all scripts except that with this hash.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src '{hash}'; img-src data:"
)


_HEAD_CHARACTERS = 1000
"""Number of characters at the start of a page that contain its content security policy."""


def write_page(path: Path, html: str) -> None:
    """Write a page of `page_html` to a path that a user chose.

    Raises:
        UserError: The path is a folder, or a file that is not such a page.
    """
    check_page_path(path)
    write_text(path, html)


def check_page_path(path: Path) -> None:
    """Check that a page does not replace a file that is not a page of the toolkit.

    Raises:
        UserError: The path is a folder, or a file that is not a page of `page_html`.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a file")
    policy = _CONTENT_SECURITY_POLICY.partition("{hash}")[0]
    with path.open(encoding="utf-8", errors="replace") as file:
        if policy not in file.read(_HEAD_CHARACTERS):
            raise UserError(
                f"{path} is not a page of this toolkit, so it is not replaced: choose another path"
            )


def page_html(title: str, body: str) -> str:
    """Return an HTML document with `body`; a table of contents is inserted after its header."""
    head, closing, rest = body.partition("</header>")
    body = f"{head}{closing}{table_of_contents_html(body)}{rest}"
    home = files("rlhf.reports")
    parts = [home.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = "\n" + "".join(parts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = _CONTENT_SECURITY_POLICY.format(hash=f"sha256-{digest}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{esc(title)}</title>
<style>
{stylesheet()}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def stylesheet() -> str:
    """Return the style sheet of reports, which interactive pages share."""
    return files("rlhf.reports").joinpath("report.css").read_text(encoding="utf-8")
