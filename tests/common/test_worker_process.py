"""Worker processes do not run the user's script again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """\
import math
from concurrent.futures import ProcessPoolExecutor

from rlhf.common.worker_process import SpawnContextWithoutUserScript

print("the script runs")
with ProcessPoolExecutor(2, mp_context=SpawnContextWithoutUserScript()) as pool:
    print(list(pool.map(math.sqrt, [4.0, 9.0])))
print(__name__, __file__.endswith("script.py"))
"""


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["the script runs", "[2.0, 3.0]", "__main__ True"]
