"""The command line: a verb, then options; every mistake is one readable line and exit code 2.

Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf import __version__
from rlhf.common.names import nearest
from rlhf.errors import UserError

USAGE = """\
usage: rlhf VERB [--config FILE ...] [--key value ...]

Whole experiments
  run PIPELINE.yaml      every stage of a pipeline in order, then one report
  report DIR...          draw report.html of a run or a pipeline; several runs: a comparison
  compare RUN...         paired differences with intervals; names no winner inside noise
  bench MANIFEST.yaml    environments x algorithms x seeds, normalised; a gate for CI
  tune STUDY.yaml        equally many trials for every algorithm, before a comparison

Training (each makes a run directory)
{training}

Measuring and using
  evaluate               policies on held-out episodes and text, rewards on pairs
  reward-report          can a reward be trusted? any reward, on pairs or a public benchmark
  overoptimize           optimise proxies of a known gold score too far; where to stop
  generate               replies of a model to prompts
  score                  scores of a reward for conversations

Data, models, environments
  demos, split, pairs    write demonstrations; split by prompt; judge a model's own replies
  data check FILE...     duplicates, leakage, contradictions, suspects
  models list|get|merge  short names; fetch one; merge a LoRA into its base
  envs list|demos|play|check
  algorithms             every online algorithm with its paper, equation and settings

Options of every verb
  --config FILE          YAML; repeatable, later files win
  --key.sub value        override; `rlhf VERB --help` lists the keys
  --print-config         show the checked configuration and stop
  --dry-run              check everything, print batch algebra and memory, train nothing
  --debug                show the traceback of an error
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 a mistake told in one line)."""
    from rlhf.runs import launch

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"rlhf {__version__}")
        return 0
    launch.prepare()
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "datasets", "filelock", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code = dispatch(arguments[0], arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `rlhf envs list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes it
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("rlhf: stopped by the user", file=sys.stderr)
        return 2
    except Exception as error:
        if debug or not _is_user_mistake(error):
            traceback.print_exc()
            return 1
        print(f"rlhf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_user_mistake(error: Exception) -> bool:
    """Our own refusals, and files that cannot be read or written; all else is a bug."""
    if isinstance(error, UserError | FileNotFoundError | PermissionError):
        return True
    if not isinstance(error, ValueError | ImportError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[1]
    return bool(frames) and Path(frames[-1].filename).is_relative_to(package)


def usage() -> str:
    """The help text, the training verbs taken from their table."""
    from rlhf.cli.table import VERBS

    outside = ("demos", "split", "pairs", "evaluate", "reward-report", "overoptimize")
    lines = [f"  {n:<22} {v.summary}" for n, v in VERBS.items() if n not in outside]
    return USAGE.format(training="\n".join(lines))


def dispatch(verb: str, arguments: list[str]) -> int:
    """Hand the arguments to the verb."""
    from rlhf.cli import commands, study_commands
    from rlhf.cli.table import VERBS

    if verb in VERBS:
        return commands.stage(verb, arguments)
    table: dict[str, Callable[[list[str]], int]] = {
        "run": commands.run,
        "report": commands.report,
        "compare": commands.compare,
        "bench": study_commands.bench,
        "tune": study_commands.tune,
        "generate": commands.generate,
        "score": commands.score,
        "data": commands.data,
        "models": commands.models,
        "envs": commands.envs,
        "algorithms": commands.algorithms,
    }
    if verb not in table:
        raise UserError(f"unknown verb {verb!r}{nearest(verb, [*VERBS, *table])}; see rlhf --help")
    return table[verb](arguments)
