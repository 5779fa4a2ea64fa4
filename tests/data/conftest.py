"""Reading rows from a temporary file."""

import pytest

from rlhf.common.files import write_jsonl
from rlhf.data import DataSpec, load


@pytest.fixture
def read(tmp_path):
    def read(rows, kind, *, keep=(), with_answer_and_tests=False, **spec):
        path = tmp_path / "data.jsonl"
        write_jsonl(path, rows)
        return load(
            DataSpec(str(path), **spec),
            kind,
            seed=0,
            keep=keep,
            with_answer_and_tests=with_answer_and_tests,
        )

    return read
