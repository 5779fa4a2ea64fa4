"""One algorithm's search, in Optuna's terms: seeded, and continued from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.tune import Dimension
from rlhf.errors import UserError

JOURNAL = "optuna.log"
# Trials of one search are seeded apart by their number, searches by this many.
_MOST_TRIALS = 100_000


@dataclass(frozen=True)
class Trial:
    """One setting."""

    number: int
    settings: dict[str, Any]
    """Dotted key of a run -> value."""


class Search:
    """The trials of one algorithm, kept in the study's journal.

    Each trial's draws are seeded by its number, so that a search that was killed and continued
    tries what one that never stopped would have tried.

    Args:
        name: of the algorithm.
        space: what varies.
        folder: of the study.
        seed: of the draws.
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
        """The trial of that number, drawn now or before a kill; None when it was finished."""
        known = self._whole()
        if number < len(known):
            found = known[number]
            return None if found.state.is_finished() else Trial(number, dict(found.params))
        seed = self.seed * _MOST_TRIALS + number
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=False)
        drawn = self.study.ask(self.space)
        return Trial(number, dict(drawn.params))

    def tell(self, number: int, value: float | None) -> None:
        """The score of a trial that was asked for; None when it failed."""
        found = self._whole()[number]
        state = self.optuna.trial.TrialState
        if value is None:
            self.study.tell(found.number, state=state.FAIL)
        else:
            self.study.tell(found.number, value)

    def trials(self) -> list[tuple[Trial, float | None]]:
        """Every trial with its score."""
        return [(Trial(i, dict(t.params)), t.value) for i, t in enumerate(self._whole())]

    def failed(self) -> int:
        """How many trials gave no score."""
        return sum(value is None for _, value in self.trials())

    def best(self) -> tuple[Trial, float]:
        """The trial with the highest score; the first one of several.

        Raises:
            UserError: every trial failed.
        """
        scored = [(trial, value) for trial, value in self.trials() if value is not None]
        if not scored:
            raise UserError(f"{self.name} failed in all of its trials: narrow its search space")
        return max(scored, key=lambda pair: pair[1])

    def _whole(self) -> list[Any]:
        """Trials that were drawn to the end: a kill may leave one without some of its values."""
        return [t for t in self.study.trials if t.params.keys() == self.space.keys()]


def _distribution(optuna: Any, item: Dimension) -> Any:
    if item.choices:
        return optuna.distributions.CategoricalDistribution(item.choices)
    return optuna.distributions.FloatDistribution(item.low, item.high, log=item.log)
