"""List the environments with their horizons, known values and sources, and find one by name."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from rlhf.common.names import closest_name
from rlhf.envs import EXTRAS, TASKS
from rlhf.envs.core import TextEnv
from rlhf.envs.registration import ENVIRONMENTS, Creator, import_environment_id
from rlhf.errors import UserError, first_line


def catalog(*, compute_values: bool = True) -> list[dict[str, Any]]:
    """Return one row for each environment, sorted by id.

    A row is a dictionary with these keys; an unknown value is None.

    - `id`: the environment id.
    - `horizon`: maximum number of actions in an episode.
    - `optimum`, `random`: expected returns of the optimal and of the random policy.
    - `references`: name -> expected return of further policies.
    - `threshold`: return above which the task counts as solved.
    - `source`: "own", "gymnasium", the name of an optional extra, or the file or module of a
      plug-in.
    - `extra`: the optional extra that the environment needs.
    - `summary`: the first line of the docstring of the environment.
    - `items`: description of the content that differs between episodes.
    - `separable`: whether training and evaluation can have different items.

    Args:
        compute_values: Whether to compute `optimum`, `random` and `references` (about one second in
            total).
    """
    rows = [_text_env_row(f"text/{name}", compute_values) for name in TASKS]
    for name, (entry_point, extra) in EXTRAS.items():
        # Adapters are described without importing their third-party packages.
        env_class: Any = load_env_creator(entry_point)
        best_score = env_class.best_score
        rows.append(
            _catalog_row(f"text/{name}", env_class, optimum=best_score, source=extra, extra=extra)
        )
    rows += [
        _plugin_environment_row(env_id, creator, compute_values)
        for env_id, creator in ENVIRONMENTS.items()
    ]
    return sorted(rows, key=lambda row: row["id"])


def _plugin_environment_row(env_id: str, creator: Creator, compute_values: bool) -> dict[str, Any]:
    """Return the row of an environment of a plug-in; its values are known only for a `TextEnv`."""
    source = ENVIRONMENTS.sources.get(env_id, "")
    if isinstance(creator, type) and issubclass(creator, TextEnv):
        return _text_env_row(env_id, compute_values) | {"source": source}
    return {
        "id": env_id,
        "horizon": getattr(creator, "max_turns", None),
        "optimum": None,
        "random": None,
        "references": {},
        "threshold": gym.spec(env_id).reward_threshold,
        "source": source,
        "extra": None,
        "summary": (creator.__doc__ or "").strip().partition("\n")[0],
        "items": None,
        "separable": bool(getattr(creator, "separable", False)),
    }


def _text_env_row(env_id: str, compute_values: bool) -> dict[str, Any]:
    """Return the row of a `TextEnv`, which is created for its values."""
    env = gym.make(env_id).unwrapped
    assert isinstance(env, TextEnv)
    row = _catalog_row(env_id, type(env), horizon=env.max_turns)
    if type(env).__module__ == "rlhf.envs.toy_text":
        row["source"] = "gymnasium"
    if compute_values and type(env).optimal_value is not TextEnv.optimal_value:
        row["optimum"], row["random"] = env.optimal_value(), env.random_value()
        row["references"] = env.reference_values()
    return row


def _catalog_row(env_id: str, env_class: Any, **known: Any) -> dict[str, Any]:
    """Return the row of an environment class; `known` replaces the default of a key."""
    return {
        "id": env_id,
        "horizon": None,
        "optimum": None,
        "random": None,
        "references": {},
        "threshold": gym.spec(env_id).reward_threshold,
        "source": "own",
        "extra": None,
        "summary": (env_class.__doc__ or "").strip().partition("\n")[0],
        "items": env_class.items,
        "separable": env_class.separable,
        **known,
    }


def find(env_id: str) -> EnvSpec:
    """Find the spec of an environment id.

    Args:
        env_id: An id in any case, with or without `text/` and `-v0`, or code that
            `import_environment_id` accepts: `module:id`, `module:Class` or `file.py:Class`.

    Raises:
        UserError: The module cannot be imported, or the id is not registered. In the second case,
            the message contains the most similar id in the namespace `text`, or all ids in it.
    """
    name = import_environment_id(env_id)
    known = {spec_id.lower(): spec_id for spec_id in gym.registry}
    for candidate in (name, f"text/{name}", f"{name}-v0", f"text/{name}-v0"):
        if candidate.lower() in known:
            return gym.spec(known[candidate.lower()])
    ours = [spec_id for spec_id in gym.registry if spec_id.startswith("text/")]
    short = {spec_id.removeprefix("text/").removesuffix("-v0").lower(): spec_id for spec_id in ours}
    match = closest_name(name.removeprefix("text/").lower(), short, cutoff=0.4)
    hint = f"did you mean {short[match]}?" if match else f"known ids: {', '.join(ours)}"
    raise UserError(f"no environment {env_id!r}; {hint}")


def make(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """Create an environment.

    `env_id` has one of the forms that `find` accepts.

    Raises:
        UserError: `find` does not find the environment, or it cannot be created with the arguments.
    """
    spec = find(env_id)
    try:
        return spec.make(**kwargs)
    except UserError:
        raise
    except Exception as error:  # a constructor may raise anything
        raise UserError(f"{env_id} cannot be made: {first_line(error)}") from error
