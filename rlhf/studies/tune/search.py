"""Seeded and resumable Optuna search for one algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.tune import Dimension
from rlhf.errors import UserError

JOURNAL = "optuna.log"
# Difference between the sampler seeds of two searches.
_MOST_TRIALS = 100_000


@dataclass(frozen=True)
class Trial:
    """A trial: a number and the settings to try."""

    number: int
    settings: dict[str, Any]
    """Dotted key of a run -> value."""


class Search:
    """Trials of one algorithm, stored in the study's journal.

    Each trial's sampler is seeded by `seed` and the trial's number, so that a resumed search tries
    the same settings as an uninterrupted one.
    """

    def __init__(
        self, name: str, space: Mapping[str, Dimension], folder: Path, *, seed: int
    ) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise UserError(
                'rlhf tune searches with Optuna: pip install "rlhf-kit[tuning]"'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # The lock of the run directory admits one process, so an existing lock of Optuna belongs to
        # a killed process. Optuna itself waits for it, forever if the path is relative.
        (folder / f"{JOURNAL}.lock").unlink(missing_ok=True)
        self.optuna: Any = optuna
        self.name, self.seed = name, seed
        self.space = {key: _distribution(optuna, item) for key, item in space.items()}
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )

    def ask(self, number: int) -> Trial | None:
        """Return trial `number`, new or from an interrupted search, or None if it is finished."""
        stored = self._complete_trials()
        if number < len(stored):
            trial = stored[number]
            return None if trial.state.is_finished() else Trial(number, dict(trial.params))
        seed = self.seed * _MOST_TRIALS + number
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=False)
        trial = self.study.ask(self.space)
        return Trial(number, dict(trial.params))

    def tell(self, number: int, value: float | None) -> None:
        """Record the score of a trial; None if it failed."""
        trial = self._complete_trials()[number]
        state = self.optuna.trial.TrialState
        if value is None:
            self.study.tell(trial.number, state=state.FAIL)
        else:
            self.study.tell(trial.number, value)

    def trials(self) -> list[tuple[Trial, float | None]]:
        """Return every trial with its score."""
        return [(Trial(i, dict(t.params)), t.value) for i, t in enumerate(self._complete_trials())]

    def failed(self) -> int:
        """Return the number of trials without a score."""
        return sum(value is None for _, value in self.trials())

    def best(self) -> tuple[Trial, float]:
        """Return the trial with the highest score; the first in case of a tie.

        Raises:
            UserError: every trial failed.
        """
        scored = [(trial, value) for trial, value in self.trials() if value is not None]
        if not scored:
            raise UserError(f"{self.name} failed in all of its trials: narrow its search space")
        return max(scored, key=lambda pair: pair[1])

    def _complete_trials(self) -> list[Any]:
        """Return trials that have all parameters; an interruption may leave an incomplete one."""
        return [t for t in self.study.trials if t.params.keys() == self.space.keys()]


def _distribution(optuna: Any, item: Dimension) -> Any:
    if item.choices:
        return optuna.distributions.CategoricalDistribution(item.choices)
    return optuna.distributions.FloatDistribution(item.low, item.high, log=item.log)
