"""Checks and messages of a run that is resumed with changed settings."""

from __future__ import annotations

import logging

from rlhf.errors import UserError
from rlhf.runs.changes import STEP_KEYS, too_many_steps_message
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)


def check_step_count(run: Run, *, done: int, configured: int) -> None:
    """Check that a run with changed settings has not taken more steps than it is configured for.

    Args:
        run: The run directory.
        done: Number of steps of the checkpoint from which the run continues.
        configured: Number of steps of the configuration.

    Raises:
        UserError: The run has taken more steps.
    """
    if run.changes and done > configured:
        raise UserError(too_many_steps_message(run.directory, done, configured))


def log_changes(run: Run, step: int, *, schedule_depends_on_steps: bool) -> None:
    """Log the changed settings of a resumed run, and what they mean for the learning rate.

    Args:
        run: The run directory, whose changes were accepted.
        step: Number of steps of the checkpoint from which the run continues.
        schedule_depends_on_steps: Whether the learning rate of a step depends on the number of
            steps of the run.
    """
    for change in run.changes:
        log.info("changed after step %d: %s", step, change)
    if step and schedule_depends_on_steps and any(c.key in STEP_KEYS for c in run.changes):
        log.info(
            "the learning rate depends on the number of steps: steps 1 to %d had the rates of the "
            "earlier number, and the next steps have those of the new number, so the result is not "
            "that of a run with the new number from the start",
            step,
        )
