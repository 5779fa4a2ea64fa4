"""Code blocks of the documentation, and the output that their comments promise."""

import re
import textwrap
from pathlib import Path


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(content) for _, language, content in found if language in languages]


def promised(code: str) -> list[str]:
    """Output that the comments at the end of a `print` or below it promise."""
    return re.findall(r"^ *print\(.*\)\s+# (.*)$", code, flags=re.MULTILINE)
