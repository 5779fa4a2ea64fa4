"""Reading rows from a temporary file."""

import pytest

from rlhf.common.files import write_jsonl
from rlhf.data import DataSpec, load


@pytest.fixture
def read(tmp_path):
    def read(rows, kind, *, keep=(), facts=False, **spec):
        path = tmp_path / "data.jsonl"
        write_jsonl(path, rows)
        return load(DataSpec(str(path), **spec), kind, seed=0, keep=keep, facts=facts)

    return read
