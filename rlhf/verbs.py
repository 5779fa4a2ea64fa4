"""Every verb that makes a run directory: its configuration, and the function that does the work.

Names are strings until a verb is used, so that `rlhf --help` imports no torch.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.config import as_tree, build
from rlhf.errors import UserError, nearest
from rlhf.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verb:
    """A row of the table. ``options`` maps a configuration field to the class that checks it."""

    summary: str
    config: str
    run: str
    options: Mapping[str, str]


def _offline(
    summary: str, options: str, config: str = "rlhf.training.offline_config:OfflineConfig"
) -> Verb:
    return Verb(
        summary,
        config,
        "rlhf.training.offline:train_offline",
        {"trainer": options},
    )


def _online(summary: str) -> Verb:
    return Verb(
        summary,
        "rlhf.training.online_config:OnlineConfig",
        "rlhf.training.online:train_online",
        {"algorithm": "rlhf.algorithms.settings:Settings"},
    )


VERBS: dict[str, Verb] = {
    "demos": Verb(
        "write demonstrations and pairs of an environment's expert",
        "rlhf.preparation:DemosConfig",
        "rlhf.preparation:write_demos",
        {},
    ),
    "split": Verb(
        "split a data set by prompt",
        "rlhf.preparation:SplitConfig",
        "rlhf.preparation:write_split",
        {},
    ),
    "pairs": Verb(
        "preference pairs over a model's own replies, judged by a known score",
        "rlhf.studies.preferences:PairsConfig",
        "rlhf.studies.preferences:write_pairs",
        {},
    ),
    "sft": _offline("supervised fine-tuning on demonstrations", "trl:SFTConfig"),
    "reward": _offline(
        "train a reward model on pairs, rankings, labels or steps",
        "trl:RewardConfig",
        "rlhf.training.reward_config:RewardConfig",
    ),
    "dpo": _offline("direct preference optimisation", "trl:DPOConfig"),
    "kto": _offline("Kahneman-Tversky optimisation on labelled replies", "trl:KTOConfig"),
    **{name: _online(row.title) for name, row in ALGORITHMS.items()},
    "reward-report": Verb(
        "can this reward be trusted? accuracy, calibration, baselines, stress tests, a verdict",
        "rlhf.studies.reward_report:RewardReportConfig",
        "rlhf.studies.reward_report:run_reward_report",
        {},
    ),
    "overoptimize": Verb(
        "optimise proxies of a known gold score too far, and say where to stop",
        "rlhf.studies.overoptimize_config:OveroptimizeConfig",
        "rlhf.studies.overoptimize:run_overoptimize",
        {},
    ),
    "evaluate": Verb(
        "measure policies and rewards on held-out episodes, text or pairs",
        "rlhf.evaluation.config:EvaluateConfig",
        "rlhf.evaluation.stage:run_evaluation",
        {},
    ),
}


def find(path: str) -> Any:
    """The object that ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def verb_named(name: str) -> Verb:
    """The row of that name.

    Raises:
        UserError: there is none.
    """
    if name not in VERBS:
        raise UserError(f"unknown verb {name!r}{nearest(name, VERBS)}")
    return VERBS[name]


def configure(name: str, tree: Mapping[str, Any]) -> Any:
    """The checked configuration of a verb."""
    verb = verb_named(name)
    options = {field: find(path) for field, path in verb.options.items()}
    return build(find(verb.config), tree, options)


def execute(name: str, tree: Mapping[str, Any]) -> Path:
    """Check a configuration, open its run directory, do the work, draw the report.

    Args:
        name: of the verb.
        tree: its configuration as plain data.

    Returns:
        What the verb leaves: a model's folder, or the run directory.

    Raises:
        UserError: with one line that says what to do.
    """
    from rlhf.evaluation.report import write_report

    config = configure(name, tree)
    run = Run.open({"verb": name, **as_tree(config)})
    if run.finished:
        log.info("%s is finished: nothing to do", run.directory)
        return run.final if run.final.exists() else run.directory
    try:
        result = find(verb_named(name).run)(name, config, run)
    except (ValueError, OSError):  # UserError among them
        run.discard_if_unused()
        raise
    run.finish()
    if run.writes:
        write_report(run.directory)
    return result
