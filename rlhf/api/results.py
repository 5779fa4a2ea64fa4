"""`Run`, a run directory in Python: configuration, metrics, samples, model and report."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.api.live_plot import MAIN_METRICS, Points, charts_as_images_html
from rlhf.common.conversation import check_conversations
from rlhf.common.files import read_json
from rlhf.common.guards import is_path
from rlhf.common.numbers import is_number
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError, first_line
from rlhf.runs.changes import read_changes
from rlhf.runs.renamed import read_metrics, read_samples, upgraded_config

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

    from rlhf.reward_models import Reward


class Run:
    """A run directory that `rlhf.train` or the command line wrote.

    A run can be used wherever a path of a run directory is expected, and as the model of another
    run. At the end of a notebook cell, it is shown as its main curves.

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> _ = rlhf.rloo(model=scratch, env="text/Echo-v0", num_steps=1)
        >>> run = rlhf.Run("runs/rloo")
        >>> run.config["algorithm"]["group_size"], "reward/mean" in run.metrics
        (4, True)

    Args:
        directory: The run directory.

    Raises:
        UserError: The directory is not a run directory.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if not is_path(directory):
            raise UserError(f"Run: expected the path of a run, got {type(directory).__name__}")
        self.directory = Path(directory)
        if not (self.directory / "config.yaml").is_file():
            raise UserError(f"{self.directory} is not a run directory: it has no config.yaml")

    def __fspath__(self) -> str:
        return str(self.directory)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    def _repr_html_(self) -> str:
        """Return the main curves and the last values of all metrics, for a notebook."""
        points: Points = {}
        last: dict[str, float] = {}
        for row in read_metrics(self.directory):
            for key, value in row.items():
                if "/" in key and is_number(value):
                    last[key] = value
                    if key in MAIN_METRICS:
                        points.setdefault(key, []).append((row["step"], value))
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{value:.4g}</td></tr>"
            for key, value in sorted(last.items())
        )
        state = "" if self.finished else ", not finished"
        title = html.escape(f"{self.command} in {self.directory}{state}")
        table = f"<details><summary>last values of all metrics</summary><table>{rows}</table>"
        return f"<p>{title}</p>{charts_as_images_html(points)}{table}</details>"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Effective settings of the run, with the defaults of the algorithm and the trainer."""
        return upgraded_config(read_mapping_or_empty(self.directory / "config.yaml"))

    @property
    def command(self) -> str:
        """Name of the command."""
        return str(self.config.get("command", ""))

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return (self.directory / "finished").exists()

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Settings that were changed when the run was resumed: step, key, before and after."""
        return read_changes(self.directory)

    @property
    def metrics(self) -> pd.DataFrame:
        """The logged metrics: one row for each step, and one column for each logged metric.

        docs/metrics.md describes the metrics. A value that was not logged at a step is NaN.
        """
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

        rows = [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(self.directory)]
        if not rows:
            return pd.DataFrame(index=pd.Index([], name="step"))
        frame: Any = pd.DataFrame(rows)
        return frame.groupby("step").last()

    @property
    def samples(self) -> pd.DataFrame:
        """The recorded transcripts, with their step, split, messages and scores."""
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

        return pd.DataFrame(read_samples(self.directory))

    @property
    def evaluations(self) -> dict[str, Any]:
        """Name -> summary of the evaluations in ``evaluation/``."""
        files = sorted((self.directory / "evaluation").glob("*/summary.json"))
        return {file.parent.name: read_json(file) for file in files}

    @property
    def model_path(self) -> Path:
        """Folder of the trained model.

        Raises:
            UserError: The run has no trained model.
        """
        folder = self.directory / "final"
        if not folder.is_dir():
            raise UserError(f"{self.directory} has no trained model (final/)")
        return folder

    @cached_property
    def policy(self) -> TextPolicy:
        """The trained language model, loaded at the first use.

        Raises:
            UserError: The run trained no language model.
        """
        if self.command == "reward":
            raise UserError(f"{self.directory} trained a reward model: use Run.reward")
        return TextPolicy(self.model_path)

    @cached_property
    def reward(self) -> Reward:
        """The trained reward model as a function of conversations, loaded at the first use.

        Raises:
            UserError: The run trained no reward model.
        """
        if self.command != "reward":
            raise UserError(
                f"{self.directory} trained no reward model; a language model is Run.policy"
            )
        from rlhf.models.rewards import load_rewards

        return load_rewards({"kind": "trained", "path": str(self.model_path)})

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Upload the trained model, in the format of transformers, to the Hugging Face Hub.

        The access token is the one that `huggingface_hub` finds, such as the variable ``HF_TOKEN``.

        Args:
            repo_id: Name of the repository, such as ``me/my-model``. It is created if necessary.
            private: Whether a new repository is private; by default, as the account is set up.

        Returns:
            The address of the repository.

        Raises:
            UserError: The run has no trained model, or the model cannot be uploaded.
        """
        from huggingface_hub import HfApi

        folder, api = self.model_path, HfApi()
        message = f"Upload the model that rlhf {self.command} trained"
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except Exception as error:  # the client raises errors of several HTTP libraries
            raise UserError(f"{repo_id}: the upload failed: {first_line(error)}") from error
        return str(address)

    def report(self) -> Path:
        """Write the HTML report; return its path."""
        from rlhf.reports import write_report

        return write_report(self.directory)


class TextPolicy:
    """A language model that completes prompts, with its chat template.

    Args:
        path: Folder or hub id of the model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from rlhf.config.model import ModelSpec
        from rlhf.models.loading import load_model

        self.model, self.tokenizer = load_model(ModelSpec(path=os.fspath(path)), seed=0)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[dict[str, Any]]],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        **rollout: Any,
    ) -> list[str]:
        """Sample completions.

        Args:
            prompts: A prompt, or a list of prompts; a prompt is a text, or a list of messages.
            samples: Number of completions of each prompt.
            temperature: Sampling temperature; 0 takes the most likely token.
            seed: Random seed.
            rollout: Further keys of ``rollout``, such as ``max_new_tokens``.

        Returns:
            The completions of the first prompt, then those of the second, and so on.

        Raises:
            UserError: The prompts or a setting are not valid.
        """
        from rlhf.config.load import build_config
        from rlhf.config.rollout import RolloutSpec
        from rlhf.rollout.completions import sample_completions

        if samples < 1:
            raise UserError(f"samples must be >= 1, got {samples}")
        given: Any = prompts
        if not isinstance(given, Iterable):
            raise UserError(f"generate: expected a text or a list, got {type(given).__name__}")
        several = [prompts] if isinstance(prompts, str) else prompts
        conversations = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in several
        ]
        check_conversations(conversations, "generate: prompts")
        spec = build_config(RolloutSpec, {"temperature": temperature, **rollout})
        rollouts = sample_completions(
            self.model, self.tokenizer, conversations, spec, samples=samples, seed=seed
        )
        return [rollout.conversation[-1]["content"] for rollout in rollouts]
