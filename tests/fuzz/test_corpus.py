"""Every case that once failed passes."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fuzz.configurations import check_configuration, check_text
from tests.fuzz.corpus_files import FOLDER, time_limit
from tests.fuzz.replies import check_game, check_reply, check_template
from tests.fuzz.rows import check_rows

CHECKS: dict[str, Callable[[Any], object]] = {
    "configuration": check_configuration,
    "text": check_text,
    "rows": check_rows,
    "reply": check_reply,
    "game": check_game,
    "template": check_template,
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_cases_that_failed_pass(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    with time_limit():
        CHECKS[content["target"]](content["case"])
