"""Find, check and record the settings that change when a run is resumed.

A run is resumed with its recorded configuration. More training steps are always permitted, and
``allow_changes`` permits changes of other keys. A few keys can never change, because a checkpoint
is valid only with their values. Every change is a line of ``changes.jsonl``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from rlhf.common.columns import INTEGER, TEXT
from rlhf.common.files import json_line, read_log, write_text
from rlhf.common.names import did_you_mean
from rlhf.common.numbers import is_number
from rlhf.common.plugins import object_name
from rlhf.common.text import count_text
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.runs.inputs import input_fingerprints, leaf_items
from rlhf.runs.renamed import check_not_recorded_by_old_version, upgraded_config

CHANGES_FILE = "changes.jsonl"
"""Name of the file in a run directory that records the changes of its settings."""

# Keys that concern only the directory of a run; config.yaml does not contain them.
DIRECTORY_KEYS = frozenset({"allow_changes", "resume", "overwrite", "output_dir"})
# Keys that may differ between a run and its resumption.
KEYS_IGNORED_ON_RESUME = DIRECTORY_KEYS | {"track", "alarms", "data_processes", "data_cache"}
_EPOCHS = "trainer.num_train_epochs"
STEP_KEYS = ("num_steps", "trainer.max_steps", _EPOCHS)
"""Keys that determine the number of training steps. They may always increase."""

_NO_CHECKPOINT = (
    "is finished and has no checkpoint from which it could continue: start a new run with "
    "model.path set to its folder final"
)
_MODEL = "a checkpoint contains the weights of this model, and the initial model is the reference"
_ROWS = "the order of the rows and the held-out rows are derived from it"
_OPTIMIZER = "a checkpoint contains the state of this optimizer"
_LOSS = "it defines the held-out loss by which the best model is selected"
_STATE = "it is only the value at step 0, and a checkpoint contains the current value"
_UPDATES = "the learning rate schedule counts the updates of all steps"
_SELECTION = "with keep_best, it defines the score by which the best model is selected"

FIXED_KEYS: dict[str, str] = {
    "command": "a checkpoint contains the state of one training method",
    "seed": "the episodes, the order of the rows and the held-out part are derived from it",
    "model": _MODEL,
    "critic": "a checkpoint contains the weights of this critic",
    "optimizer.name": _OPTIMIZER,
    "trainer.optim": _OPTIMIZER,
    "engine": "it determines the format of checkpoints",
    "sharding": "it determines the format of checkpoints",
    "rollout.engine.kind": "a checkpoint contains replies that this engine sampled",
    "callbacks": "a checkpoint contains the states of these callbacks",
    "kl.controller": "a checkpoint contains the state of this controller",
    "algorithm.multiplier_init": _STATE,
    "algorithm.num_epochs": _UPDATES,
    "algorithm.num_minibatches": _UPDATES,
    "data": _ROWS,
    "eval_data": _ROWS,
    "eval_fraction": _ROWS,
    "max_length": _ROWS,
    "batch_size": _ROWS,
    "env.prompts": "the policy may have been trained on prompts that are held out now",
    "evaluation.prompts_fraction": "the policy may have been trained on prompts that are held out "
    "now",
    "kind": _MODEL,
    "labels": _MODEL,
    "num_heads": _MODEL,
    "separator": _ROWS,
    "margins": _LOSS,
    "flip_rate": _LOSS,
    "length_coef": _LOSS,
    "trainer.beta": _LOSS,
    "trainer.loss_type": _LOSS,
    "trainer.loss_weights": _LOSS,
    "trainer.center_rewards_coefficient": _LOSS,
}
"""Dotted key of a section or setting that can never change -> reason."""

_SELECTION_KEYS = ("env", "evaluation", "gold", "rewards", "rollout.system")
# Earlier versions did not have these keys, so their records contain no value.
_NEW_LISTS = ("callbacks", "plugins")
# Prefix of the keys of the rollout engine. All of them except the kind may also differ.
_ENGINE_KEYS = "rollout.engine."
_ENGINE_KIND = f"{_ENGINE_KEYS}kind"
_MAX_STALENESS = "rollout.max_staleness"


@dataclass(frozen=True)
class Change:
    """A setting that differs between the record of a run and its resumption."""

    key: str
    """Dotted key."""
    before: Any
    """Recorded value; None if the key had no value."""
    after: Any
    """New value; None if the key has no value."""
    content_changed: bool = False
    """Whether the path is the same and the content of the file or folder has changed. The values
    are then fingerprints of the content."""

    @property
    def increases_steps(self) -> bool:
        """Whether the change increases the number of training steps."""
        values = (self.before, self.after)
        return (
            self.key in STEP_KEYS and all(map(is_number, values)) and 0 < self.before < self.after
        )

    def __str__(self) -> str:
        before, after = (
            shorten(repr(value), 100, placeholder="…") for value in (self.before, self.after)
        )
        what = "content of " if self.content_changed else ""
        return f"{what}{self.key} was {before}, now {after}"


def find_changes(
    directory: Path,
    config: Mapping[str, Any],
    *,
    config_file_name: str = "config.yaml",
    ignored_keys: Container[str] = KEYS_IGNORED_ON_RESUME,
) -> list[Change]:
    """Return the differences between the record of a run and a new configuration.

    The path of an input may differ, for example because a directory was moved. It is not listed if
    the content of the input is the same, and if it is code, also the name of the object in it. The
    keys of the rollout engine, except its kind, and ``rollout.max_staleness`` are not compared.

    Args:
        directory: The run directory.
        config: The new configuration, as plain data.
        config_file_name: Name of the file with the recorded configuration.
        ignored_keys: Keys whose differences are ignored.

    Raises:
        UserError: Version 0.1.0 recorded the run.
    """
    recorded = read_mapping_or_empty(directory / config_file_name)
    check_not_recorded_by_old_version(recorded, directory / config_file_name)
    inputs, current = read_mapping_or_empty(directory / "inputs.json"), input_fingerprints(config)
    before, now = dict(leaf_items(upgraded_config(recorded))), dict(leaf_items(config))
    if _ENGINE_KIND in now:
        before.setdefault(_ENGINE_KIND, "local")  # earlier versions had no other engine
    for key in _NEW_LISTS:
        if now.get(key) == []:
            before.setdefault(key, [])
    changes = [
        Change(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] not in ignored_keys
        and key != _MAX_STALENESS
        and (key == _ENGINE_KIND or not key.startswith(_ENGINE_KEYS))
        and before.get(key) != now.get(key)
        and (
            key not in current
            or current[key] != inputs.get(key)
            or object_name(before.get(key)) != object_name(now.get(key))
        )
    ]
    named = {change.key for change in changes}
    return changes + [
        Change(key, fingerprint, current[key], content_changed=True)
        for key, fingerprint in inputs.items()
        if key not in named and current.get(key, fingerprint) != fingerprint
    ]


def check_only_permitted_changes(
    directory: Path,
    config: Mapping[str, Any],
    *,
    config_file_name: str = "config.yaml",
    ignored_keys: Container[str] = KEYS_IGNORED_ON_RESUME,
) -> None:
    """Check that a run is resumed with the same configuration and the same inputs.

    Keys in ``allow_changes`` of the configuration may differ. See `find_changes` for the arguments.

    Raises:
        UserError: The configuration or an input has changed. The message contains the key.
    """
    changes = find_changes(
        directory, config, config_file_name=config_file_name, ignored_keys=ignored_keys
    )
    _check_permitted(directory, config, changes, need_permission=changes)


def find_and_check_changes(directory: Path, config: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return the changes of a resumed run, and check that they are permitted.

    More training steps are always permitted.

    Args:
        directory: The run directory.
        config: The new configuration, as plain data.

    Raises:
        UserError: A change is not permitted, the run has taken more steps than the configuration
            allows, or it cannot continue because its checkpoints were deleted.
    """
    changes = find_changes(directory, config)
    for change in changes:
        _check_steps_taken(directory, change)
    need_permission = [change for change in changes if not change.increases_steps]
    _check_permitted(directory, config, changes, need_permission=need_permission)
    if changes and _is_finished_without_checkpoints(directory):
        raise UserError(f"{directory} {_NO_CHECKPOINT}")
    return tuple(changes)


def permits_content_change(config: Mapping[str, Any], key: str) -> bool:
    """Return whether the content of an input may change.

    Args:
        config: The configuration of a resumed run.
        key: Dotted key of the input.
    """
    change = Change(key, None, None, content_changed=True)
    permitted = config.get("allow_changes") or ()
    return not _reason_fixed(change, config) and any(_is_part_of(key, str(k)) for k in permitted)


def too_many_steps_message(directory: Path, steps_done: int, configured_steps: int) -> str:
    """Return the message that a run has taken more steps than its configuration allows."""
    return (
        f"{directory} has already taken {count_text(steps_done, 'step')}, so it cannot end at step "
        f"{configured_steps}: branch from an earlier checkpoint with rlhf branch"
    )


def record_changes(directory: Path, step: int, changes: Sequence[Change]) -> None:
    """Add changes to the record of a run.

    Several changes of a key after the same step are merged into one, or removed if the key has its
    first value again.

    Args:
        directory: The run directory.
        step: Number of steps that were taken before the change.
        changes: Changes to record.
    """
    rows = read_changes(directory)
    for change in changes:
        row = {"step": step, "key": change.key, "before": change.before, "after": change.after}
        if change.content_changed:
            row["content"] = True
        for earlier in rows:
            if (earlier["step"], earlier["key"]) == (step, change.key):
                row["before"] = earlier["before"]
        rows = [r for r in rows if (r["step"], r["key"]) != (step, change.key)]
        rows += [row] if row["before"] != row["after"] else []
    write_text(directory / CHANGES_FILE, "".join(json_line(row) for row in rows))


def read_changes(directory: Path) -> list[dict[str, Any]]:
    """Return the recorded changes of a run; [] if its settings never changed."""
    return read_log(directory / CHANGES_FILE, {"step": INTEGER, "key": TEXT})


def change_text(row: Mapping[str, Any]) -> str:
    """Return a recorded change as text, such as "after step 100: num_steps was 100, now 200"."""
    change = Change(
        row["key"], row.get("before"), row.get("after"), content_changed=bool(row.get("content"))
    )
    return f"after step {row['step']}: {change}"


def _check_steps_taken(directory: Path, change: Change) -> None:
    """Check that a run has not taken more steps than a changed number of steps allows.

    No permission helps against this mistake, so it is reported before the missing permission.

    Raises:
        UserError: The run has taken more steps, or it is finished and would have fewer epochs.
    """
    if change.key not in STEP_KEYS or not is_number(change.after) or change.increases_steps:
        return
    done = _newest_checkpoint_step(directory)
    if change.key != _EPOCHS and done and 0 < change.after < done:
        raise UserError(too_many_steps_message(directory, done, change.after))
    # A checkpoint has no number of epochs. A finished run has taken those of its record.
    fewer = is_number(change.before) and change.after < change.before
    if change.key == _EPOCHS and fewer and done and (directory / "finished").exists():
        raise UserError(
            f"{directory} is finished, so it cannot end after fewer epochs ({change}): branch from "
            "an earlier checkpoint with rlhf branch"
        )


def _check_permitted(
    directory: Path,
    config: Mapping[str, Any],
    changes: Sequence[Change],
    *,
    need_permission: list[Change],
) -> None:
    """Check that every change is permitted.

    Args:
        directory: The run directory.
        config: The new configuration, whose ``allow_changes`` lists permitted keys.
        changes: All changes.
        need_permission: The changes that need a permission.

    Raises:
        UserError: A change is not permitted, or ``allow_changes`` has a key that does not exist.
    """
    permitted = [str(key) for key in config.get("allow_changes") or ()]
    known = {key for key, _ in leaf_items(config)} | {change.key for change in changes}
    for key in permitted:
        if not any(_is_part_of(name, key) for name in known):
            raise UserError(
                f"allow_changes: {key!r} is not a key of this run{did_you_mean(key, known)}"
            )
    for change in changes:
        reason = _reason_fixed(change, config)
        if reason and any(_is_part_of(change.key, key) for key in permitted):
            raise UserError(
                f"{directory} cannot be resumed: {change}, and this key cannot change, because "
                f"{reason}"
            )
    refused = [c for c in need_permission if not any(_is_part_of(c.key, key) for key in permitted)]
    if refused:
        raise UserError(_refusal_text(directory, config, refused))


def _refusal_text(directory: Path, config: Mapping[str, Any], refused: Sequence[Change]) -> str:
    """Return the error message for changes that are not permitted."""
    change, more = refused[0], len(refused) - 1
    if change.content_changed:
        path = dict(leaf_items(config)).get(change.key)
        where = f" ({path})" if path else ""
        text = f"{directory} cannot be resumed: the content of {change.key}{where} has changed "
        text += "since the run started; restore it, or start a new run with --overwrite"
    else:
        text = f"{directory} cannot be resumed with another configuration: {change}"
        text += f" (and {more} more {'keys differ' if more > 1 else 'key differs'})" * bool(more)
    if "allow_changes" not in config or any(_reason_fixed(c, config) for c in refused):
        return text
    if _is_finished_without_checkpoints(directory):
        text += f"; the run {_NO_CHECKPOINT}"
    else:
        keys = ", ".join(dict.fromkeys(c.key for c in refused))
        keys = shorten(keys, 200, placeholder="…")
        text += f"; to permit it, set allow_changes: [{keys}]"
    return text


def _reason_fixed(change: Change, config: Mapping[str, Any]) -> str | None:
    """Return the reason why the key of a change can never change; None if it can."""
    for key, reason in FIXED_KEYS.items():
        if _is_part_of(change.key, key):
            return reason
    controller = (config.get("kl") or {}).get("controller")
    if change.key == "algorithm.kl_coef" and controller == "adaptive":
        return _STATE
    if config.get("keep_best") and any(_is_part_of(change.key, key) for key in _SELECTION_KEYS):
        return _SELECTION
    return None


def _is_part_of(key: str, section: str) -> bool:
    """Return whether a dotted key is a section, or a key in it."""
    return key == section or key.startswith(f"{section}.")


def _is_finished_without_checkpoints(directory: Path) -> bool:
    """Return whether a run is finished and its checkpoints were deleted."""
    return (directory / "finished").exists() and _newest_checkpoint_step(directory) is None


def _newest_checkpoint_step(directory: Path) -> int | None:
    """Return the number of steps of the newest checkpoint of a run; None without a checkpoint."""
    folders = (directory / "checkpoints").glob("*")
    matches = (re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name) for path in folders)
    return max((int(match[1]) for match in matches if match), default=None)
