"""Every verb that makes a run directory: its configuration, and the function that does the work.

Names are strings until a verb is used, so that `rlhf --help` imports no torch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms import registry
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.imports import import_object
from rlhf.common.names import nearest
from rlhf.config.help import help_text
from rlhf.config.load import as_tree, build
from rlhf.errors import UserError
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A row of the table. ``options`` maps a configuration field to the class that checks it."""

    summary: str
    config: str
    run: str
    options: Mapping[str, str]


def _offline(
    summary: str, options: str, config: str = "rlhf.config.offline:OfflineConfig"
) -> Command:
    return Command(
        summary,
        config,
        "rlhf.training.offline:train_offline",
        {"trainer": options},
    )


def _online(summary: str) -> Command:
    return Command(
        summary,
        "rlhf.config.online:OnlineConfig",
        "rlhf.training.online:train_online",
        {"algorithm": "rlhf.algorithms.settings:Settings"},
    )


VERBS: dict[str, Command] = {
    "demos": Command(
        "write demonstrations and pairs of an environment's expert",
        "rlhf.commands.preparation:DemosConfig",
        "rlhf.commands.preparation:write_demos",
        {},
    ),
    "split": Command(
        "split a data set by prompt",
        "rlhf.commands.preparation:SplitConfig",
        "rlhf.commands.preparation:write_split",
        {},
    ),
    "pairs": Command(
        "preference pairs over a model's own replies, judged by a known score",
        "rlhf.studies.preference_pairs:PairsConfig",
        "rlhf.studies.preference_pairs:write_pairs",
        {},
    ),
    "sft": _offline("supervised fine-tuning on demonstrations", "trl:SFTConfig"),
    "reward": _offline(
        "train a reward model on pairs, rankings, labels or steps",
        "trl:RewardConfig",
        "rlhf.config.reward:RewardConfig",
    ),
    "dpo": _offline("direct preference optimisation", "trl:DPOConfig"),
    "kto": _offline("Kahneman-Tversky optimisation on labelled replies", "trl:KTOConfig"),
    **{name: _online(row.title) for name, row in ALGORITHMS.items()},
    "reward-report": Command(
        "can this reward be trusted? accuracy, calibration, baselines, stress tests, a verdict",
        "rlhf.studies.reward_report:RewardReportConfig",
        "rlhf.studies.reward_report:run_reward_report",
        {},
    ),
    "overoptimize": Command(
        "optimise proxies of a known gold score too far, and say where to stop",
        "rlhf.config.overoptimize:OveroptimizeConfig",
        "rlhf.studies.overoptimize.run:run_overoptimize",
        {},
    ),
    "evaluate": Command(
        "measure policies and rewards on held-out episodes, text or pairs",
        "rlhf.config.evaluate:EvaluateConfig",
        "rlhf.evaluation.runner:run_evaluation",
        {},
    ),
}


def verb_named(name: str) -> Command:
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
    options = {field: import_object(path) for field, path in verb.options.items()}
    return build(import_object(verb.config), tree, options)


def settings_in_force(name: str, config: Any) -> dict[str, Any]:
    """A verb's configuration as plain data, with every setting that the run uses.

    An algorithm's own settings and the defaults of the trainer stand beside the keys that the user
    set, so that ``config.yaml`` says what was trained. Settings without an effect are left out.

    Args:
        name: of the verb.
        config: what ``configure`` made.
    """
    tree = as_tree(config)
    if "algorithm" in verb_named(name).options:
        from rlhf.config.online import algorithm_of

        algorithm = algorithm_of(name, config)
        tree["algorithm"] = {
            key: value
            for key, value in dataclasses.asdict(algorithm.settings).items()
            if key in algorithm.effective
        }
    if "trainer" in verb_named(name).options:
        known = {k: v for k, v in _trainer_defaults(name).items() if v is not None}
        tree["trainer"] = {**known, **tree["trainer"]}
    return tree


def from_record(name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration tree, or the ``config.yaml`` of a run, as a verb takes it.

    A run's record names every setting of its algorithm. Those that keep their default are left out
    here, so that an override may make them ineffective (`algorithm.num_epochs 1` and the clipping).

    Raises:
        UserError: the record is one of another verb.
    """
    rest = dict(tree)
    written = rest.pop("verb", None)
    if written is None:
        return rest
    if written != name:
        raise UserError(f"the configuration is one of `rlhf {written}`, not of `rlhf {name}`")
    if name in ALGORITHMS and isinstance(rest.get("algorithm"), Mapping):
        defaults = dataclasses.asdict(ALGORITHMS[name].settings)
        settings = rest["algorithm"].items()
        rest["algorithm"] = {k: v for k, v in settings if k not in defaults or v != defaults[k]}
    return rest


def _trainer_defaults(verb: str) -> dict[str, Any]:
    """Options of an offline stage where ``trainer`` sets none; both engines use these values."""
    from rlhf.config.offline import LEARNING_RATES
    from rlhf.config.optimization import OPTIONS, NativeOptions

    fields = dataclasses.fields(OPTIONS.get(verb, NativeOptions))
    values = {field.name: field.default for field in fields}
    values["learning_rate"] = LEARNING_RATES[verb]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def help_of(name: str, tree: Mapping[str, Any]) -> str:
    """What ``rlhf VERB --help`` prints: the keys that have an effect, with the values in force.

    Args:
        name: of the verb.
        tree: keys that were given beside ``--help``. ``engine: trl`` lists TRL's options, and
            settings of an algorithm decide which others have an effect.
    """
    verb = verb_named(name)
    options = {field: import_object(path) for field, path in verb.options.items()}
    defaults: dict[str, Any] = {}
    hidden: set[str] = set()
    note = ""
    if "algorithm" in options:
        row = registry.configure(name, **tree.get("algorithm", {}))
        settings = dataclasses.asdict(row.settings)
        defaults = {f"algorithm.{key}": value for key, value in settings.items()}
        hidden = {f"algorithm.{key}" for key in settings if key not in row.effective}
        hidden |= set() if row.critic else {"critic", "critic_warmup_steps"}
        note = (
            "Settings that have no effect with these values are left out; "
            f"`rlhf {name} --algorithm.num_minibatches 4 --help` shows those of several steps."
        )
    elif "trainer" in options:
        defaults = {f"trainer.{key}": value for key, value in _trainer_defaults(name).items()}
        hidden = _hidden_trainer_options(name, options, all_of_trl=tree.get("engine") == "trl")
        if tree.get("engine") != "trl":
            note = f"`rlhf {name} --engine trl --help` lists every option of TRL's trainer."
    return help_text(
        import_object(verb.config),
        command=f"rlhf {name}",
        summary=verb.summary,
        options=options,
        defaults=defaults,
        hidden=hidden,
        notes=[note] if note else [],
    )


def _hidden_trainer_options(verb: str, options: dict[str, type], *, all_of_trl: bool) -> set[str]:
    """Keys of ``trainer`` that the help leaves out; the native engine's own class is put in."""
    from transformers import TrainingArguments

    from rlhf.config.offline import OWNED
    from rlhf.config.optimization import OPTIONS, NativeOptions

    hidden = set(OWNED)
    if not all_of_trl and verb in OPTIONS:
        options["trainer"] = OPTIONS[verb]
    elif not all_of_trl:
        shared = {field.name for field in dataclasses.fields(NativeOptions)}
        hidden |= {field.name for field in dataclasses.fields(TrainingArguments)} - shared
    return {f"trainer.{key}" for key in hidden}


def run_command(name: str, tree: Mapping[str, Any]) -> Path:
    """Check a configuration, open its run directory, do the work, draw the report.

    Args:
        name: of the verb.
        tree: its configuration as plain data.

    Returns:
        What the verb leaves: a model's folder, or the run directory.

    Raises:
        UserError: with one line that says what to do.
    """
    from rlhf.reports import write_report

    config = configure(name, tree)
    run = Run.open({"verb": name, **settings_in_force(name, config)})
    if run.finished:
        log.info("%s is finished: nothing to do", run.directory)
        return run.final if run.final.exists() else run.directory
    try:
        result = import_object(verb_named(name).run)(name, config, run)
    except (ValueError, OSError):  # UserError among them
        run.discard_if_unused()
        raise
    run.finish()
    if run.writes:
        write_report(run.directory)
    return result
