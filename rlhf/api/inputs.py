"""Convert models, environments, data and functions of a Python program to a configuration."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.common.files import atomic_path, json_line, sha256_of, write_text
from rlhf.common.guards import (
    as_list,
    is_instance_of_dataclass,
    is_mapping,
    is_path,
    is_sequence,
    is_set,
)
from rlhf.common.objects import Representative, reference_to
from rlhf.config.data import DataSpec
from rlhf.config.evaluate import ApiSpec
from rlhf.errors import UserError

_DATA_KEYS = {field.name for field in dataclasses.fields(DataSpec)}


def to_training_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration for the keyword arguments of a training function.

    Args:
        options: Configuration keys, whose values can be objects: see `rlhf.train`. In addition,
            ``tokenizer`` and ``lora`` belong to ``model``, and ``prompts`` to ``env``. A key whose
            value is None is omitted.

    Raises:
        UserError: An object cannot be used, or two arguments exclude each other.
    """
    given = {key: value for key, value in options.items() if value is not None}
    tokenizer, lora = given.pop("tokenizer", None), given.pop("lora", None)
    prompts = given.pop("prompts", None)
    tree: dict[str, Any] = {}
    for key, value in given.items():
        if key == "model":
            tree[key] = to_model_config(value, tokenizer)
        elif key == "env":
            tree[key] = to_env_config(value)
        elif key in ("data", "eval_data", "test_data"):
            tree[key] = to_data_configs(value, key)
        elif key in ("rewards", "gold"):
            rewards = as_list(value)
            tree[key] = [to_reward_config(r, f"{key}.{i}") for i, r in enumerate(rewards)]
        elif key == "callbacks":
            callbacks = as_list(value)
            tree[key] = [_callback_entry(c, f"callbacks.{i}") for i, c in enumerate(callbacks)]
        elif key == "rollout":
            tree[key] = to_rollout_config(value)
        elif key == "algorithm" and is_instance_of_dataclass(value):
            raise UserError(
                "algorithm: give a mapping of the settings to change, such as {'num_epochs': 2}; "
                f"an object of {type(value).__name__} has a value for every setting, also for "
                "those that define the algorithm"
            )
        else:
            tree[key] = to_plain_data(value)
    if tokenizer is not None and "model" not in given:
        raise UserError("tokenizer: it belongs to a loaded model; give model too")
    if lora is not None and tree.get("model", {}).get("lora") is not None:
        raise UserError("lora: model has adapters too; give them in one of both places")
    if lora is not None:
        tree.setdefault("model", {})["lora"] = to_lora_config(lora)
    if prompts is not None and tree.get("env", {}).get("id"):
        raise UserError("give env or prompts, not both: an episode starts from one of them")
    if prompts is not None:
        tree["env"] = {
            **tree.get("env", {}),
            "id": None,
            "prompts": to_data_configs(prompts, "prompts"),
        }
    return tree


def to_evaluation_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration for the keyword arguments of `rlhf.evaluate`.

    Args:
        options: Configuration keys, see `to_training_config`. ``policies`` can be in any form of
            `to_policy_configs`, and ``text``, ``pairs`` and ``pairs_train`` in any form of
            `to_data_configs`.

    Raises:
        UserError: An object cannot be used.
    """
    given = {key: value for key, value in options.items() if value is not None}
    policies = given.pop("policies", None)
    data = {key: given.pop(key) for key in ("text", "pairs", "pairs_train") if key in given}
    tree = to_training_config(given)
    if policies is not None:
        tree["policies"] = to_policy_configs(policies)
    return tree | {key: to_data_configs(value, key) for key, value in data.items()}


def to_policy_configs(policies: Any) -> list[dict[str, Any]]:
    """Return the list of policies of an evaluation.

    Args:
        policies: Mapping from names to policies, or list of mappings with ``name``, and ``model``,
            ``path`` or ``api``. A policy is a model as for `to_model_config`, a function of
            messages, a class of such functions, an `ApiSpec`, or None for the random or expert
            policy of the environment.

    Raises:
        UserError: A model cannot be used.
    """
    entries: Any = policies
    if is_mapping(policies):
        entries = [
            {"name": name, _policy_source_key(value): value} for name, value in policies.items()
        ]
    return [to_plain_data(_to_policy_entry(entry)) for entry in entries]


def _policy_source_key(policy: Any) -> str:
    """Return the key that holds a policy in an entry of ``policies``: model, path or api."""
    if isinstance(policy, ApiSpec):
        return "api"
    is_function = callable(policy) and not hasattr(policy, "save_pretrained")
    return "path" if is_function else "model"


def _to_policy_entry(entry: Any) -> Any:
    """Convert an entry of ``policies``: a model to a configuration, a function to a reference."""
    if not is_mapping(entry):
        return entry
    changed = dict(entry)
    if entry.get("model") is not None:
        changed["model"] = to_model_config(entry["model"])
    if callable(entry.get("path")):
        changed["path"] = reference_to(entry["path"], f"policies.{entry.get('name')}")
    return changed


def to_plain_data(value: Any) -> Any:
    """Return plain data for a value that can contain dataclasses, numpy values and paths.

    A value of another type is returned unchanged.
    """
    if type(value).__module__ == "numpy":
        return value.tolist()
    if is_instance_of_dataclass(value):
        return to_plain_data(dataclasses.asdict(value))
    if is_mapping(value):
        return {str(key): to_plain_data(item) for key, item in value.items()}
    if is_sequence(value):
        return [to_plain_data(item) for item in value]
    if is_path(value):
        return os.fspath(value)
    return value


def to_model_config(model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Return the configuration of a model.

    A loaded model is saved in the cache folder of the toolkit under a hash of its content, because
    a resumed run reads the initial model again. The object itself is not changed.

    Args:
        model: Hub id, folder, finished run, mapping, `ModelSpec`, or a loaded transformers model.
        tokenizer: Tokenizer of a loaded model. By default, it is loaded from
            ``model.name_or_path``.

    Raises:
        UserError: The model is an adapter or has no tokenizer, the run has no trained model, or a
            tokenizer is given for a model that is not loaded.
    """
    if not hasattr(model, "save_pretrained"):
        if tokenizer is not None:
            raise UserError("tokenizer has no effect on a model that is not loaded; remove it")
        folder = getattr(model, "model_path", model)  # of a finished run
        if is_path(folder):
            return {"path": os.fspath(folder)}
        return to_plain_data(folder)
    if type(model).__module__.partition(".")[0] == "peft":
        raise UserError("model: give the base model, and the configuration of the adapter as lora=")
    if tokenizer is None:
        import transformers

        loader: Any = transformers.AutoTokenizer

        try:
            tokenizer = loader.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise UserError("model: also give the tokenizer of the loaded model") from error
    tree = {"path": str(_save_model_in_cache(model, tokenizer))}
    dtype = str(model.dtype).removeprefix("torch.")
    return {**tree, "dtype": dtype} if dtype in ("float32", "bfloat16") else tree


def _save_model_in_cache(model: Any, tokenizer: Any) -> Path:
    """Save a model and its tokenizer under a hash of their content in the cache; return the folder.

    An existing folder with the same hash is kept.
    """
    from rlhf.data.cache import content_hash
    from rlhf.models.hub import cache_directory

    root = cache_directory() / "python"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        target = root / f"model-{content_hash(Path(name))[:32]}"
        if not target.exists():
            with atomic_path(target) as partial:
                Path(name).rename(partial)
                Path(name).mkdir()
    return target


_PEFT_KEYS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
"""Field of PEFT's LoraConfig -> key of `LoraSpec`."""
_IGNORED_PEFT_KEYS = {
    "task_type",
    "peft_type",
    "peft_version",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "runtime_config",
}


def to_lora_config(lora: Any) -> dict[str, Any]:
    """Return the configuration of adapters.

    Args:
        lora: Mapping, `LoraSpec`, or PEFT's ``LoraConfig``.

    Raises:
        UserError: PEFT's configuration has a setting that the toolkit does not support.
    """
    if type(lora).__module__.partition(".")[0] != "peft":
        return to_plain_data(lora)
    default = type(lora)()
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(lora):
        value = getattr(lora, field.name)
        if field.name in _PEFT_KEYS:
            if field.name == "target_modules" and value == "all-linear":
                value = None
            if is_set(value):
                value = sorted(value)
            if value is not None:
                tree[_PEFT_KEYS[field.name]] = to_plain_data(value)
        elif field.name not in _IGNORED_PEFT_KEYS and value != getattr(default, field.name):
            raise UserError(
                f"lora: {field.name} of PEFT's LoraConfig is not supported; supported are "
                f"{', '.join(_PEFT_KEYS)}"
            )
    return tree


_GENERATION_KEYS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
"""Fields of transformers' GenerationConfig that are keys of ``rollout`` with the same meaning."""
_IGNORED_GENERATION_KEYS = {
    "bos_token_id",  # the special tokens are those of the model
    "eos_token_id",
    "pad_token_id",
    "do_sample",  # see to_rollout_config
    "transformers_version",
}


def to_rollout_config(rollout: Any) -> Any:
    """Return the configuration of sampling.

    Args:
        rollout: Mapping, `OnlineRolloutSpec`, or transformers' ``GenerationConfig``. If its
            ``do_sample`` is False, the temperature is 0. Its settings that have transformers'
            default values are omitted.

    Raises:
        UserError: The ``GenerationConfig`` has a setting that the toolkit does not support.
    """
    if type(rollout).__name__ != "GenerationConfig":
        return to_plain_data(rollout)
    tree = {
        key: value
        for key, value in rollout.to_diff_dict().items()
        if value is not None and key not in _IGNORED_GENERATION_KEYS and not key.startswith("_")
    }
    for key in tree:
        if key not in _GENERATION_KEYS:
            raise UserError(
                f"rollout: {key} of GenerationConfig is not supported; supported are "
                f"{', '.join(_GENERATION_KEYS)}"
            )
    return tree | {"temperature": 0.0} if rollout.do_sample is False else tree


class EnvironmentCopyFactory(Representative):
    """Factory of copies of an environment.

    Args:
        env: The environment; only copies of it are used.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.__name__ = type(env.unwrapped).__name__
        self.__doc__ = type(env.unwrapped).__doc__
        self.represented = _classes_and_attributes_by_layer(env)

    def __call__(self) -> Any:
        """Return a copy of the environment."""
        return copy.deepcopy(self.env)


def _classes_and_attributes_by_layer(env: Any) -> dict[str, Any]:
    """Return "layer N" -> class and "layer N.NAME" -> attribute; layer 0 is the outer wrapper."""
    layers: dict[str, Any] = {}
    depth = 0
    while True:
        attributes: dict[str, Any] = getattr(env, "__dict__", {})
        layers[f"layer {depth}"] = type(env)
        layers |= {f"layer {depth}.{name}": value for name, value in attributes.items()}
        if env is env.unwrapped:
            return layers
        env, depth = env.env, depth + 1


def to_env_config(env: Any) -> dict[str, Any]:
    """Return the configuration of an environment.

    Args:
        env: Gymnasium id, ``file.py:name``, mapping, `EnvSpec`, environment class, function that
            returns an environment, or environment. Copies of an environment are used.

    Raises:
        UserError: The value is none of these.
    """
    if isinstance(env, str):
        return {"id": env}
    if is_mapping(env):
        return (
            {**to_plain_data(env), "id": to_env_config(env["id"])["id"]}
            if env.get("id")
            else to_plain_data(env)
        )
    if is_instance_of_dataclass(env):
        return to_plain_data(env)
    if hasattr(env, "reset") and hasattr(env, "step") and not isinstance(env, type):
        return {"id": reference_to(EnvironmentCopyFactory(env), "env")}
    if callable(env):
        return {"id": reference_to(env, "env")}
    raise UserError(
        f"env: expected a gymnasium id, an environment, or a class or function that makes one, got "
        f"{type(env).__name__}"
    )


def to_reward_config(reward: Any, key: str) -> dict[str, Any]:
    """Return the configuration of a reward.

    Args:
        reward: Function of conversations, `Reward`, kind of a reward, folder of a trained reward
            model, finished run of `train_reward`, or mapping; the ``path`` of a mapping of kind
            function can be a function, and the rewards in a mapping of kind gate all of these.
        key: Configuration key of the reward.

    Raises:
        UserError: The value is none of these, or the run has no trained model.
    """
    if is_mapping(reward):
        tree = dict(reward)
        if callable(tree.get("path")):
            tree = {
                **to_reward_config(tree["path"], key),
                **{k: v for k, v in tree.items() if k != "path"},
            }
        for inner in ("reward", "condition"):  # of a gate
            if tree.get(inner) is not None:
                tree[inner] = to_reward_config(tree[inner], f"{key}.{inner}")
        return to_plain_data(tree)
    if path := getattr(reward, "model_path", None):
        return {"kind": "trained", "path": os.fspath(path)}
    if isinstance(reward, str) and os.sep not in reward:
        return {"kind": reward}
    if is_path(reward):
        return {"kind": "trained", "path": os.fspath(reward)}
    if not callable(reward):
        raise UserError(
            f"{key}: expected a function, a kind, a trained reward model or a mapping, got "
            f"{type(reward).__name__}"
        )
    tree = {"kind": "function", "path": reference_to(reward, key)}
    name = getattr(reward, "__name__", None) or getattr(reward, "name", None)
    return {**tree, "name": str(name).strip("<>")} if name else tree


def _callback_entry(callback: Any, key: str) -> Any:
    """Return the entry of a callback in the configuration: a name, a reference or a mapping."""
    if isinstance(callback, str):
        return callback
    if is_mapping(callback):
        entry = dict(callback)
        entry["callback"] = _callback_entry(entry.get("callback"), key)
        return to_plain_data(entry)
    return reference_to(callback, key)


def to_data_configs(data: Any, key: str) -> list[dict[str, Any]]:
    """Return the list of datasets for data of any form.

    Rows that are not in a file are written to the cache folder of the toolkit under a hash of their
    content, because a resumed run reads them again.

    Args:
        data: Path or hub id, `DataSpec`, mapping with ``path``, ``datasets.Dataset``, pandas
            DataFrame, list of rows, or list of sources. The ``path`` of a mapping can be data of
            any of these forms.
        key: Configuration key, for messages.

    Raises:
        UserError: The data have none of these forms, have no rows, have several splits, or cannot
            be stored.
    """
    if is_path(data):
        return [{"path": os.fspath(data)}]
    if isinstance(data, DataSpec):
        return [{k: v for k, v in dataclasses.asdict(data).items() if v is not None}]
    if is_mapping(data):
        if {"train", "test"} & set(data) or type(data).__name__ == "DatasetDict":
            raise UserError(f"{key}: choose a split, such as data[{next(iter(data))!r}]")
        if "path" not in data:
            raise UserError(
                f"{key}: a mapping names a source of data, and this one has no path; give rows as "
                "a list of mappings, also a single row"
            )
        options = {name: to_plain_data(value) for name, value in data.items() if name != "path"}
        return [source | options for source in to_data_configs(data["path"], f"{key}.path")]
    if hasattr(data, "to_parquet") and hasattr(data, "column_names"):
        return [{"path": str(_write_file_to_cache(data.to_parquet, ".parquet"))}]
    if type(data).__name__ == "DataFrame":
        return to_data_configs(data.to_dict("records"), key)
    if not is_sequence(data) or not data:
        raise UserError(
            f"{key}: expected a path, a datasets.Dataset or a list of rows, got "
            f"{type(data).__name__}{' without rows' if is_sequence(data) else ''}"
        )
    if all(_is_row(item) for item in data):
        return [{"path": str(_write_rows_to_cache(data, key))}]
    return [source for item in data for source in to_data_configs(item, key)]


def _is_row(item: Any) -> bool:
    """Return whether an item of a list is a row, and not the configuration of a dataset."""
    return is_mapping(item) and not ("path" in item and set(item) <= _DATA_KEYS)


def _write_rows_to_cache(rows: Sequence[Mapping[str, Any]], key: str) -> Path:
    """Write rows to a JSONL file in the cache folder, unless it exists, and return its path.

    Args:
        rows: The rows.
        key: Configuration key, for messages.

    Raises:
        UserError: A value cannot be written as JSON.
    """
    try:
        text = "".join(json_line(to_plain_data(row)) for row in rows)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: the rows cannot be written as JSON: {error}") from error
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    target = _create_cache_folder() / f"rows-{digest[:32]}.jsonl"
    if not target.exists():
        write_text(target, text)
    return target


def _write_file_to_cache(write: Callable[[str], Any], suffix: str) -> Path:
    """Store the file that ``write(path)`` writes in the cache folder, and return its path.

    The name of the stored file consists of "rows-", a hash of the content and ``suffix``.
    """
    with tempfile.TemporaryDirectory(dir=_create_cache_folder()) as name:
        file = Path(name) / f"rows{suffix}"
        write(str(file))
        target = _create_cache_folder() / f"rows-{sha256_of(file)[:32]}{suffix}"
        file.replace(target)
    return target


def _create_cache_folder() -> Path:
    from rlhf.models.hub import cache_directory

    folder = cache_directory() / "python"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
