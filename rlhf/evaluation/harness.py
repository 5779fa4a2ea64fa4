"""Evaluate standard tasks with lm-evaluation-harness, an optional extra."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from scipy import special

from rlhf.common.imports import check_extra_installed
from rlhf.config.evaluate import HarnessTasksSpec
from rlhf.errors import UserError
from rlhf.models.policy import Policy
from rlhf.reward_models.chat_template import chat_template_kwargs, jinja_variable_defaults
from rlhf.stats import Interval, share_interval

BATCH_SIZE = 8

# Metrics of the harness that are proportions, so their intervals are in [0, 1].
PROPORTION_METRICS = ("acc", "acc_norm", "exact_match")

FEWEST_DOCUMENTS = 400
"""Minimum number of documents for a normal interval that uses the harness's standard error. With
200 documents, its mean coverage for skewed values is below 94%; with 30, it is as low as 87%."""


def require_harness() -> None:
    """Raise UserError if the extra ``tasks`` (lm-evaluation-harness) is not installed."""
    check_extra_installed("the key tasks", "tasks", "lm_eval")


def evaluate_on_tasks(
    policy: Policy, spec: HarnessTasksSpec, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Evaluate a policy on standard tasks.

    Returns:
        ``TASK/METRIC`` -> the metric with its 95% interval, see `Interval.as_dict`.

    Raises:
        UserError: The extra is not installed, or a task is unknown or cannot be loaded.
    """
    require_harness()
    lm_eval: Any = importlib.import_module("lm_eval")  # Type checkers may not find it.
    wrapped: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=spec.folder)
    known = set(manager.all_tasks)
    if unknown := [name for name in spec.names if name not in known]:
        raise UserError(
            f"tasks: the task {unknown[0]!r} is unknown; `lm_eval ls tasks` lists all tasks"
        )
    chat = bool(policy.tokenizer.chat_template)
    try:
        output = lm_eval.simple_evaluate(
            model=wrapped(
                pretrained=policy.model,
                tokenizer=with_default_template_options(policy.tokenizer),
                batch_size=BATCH_SIZE,
            ),
            tasks=list(spec.names),
            num_fewshot=spec.shots,
            limit=spec.limit,
            task_manager=manager,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat and bool(spec.shots),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, ConnectionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"tasks {', '.join(spec.names)}: {reason}") from error
    return metrics_from_harness_output(output)


def with_default_template_options(tokenizer: Any) -> Any:
    """Return a tokenizer whose chat template uses the stored template options by default.

    The harness renders the template without options. The result is a copy of the tokenizer, or
    `tokenizer` itself if it has no options or not exactly one template.
    """
    options = chat_template_kwargs(tokenizer)
    if not options or not isinstance(tokenizer.chat_template, str):
        return tokenizer
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = jinja_variable_defaults(options) + tokenizer.chat_template
    return copied


def metrics_from_harness_output(output: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert the output of the harness to ``TASK/METRIC`` -> the metric with its interval.

    The keys "acc,none" and "acc_stderr,none" of a task become ``TASK/acc``. The part after the
    comma is a filter of the harness. A filter other than "none" is added in parentheses.
    """
    metrics = {}
    for task, results in output["results"].items():
        for key, value in results.items():
            name, _, variant = key.partition(",")
            if not variant or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{name}_stderr,{variant}")
            label = f"{task}/{name}" if variant == "none" else f"{task}/{name} ({variant})"
            n = output.get("n-samples", {}).get(task, {}).get("effective")
            metrics[label] = _task_interval(name, float(value), error, n).as_dict()
    return metrics


def _task_interval(
    name: str, value: float, standard_error: Any, num_documents: int | None
) -> Interval:
    """Return a metric with its interval.

    The interval of a proportion is exact. Other metrics have a normal interval that is computed
    from `standard_error`. They have no interval if this error is unknown or 0, or if there are too
    few documents.
    """
    if name in PROPORTION_METRICS and num_documents and 0 <= value <= 1:
        return share_interval(value * num_documents, num_documents)
    if (
        not isinstance(standard_error, int | float)
        or not standard_error > 0
        or (num_documents or 0) < FEWEST_DOCUMENTS
    ):
        needs = f"an interval needs a standard error and at least {FEWEST_DOCUMENTS} documents"
        return Interval.without_bounds(value, num_documents or 0, needs)
    half = float(special.ndtri(0.975)) * standard_error
    return Interval(value, value - half, value + half, num_documents or 0, "normal")
