"""Search the hyperparameters of one algorithm with Optuna.

A search is seeded and can be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.common.imports import check_extra_installed
from rlhf.config.tune import Dimension
from rlhf.errors import UserError

JOURNAL_FILE = "optuna.log"
"""Name of the file in which Optuna stores the trials."""
# Trial n of a search uses the sampler seed `seed * _SEED_STRIDE + n`, modulo the number of seeds of
# NumPy. The stride exceeds usual numbers of trials, so that searches with different small seeds
# have no sampler seed in common.
_SEED_STRIDE = 100_000
_NUM_SAMPLER_SEEDS = 2**32


@dataclass(frozen=True)
class Trial:
    """A trial of a search."""

    number: int
    """Index of the trial in the search, from 0."""
    settings: dict[str, Any]
    """Hyperparameters to try: dotted key of a run's configuration -> value."""


class AlgorithmSearch:
    """The trials of one algorithm, which are stored in the study's folder.

    The sampler seed of a trial is computed from `seed` and the number of the trial, so that a
    resumed search tries the same hyperparameters as an uninterrupted search.

    Args:
        name: Name of the algorithm.
        space: Dotted key -> dimension.
        folder: Folder of the study.
        seed: Seed of the search.
        num_trials: Number of trials of the search; None means no limit. Stored trials beyond it are
            not used, so that every algorithm has equally many.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(
        self,
        name: str,
        space: Mapping[str, Dimension],
        folder: Path,
        *,
        seed: int,
        num_trials: int | None = None,
    ) -> None:
        check_extra_installed("rlhf tune", "tuning", "optuna")
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # The run directory is locked by one process, so an existing lock of Optuna belongs to a
        # killed process. Optuna would wait for this lock, and never end if the path is relative.
        (folder / f"{JOURNAL_FILE}.lock").unlink(missing_ok=True)
        self.optuna: Any = optuna
        self.name, self.seed, self.num_trials = name, seed, num_trials
        self.space = {key: _distribution(optuna, item) for key, item in space.items()}
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE))),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )

    def trial_to_run(self, number: int) -> Trial | None:
        """Return the trial `number`, or None if it is finished.

        If the search was interrupted during this trial, the stored trial is returned. Otherwise,
        the next trial is created, so the trials must be requested in order.
        """
        stored = self._trials_with_all_parameters()
        if number < len(stored):
            trial = stored[number]
            return None if trial.state.is_finished() else Trial(number, dict(trial.params))
        seed = (self.seed * _SEED_STRIDE + number) % _NUM_SAMPLER_SEEDS
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=False)
        trial = self.study.ask(self.space)
        return Trial(number, dict(trial.params))

    def store_score(self, number: int, value: float | None) -> None:
        """Store the score of a trial; `value` is None if the trial failed."""
        trial = self._trials_with_all_parameters()[number]
        state = self.optuna.trial.TrialState
        if value is None:
            self.study.tell(trial.number, state=state.FAIL)
        else:
            self.study.tell(trial.number, value)

    def trials_and_scores(self) -> list[tuple[Trial, float | None]]:
        """Return every trial with its score; the score is None if the trial has none."""
        stored = self._trials_with_all_parameters()[: self.num_trials]
        return [(Trial(i, dict(t.params)), t.value) for i, t in enumerate(stored)]

    def num_trials_without_score(self) -> int:
        """Return the number of trials without a score."""
        return sum(value is None for _, value in self.trials_and_scores())

    def best_trial_and_score(self) -> tuple[Trial, float]:
        """Return the trial with the highest score, and the score.

        If several trials have the highest score, the first one is returned.

        Raises:
            UserError: Every trial failed.
        """
        scored = [(trial, value) for trial, value in self.trials_and_scores() if value is not None]
        if not scored:
            raise UserError(f"all trials of {self.name} failed: narrow its search space")
        return max(scored, key=lambda pair: pair[1])

    def _trials_with_all_parameters(self) -> list[Any]:
        """Return Optuna's trials that have all parameters; an interrupted trial may lack some."""
        return [t for t in self.study.trials if t.params.keys() == self.space.keys()]


def _distribution(optuna: Any, item: Dimension) -> Any:
    """Convert a dimension to a distribution of Optuna."""
    if item.choices:
        return optuna.distributions.CategoricalDistribution(item.choices)
    return optuna.distributions.FloatDistribution(item.low, item.high, log=item.log)
