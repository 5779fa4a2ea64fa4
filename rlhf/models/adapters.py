"""Add LoRA adapters to a model, save them with a reference to their base, and merge them.

An adapter can be used only with the base weights with which it was trained. If these are unchanged
weights from the Hugging Face Hub, the adapter folder contains the Hub id of the model. Otherwise,
a copy of the base model is saved in ``base/`` in the folder; the checkpoints of a run share the
copy ``base/`` beside them. The adapters can therefore be moved together with the copy.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from rlhf.common.files import atomic_path, read_json
from rlhf.common.names import did_you_mean
from rlhf.config.model import LoraSpec
from rlhf.errors import UserError, first_line
from rlhf.models.architecture import is_adapter_weight, unwrap_peft
from rlhf.models.checks import max_or_mean_relative_difference, read_causal_model
from rlhf.models.comparison import evaluation_mode, forward_errors_as_user_errors, tolerance_of
from rlhf.models.hub import check_model_files, find_weight_folders
from rlhf.models.sharding.processes import (
    has_sharded_parameters,
    shared_atomic_path,
    this_process_writes,
    value_of_first_process,
)
from rlhf.models.sharding.saving import write_model
from rlhf.models.sharding.tensors import WholeTensors
from rlhf.reward_models.generic_heads import classifier_class
from rlhf.runs.checksums import write_checksums

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FOLDER = "base"
FINGERPRINT_FILE = "base_fingerprint.json"

# Minimum number of elements that are sampled from a large tensor for a fingerprint.
_SAMPLED_ELEMENTS = 4096


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face Hub, whose weights are unchanged."""

    name: str
    """Hub id, OWNER/NAME."""
    revision: str | None = None
    """Commit, or None if it is not known."""


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder contains a LoRA adapter."""
    return (Path(folder) / CONFIG_FILE).exists()


def add_lora(
    model: Any,
    spec: LoraSpec,
    *,
    seed: int,
    hub: HubModel | None = None,
    task: str = "CAUSAL_LM",
    head_names: Iterable[str] = (),
    check_effect: bool = True,
) -> Any:
    """Wrap a model with new adapters, which do not change its outputs before the first step.

    Args:
        model: Transformers model without adapters.
        spec: Configuration of the adapters.
        seed: Random seed of the adapters' weights.
        hub: Source of the base weights, or None if they differ from all weights on the Hub.
        task: Task type of PEFT, such as "CAUSAL_LM" or "SEQ_CLS".
        head_names: Names of new modules. They get no adapters; all their parameters are trained.
        check_effect: Whether to check with forward passes that the adapters have an effect.

    Returns:
        The PEFT model. Its attribute ``hub_model`` is ``hub``, which ``save_adapter`` reads.

    Raises:
        UserError: A module in ``spec`` does not exist or shares its weights with another module, or
            the model cannot be run with the adapters.
    """
    head_names = list(head_names)
    _check_lora_modules(model, spec)
    config = LoraConfig(
        task_type=task,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules or "all-linear",
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        exclude_modules=head_names or None,
        modules_to_save=[*head_names, *spec.modules_to_save] or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            adapted: Any = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.lora: {first_line(error)}") from error
    for name, _ in adapted.named_parameters():
        if ".modules_to_save." in name and ".lora_" in name:
            raise UserError(
                f"model.lora.modules_to_save: {name.split('.modules_to_save.')[0].split('.')[-1]} "
                "contains modules that also get adapters: remove it from modules_to_save, or set "
                "target_modules to modules outside it"
            )
    if check_effect:
        with torch.no_grad(), evaluation_mode(adapted):
            _check_adapters_have_effect(adapted)
    adapted.hub_model = hub
    return adapted


def _check_adapters_have_effect(adapted: Any) -> None:
    """Check that no adapter is bypassed in training and that no adapted weight is shared.

    Raises:
        UserError: The model cannot be run with the adapters. Or the model shares an adapted weight
            with another module, or uses it without a call of the module that contains the weight.
    """
    name = type(unwrap_peft(adapted)).__name__
    modules: dict[str, Any] = {
        path: m for path, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)
    }
    owners = Counter(id(p) for m in adapted.modules() for p in m._parameters.values())
    for path, module in modules.items():
        if any(owners[id(p)] > 1 for p in module.get_base_layer().parameters()):
            raise UserError(
                f"model.lora.target_modules: {path.rpartition('.')[2]} shares its weights with "
                f"another module of {name}, so its adapter could not be merged"
            )
    used: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: used.add(m)) for m in modules.values()]
    ids = torch.tensor([[1, 2]], device=adapted.device)
    with forward_errors_as_user_errors(f"model.lora: {name} cannot be run with these adapters"):
        logits = adapted(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    unused: dict[str, list[Any]] = defaultdict(list)
    for path, module in modules.items():
        if module not in used:
            unused[path.rpartition(".")[2]].append(module.get_base_layer().weight)
    # If a module was not called, its weights are negated. The logits change if the model uses the
    # weights without the module. They do not change for an expert to which no token was routed.
    for kind, weights in unused.items():
        for weight in weights:
            weight.neg_()
        changed = not torch.equal(adapted(input_ids=ids).logits, logits)
        for weight in weights:
            weight.neg_()  # restores every bit
        if changed:
            raise UserError(
                f"model.lora.target_modules: {name} uses the weights of {kind} without calling "
                "the module, so its adapters would not be trained: remove "
                f"{kind} from target_modules"
            )


def _check_lora_modules(model: nn.Module, spec: LoraSpec) -> None:
    """Check that the modules in ``spec`` exist and do not share the tied embedding weight.

    Raises:
        UserError: A module does not exist, or its weight is the tied embedding weight.
    """
    modules = dict(model.named_modules())
    names = {path.rpartition(".")[2] for path in modules}
    table = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    for key in ("target_modules", "modules_to_save"):
        for name in getattr(spec, key):
            matches = [m for path, m in modules.items() if f".{path}".endswith(f".{name}")]
            if not matches:
                hint = did_you_mean(name.rpartition(".")[2], names)
                raise UserError(f"model.lora.{key}: the model has no module {name!r}{hint}")
            if any(getattr(m, "weight", None) is table for m in matches) and table is head:
                raise UserError(
                    f"model.lora.{key}: {name} shares its weights with another module of this "
                    "model (tie_word_embeddings), so it cannot be trained separately"
                )


def save_adapter(model: Any, tokenizer: Any, folder: Path, *, base: Path | None = None) -> None:
    """Save the adapters and the tokenizer of a PEFT model.

    If the base weights are those of a model on the Hub, its Hub id is saved. Otherwise, a copy of
    the base model is saved.

    Args:
        model: PEFT model.
        tokenizer: Tokenizer of the model.
        folder: Folder of the adapters.
        base: Folder of the copy of the base model; by default, ``base/`` in ``folder``. An existing
            folder is not written again.

    If the base model is sharded, every process must call this function, and the first one writes.
    """
    config, hub = model.peft_config["default"], getattr(model, "hub_model", None)
    folder.mkdir(parents=True, exist_ok=True)
    if hub is not None:
        config.base_model_name_or_path, config.revision = hub.name, hub.revision
    else:
        base = folder / BASE_FOLDER if base is None else base
        write_base_model_once(model, tokenizer, base)
        config.base_model_name_or_path, config.revision = str(base.absolute()), None
    fingerprint = _fingerprint_of_base(model)
    if not this_process_writes(model):
        return
    # PEFT need not save the embedding: a trained embedding is in modules_to_save, and a base model
    # with a resized embedding is saved as a copy. The second adapter, which TRL adds for the
    # reference, is not saved.
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    if (settings := getattr(unwrap_peft(model), "generation_config", None)) is not None:
        settings.save_pretrained(folder)
    if fingerprint is not None:
        text = json.dumps({"sampled_crc32": fingerprint})
        (folder / FINGERPRINT_FILE).write_text(text + "\n")


def _fingerprint_of_base(model: Any) -> int | None:
    """Return the fingerprint of the base model of a PEFT model, or None for float16 weights.

    Sharded weights are gathered once, because the base model is not trained; every process must
    call this function.
    """
    known = getattr(model, "base_fingerprint", None)
    if known is not None:
        return known
    weights = base_weights(model)
    if any(w.dtype == torch.float16 for w in weights.values()):
        return None
    if not has_sharded_parameters(model):
        return fingerprint_of(weights)
    model.base_fingerprint = fingerprint_of(WholeTensors(weights))
    return model.base_fingerprint


def write_base_model_once(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the base model of a PEFT model and the tokenizer to a folder, unless it exists.

    The folder is written under a temporary name and then renamed, so it is always complete. If the
    model is sharded, every process must call this function.
    """
    sharded = has_sharded_parameters(model)
    exists = folder.exists()
    if value_of_first_process(exists) if sharded else exists:
        return
    with (shared_atomic_path if sharded else atomic_path)(folder) as partial:
        write_model(unwrap_peft(model), partial, weights=base_weights(model))
        if this_process_writes(model):
            tokenizer.save_pretrained(partial)
            write_checksums(partial)


def copy_base_to_final(checkpoints: Path, final: Path) -> None:
    """Copy ``base/`` from the folder of checkpoints, if it exists, to ``final``, if that has none.

    Hard links are used if the file system supports them, because neither folder is changed later.
    """
    source, target = checkpoints / BASE_FOLDER, final / BASE_FOLDER
    if not source.exists() or target.exists():
        return

    def link_or_copy(first: str, second: str) -> None:
        try:
            os.link(first, second)
        except OSError:
            shutil.copy2(first, second)

    with atomic_path(target) as partial:
        shutil.copytree(source, partial, copy_function=link_or_copy)


def copy_base_and_set_its_path(model: Any, tokenizer: Any, checkpoints: Path) -> None:
    """Set the base model in the PEFT configuration for the checkpoints that TRL writes.

    The base model is copied into ``checkpoints``, except if it is an unchanged model from the Hub.
    In this case, the configuration keeps the local folder from which the model was loaded. With the
    Hub id in the configuration, PEFT would contact the Hub at every save.
    """
    if getattr(model, "hub_model", None) is None:
        write_base_model_once(model, tokenizer, checkpoints / BASE_FOLDER)
        base = str((checkpoints / BASE_FOLDER).absolute())
        model.peft_config["default"].base_model_name_or_path = base


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of a PEFT model's base model, with its names before the wrapping."""
    return {
        re.sub(r"(\.base_layer|\.original_module)+\.", ".", name): tensor
        for name, tensor in unwrap_peft(model).state_dict(keep_vars=True).items()
        if not is_adapter_weight(name)
    }


def fingerprint_of(weights: Mapping[str, torch.Tensor]) -> int:
    """Return a CRC-32 checksum of elements of all floating-point tensors, rounded to bfloat16.

    Large tensors are sampled at regular intervals. Float32 weights and their bfloat16 copy have
    equal checksums. The checksum of a float16 copy can differ, because its weights are rounded
    twice: first to float16, then to bfloat16.
    """
    total = 0
    for name in sorted(weights):
        tensor = weights[name].detach()
        if not tensor.is_floating_point():
            continue
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED_ELEMENTS)].to("cpu", torch.bfloat16)
        total = zlib.crc32(sample.contiguous().view(torch.int16).numpy().tobytes(), total)
    return total


def load_merged_model(folder: str) -> Any:
    """Load an adapter folder and return its base model with the adapters merged, in float32.

    Raises:
        UserError: The base model is not available, its weights differ from those in training, the
            task type of the adapter is not supported, or the adapters cannot be merged.
    """
    check_model_files(folder)
    config = read_json(Path(folder) / CONFIG_FILE)
    task = config.get("task_type") or "CAUSAL_LM"
    if task == "CAUSAL_LM":
        load_base = functools.partial(read_causal_model, dtype=torch.float32)
    elif task in ("SEQ_CLS", "TOKEN_CLS"):
        outputs = _num_head_outputs(Path(folder))

        def load_base(source: str) -> Any:
            classifier = classifier_class(source, per_token=task == "TOKEN_CLS")
            return classifier.from_pretrained(source, dtype=torch.float32, num_labels=outputs)

    else:
        raise UserError(
            f"{folder} contains an adapter with the PEFT task type {task}, which is not supported: "
            "use CAUSAL_LM, SEQ_CLS or TOKEN_CLS"
        )
    base = _load_base_model(Path(folder), config, load_base)
    _grow_embedding_to_tokenizer(base, folder)
    adapted: Any = PeftModel.from_pretrained(base, folder)
    load_adapter_weights(adapted, folder)
    merged = _merge_adapters(adapted, folder)
    if (Path(folder) / "generation_config.json").exists():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    return merged


def _merge_adapters(adapted: Any, folder: str) -> Any:
    """Merge adapters into their base model, and return it without the PEFT wrapper.

    Raises:
        UserError: The adapters cannot be merged, or the merge changes the logits, for example
            because an adapted weight is shared with another module.
    """
    size = unwrap_peft(adapted).config.get_text_config().vocab_size
    ids = torch.randint(size, (1, 8), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        evaluation_mode(adapted),
        forward_errors_as_user_errors(f"{folder} cannot be merged into its base"),
    ):
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        gap = max_or_mean_relative_difference(merged(input_ids=ids).logits, expected)
    if not gap <= tolerance_of(merged):
        raise UserError(
            f"{folder} cannot be merged into its base: the merge would change the logits by a "
            f"relative difference of {gap:.1e}"
        )
    return merged


def _load_base_model(folder: Path, config: dict[str, Any], load_base: Callable[[str], Any]) -> Any:
    """Load the base model of an adapter, and check its fingerprint if one is saved.

    Raises:
        UserError: The base model is not available, or its weights differ from those in training.
    """
    name = str(config.get("base_model_name_or_path") or "")
    expected = None
    if (folder / FINGERPRINT_FILE).exists():
        expected = read_json(folder / FINGERPRINT_FILE)["sampled_crc32"]
    for source in _base_folder_candidates(folder, name, config.get("revision")):
        check_model_files(source)
        base = load_merged_model(source) if is_adapter(source) else load_base(source)
        if expected is None or fingerprint_of(base.state_dict()) == expected:
            return base
    raise UserError(
        f"{folder} is an adapter of {name}, but the weights of {name} on this machine differ from "
        "the weights with which the adapter was trained: restore the original weights, or train "
        "the adapter again"
    )


def _base_folder_candidates(folder: Path, name: str, revision: str | None) -> list[str]:
    """Return the folders that may contain the base model of an adapter, most likely first.

    Raises:
        UserError: The base model is missing.
    """
    candidates = [folder / BASE_FOLDER]
    if name:  # a relative path is relative to the adapter
        candidates.append(folder / name)
    if Path(name).name == BASE_FOLDER:  # checkpoints of a run share it; the run can be moved
        candidates.append(folder.parent / BASE_FOLDER)
    if folders := [str(candidate) for candidate in candidates if candidate.is_dir()]:
        return folders
    try:
        return find_weight_folders(name, revision=revision)
    except UserError as error:
        raise UserError(
            f"the base model {name!r} of the adapter {folder} is missing: {error}"
        ) from error


@torch.no_grad()
def load_adapter_weights(adapted: Any, folder: str | Path) -> None:
    """Load the weights of an adapter folder into a PEFT model, in place.

    PEFT's own loader is not sufficient, for two reasons. It only warns about missing adapter
    weights, which then keep their initial values and have no effect. In some model families
    (Laguna), it renames weights and does not load them.

    Raises:
        UserError: Weights of the PEFT model are missing in the folder or have another shape, or the
            folder has LoRA weights that the model does not have.
    """
    stored = load_file(Path(folder) / WEIGHTS_FILE)
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = weights.keys() - stored.keys()
    unused = {name for name in stored.keys() - weights.keys() if "lora_" in name}
    problem = ""
    if missing:
        problem = f"the weights {min(missing)} are missing in the adapter"
    elif unused:
        problem = f"the adapter has weights {min(unused)}, which the model does not have"
    elif other := [name for name in weights if weights[name].shape != stored[name].shape]:
        shapes = [list(tensors[other[0]].shape) for tensors in (stored, weights)]
        problem = f"the weights {other[0]} have the shape {shapes[0]} instead of {shapes[1]}"
    if problem:
        raise UserError(f"{folder} does not fit its base model: {problem}")
    for name, weight in weights.items():
        weight.copy_(stored[name])


def _grow_embedding_to_tokenizer(base: Any, folder: str) -> None:
    """Enlarge the base model's embedding if the adapter's tokenizer has more tokens than rows.

    The base model of an adapter with a fingerprint has the rows with which it was trained, and
    further rows would change the log-probabilities.
    """
    has_rows_of_training = (Path(folder) / FINGERPRINT_FILE).exists()
    if has_rows_of_training or not (Path(folder) / "tokenizer_config.json").exists():
        return
    size = len(AutoTokenizer.from_pretrained(folder))
    if size > base.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            base.resize_token_embeddings(size)


def _num_head_outputs(adapter: Path) -> int:
    """Return the number of outputs of the head in the adapter folder of a classifier.

    Raises:
        UserError: The folder contains no head.
    """
    with safe_open(adapter / WEIGHTS_FILE, "pt") as weights:
        heads = [
            weights.get_slice(key).get_shape()[0]
            for key in weights.keys()  # noqa: SIM118
            if key.endswith(".weight") and "lora" not in key and key.count(".layers.") == 0
        ]
    if not heads:
        raise UserError(
            f"{adapter} has no head: the adapter was trained without the head in modules_to_save"
        )
    return heads[-1]
