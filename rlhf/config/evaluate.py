"""Configuration of `rlhf evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.common.names import FILE_NAME_RULE, is_file_name
from rlhf.common.ranges import AtLeastTwo, NonNegativeInt, PositiveInt, Seconds
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import RunConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec

PAIRS_FOLDER = "pairs"
"""Name of the folder with the results on preference pairs."""


@dataclass(frozen=True)
class ApiSpec:
    """A model on an OpenAI-compatible server. The key is read from OPENAI_API_KEY."""

    url: str
    """Address of the server, such as http://localhost:8000/v1."""
    model: str
    """Name of the model on the server."""
    timeout: Seconds = 60.0
    """Time limit of a request, in seconds. A request that fails temporarily is repeated up to
    twice."""
    parallel: PositiveInt = 8
    """Number of episodes that are played at the same time, with one request each."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy to evaluate.

    It is a model, a function, a model on a server, or the environment's random or expert policy.
    """

    name: str
    """Name of the policy in tables and of its folder. random and expert, without another key, are
    the policies of the environment."""
    model: ModelSpec | None = None
    """The model."""
    path: str | None = None
    """A function in Python, or a class whose objects are called, as file.py:name or module:name.
    The function receives the messages of the episode and returns the reply (docs/evaluate.md)."""
    api: ApiSpec | None = None
    """A model on a server."""
    examples: list[DataSpec] = field(default_factory=list)
    """Few-shot examples that precede the prompt of episodes, texts and classified texts."""

    def __post_init__(self) -> None:
        if not is_file_name(self.name) or self.name == PAIRS_FOLDER:
            raise ValueError(
                f"policies: {self.name!r} is not a valid name; it is used as a folder name "
                f"({FILE_NAME_RULE}), and {PAIRS_FOLDER!r} is reserved"
            )
        kinds = [key for key in ("model", "path", "api") if getattr(self, key) is not None]
        if len(kinds) > 1:
            raise ValueError(
                f"policies: {self.name!r} has {' and '.join(kinds)}; give only one of them"
            )
        if self.examples and not kinds:
            raise ValueError(
                f"policies: {self.name!r} has examples but no model; remove the examples"
            )
        if not kinds and self.name not in ("random", "expert"):
            raise ValueError(
                f"policies: {self.name!r} needs a model, a path or an api; only random and expert "
                "have none"
            )
        if self.path is not None and not self.path.rpartition(":")[0]:
            raise ValueError(
                f"policies: path of {self.name!r} must be file.py:name or module:name, got "
                f"{self.path!r}"
            )


@dataclass(frozen=True)
class ZeroShotClassificationSpec:
    """Classification of texts by a policy.

    The predicted class is the one whose completion is most likely after the prompt.
    """

    data: list[DataSpec]
    """Texts, each with the index of its class (0, 1, ...) as label."""
    labels: list[str]
    """Completion of each class, in the order of the class indices."""
    question: str = "{text}"
    """Template of the prompt; {text} is replaced by the text to classify."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("classes.data is empty: give at least one dataset")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(
                "classes.labels must have at least two labels and no repeated one, got "
                f"{self.labels}"
            )
        if "{text}" not in self.question:
            raise ValueError(f"classes.question must contain {{text}}, got {self.question!r}")


@dataclass(frozen=True)
class HarnessTasksSpec:
    """Standard tasks that lm-evaluation-harness runs (install the extra `tasks`)."""

    names: list[str]
    """Names of tasks or groups, as `lm_eval ls tasks` lists them."""
    shots: NonNegativeInt | None = None
    """Number of few-shot examples in each prompt; the default is that of the task."""
    limit: PositiveInt | None = None
    """Maximum number of documents of a task. By default, all documents are used."""
    folder: str | None = None
    """Folder with the YAML files of additional tasks."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("tasks.names is empty: give at least one task")


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """Configuration of `rlhf evaluate`: at least one of env, text, classes, tasks and pairs."""

    policies: list[PolicySpec] = field(default_factory=list)
    """Policies to evaluate."""
    env: EnvSpec | None = None
    """Source of episodes: a gymnasium environment or a prompt dataset."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards that score the episodes and the pairs."""
    text: list[DataSpec] = field(default_factory=list)
    """Prompts with completions, on which the loss per completion token, the perplexity and the bits
    per byte are computed."""
    classes: ZeroShotClassificationSpec | None = None
    """Labeled texts, on which accuracy, macro-F1 and AUC are computed."""
    tasks: HarnessTasksSpec | None = None
    """Standard tasks that lm-evaluation-harness runs."""
    pairs: list[DataSpec] = field(default_factory=list)
    """Preference pairs, on which the accuracy of the rewards is computed and compared with trivial
    baselines."""
    pairs_train: list[DataSpec] = field(default_factory=list)
    """Pairs on which the bag-of-words baseline is trained."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """Sampling settings of the policies."""
    episodes: AtLeastTwo = 256
    """Number of evaluation seeds, which are the same for all policies. Prompts are used in a fixed
    shuffled order."""
    samples: PositiveInt = 1
    """Number of episodes per seed. With several episodes per seed, pass@k of every binary metric is
    computed."""
    first_episode: NonNegativeInt = 0
    """Index of the first evaluation seed, so that selection and evaluation can use different
    episodes."""
    decoding: Literal["greedy", "sampled"] = "sampled"
    """greedy takes the most likely token; sampled uses rollout.temperature."""
    max_length: PositiveInt = 512
    """Maximum number of tokens of a text example, and of a classified text with its prompt,
    few-shot examples and label. A longer text example is truncated; a longer classified text is
    an error."""

    def __post_init__(self) -> None:
        of_policies = self.env or self.text or self.classes or self.tasks
        if not (of_policies or self.pairs):
            raise ValueError(
                "evaluate: there is nothing to evaluate; set env, text, classes, tasks or pairs"
            )
        if of_policies and not self.policies:
            raise ValueError("policies: the list is empty; give at least one policy")
        if self.pairs and not self.rewards:
            raise ValueError("rewards: to evaluate on pairs, give at least one reward")
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"policies: names must differ, got {', '.join(names)}")
        if self.samples > 1 and not self.env:
            raise ValueError(
                "samples has no effect without env: it is the number of episodes per seed"
            )
        if self.samples > 1 and self.decoding == "greedy":
            raise ValueError(
                "samples has no effect with greedy decoding: all samples would be identical"
            )
        unplayed = [policy.name for policy in self.policies if policy.model is None]
        if unplayed and not self.env:
            raise ValueError(
                f"policies: {unplayed[0]} has no key model and can only be evaluated on an "
                "environment: set env, or set its model"
            )
