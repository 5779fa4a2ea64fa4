"""Run the command line with `python -m rlhf`."""

import os
import sys

from rlhf.cli.main import run_program

if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(run_program())
