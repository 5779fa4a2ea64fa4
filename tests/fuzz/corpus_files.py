"""The corpus: one small JSON file for each failure that fuzzing has caused.

A sweep that fails writes its case to the corpus folder and names the file; the file is committed
with the correction, and `test_corpus.py` repeats every case in the default tests.
"""

from __future__ import annotations

import json
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "corpus"
SECONDS = 20
"""Time limit of one case."""


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"the case takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_case(target: str, check: Callable[[Any], object], case: Any, seed: str) -> None:
    """Run one case; write it to the corpus if it fails.

    Raises:
        AssertionError: The case raised; the message has the seed, the case and its file.
    """
    try:
        with time_limit():
            check(case)
    except Exception as error:
        text = json.dumps({"target": target, "case": case}, indent=1) + "\n"
        path = FOLDER / f"{target}-{zlib.crc32(text.encode()):08x}.json"
        path.write_text(text, encoding="utf-8")
        raise AssertionError(
            f"seed {seed}: {type(error).__name__}: {error}; case {path}"
        ) from error
