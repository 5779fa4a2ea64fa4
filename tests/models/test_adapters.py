"""Adapters name a base that can be found; models are read as their files have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen3MoeForCausalLM,
)

from rlhf.config.load import build_config
from rlhf.config.model import LoraSpec, ModelSpec
from rlhf.errors import UserError
from rlhf.models import hub, loading
from rlhf.models.adapters import WEIGHTS_FILE, load_merged_model, save_adapter
from rlhf.models.loading import load_model, load_tokenizer
from rlhf.models.policy import Policy
from rlhf.models.saving import restore_model, save_model
from rlhf.models.trainable import WeightChangeDetector, make_trainable
from rlhf.reward_models.implicit import ImplicitReward
from rlhf.training.reward_models.new_head import load_backbone_with_head
from tests.helpers.models import tiny_model, tiny_qwen2
from tests.models.families import model_of

IDS = torch.tensor([[5, 17, 80, 9, 120]])
LORA = LoraSpec(rank=2)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub gives for any name: a snapshot in its cache; asked revisions lie beside it."""
    place = tmp_path / "snapshots" / "abc123"
    model, tokenizer = tiny_model()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)

    def download(name: str, *, revision: str | None = None, **_: Any) -> str:
        (tmp_path / "asked").write_text(f"{name} {revision}")
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return place


def adapted(path: str, **keys: Any) -> tuple[Any, Any]:
    """A model with adapters that do something."""
    model, tokenizer = load_model(ModelSpec(path=path, lora=LORA, **keys), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=generator)
    return model, tokenizer


def close(model: Any, other: Any) -> bool:
    """Whether the logits of two models agree."""
    first, second = (m(input_ids=IDS).logits for m in (model, other))
    return bool((first - second).abs().max() <= 1e-5 * first.abs().max())


def test_an_adapter_on_a_model_of_the_hub_names_id_and_commit(
    tmp_path: Path, snapshot: Path
) -> None:
    model, tokenizer = adapted("owner/name", revision="v1")
    assert (tmp_path / "asked").read_text() == "owner/name v1"
    save_model(model, tokenizer, tmp_path / "final")
    config = json.loads((tmp_path / "final/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc123")
    assert not (tmp_path / "final/base").exists()
    assert close(load_merged_model(str(tmp_path / "final")), model)
    assert (tmp_path / "asked").read_text() == "owner/name abc123"


def test_a_base_that_changed_is_refused(tmp_path: Path, snapshot: Path) -> None:
    save_model(*adapted("owner/name"), tmp_path / "final")
    tiny_model(seed=1)[0].save_pretrained(snapshot)
    with pytest.raises(UserError, match=r"differ from the weights with which") as error:
        load_model(ModelSpec(path=str(tmp_path / "final")), seed=0)
    assert "\n" not in str(error.value)


def test_an_adapter_on_a_short_name_names_the_hub_and_loads_without_it(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    short = "smollm2-135m-instruct"
    shutil.copytree(snapshot, tmp_path / "cache/models" / short)

    def unreachable(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    model, tokenizer = adapted(short)
    save_model(model, tokenizer, tmp_path / "final")
    config = json.loads((tmp_path / "final/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == hub.SHORT_NAMES[short].hub
    assert close(load_merged_model(str(tmp_path / "final")), model)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    base, tokenizer = tiny_model()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_model(*adapted(str(tmp_path / "base")), tmp_path / "final")
    file = tmp_path / "final" / WEIGHTS_FILE
    weights = load_file(file)
    name = min(weights)
    if change == "missing":
        del weights[name]
    else:
        weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit its base model") as error:
        load_model(ModelSpec(path=str(tmp_path / "final")), seed=0)
    assert "\n" not in str(error.value)


def test_the_base_of_an_adapter_is_the_one_it_was_trained_on(tmp_path: Path) -> None:
    """A checkpoint names `base` beside it; after a copy another model may have that name there."""
    tokenizer = tiny_model()[1]
    for name, seed in (("start", 0), ("other", 1)):
        tiny_model(seed=seed)[0].save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model, _ = adapted(str(tmp_path / "start"))
    checkpoints = tmp_path / "run/checkpoints"
    save_adapter(model, tokenizer, checkpoints / "step-1", base=checkpoints / "base")
    copy = tmp_path / "copy/step-1"
    shutil.copytree(checkpoints / "step-1", copy)
    shutil.copytree(tmp_path / "other", tmp_path / "copy/base")
    assert close(load_merged_model(str(copy)), model)  # the original path still exists
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert close(load_merged_model(str(tmp_path / "moved/checkpoints/step-1")), model)
    with pytest.raises(UserError, match="differ from the weights with which"):
        load_merged_model(str(copy))
    shutil.copytree(tmp_path / "other", checkpoints / "base")
    with pytest.raises(UserError, match="differ from the weights with which"):
        load_merged_model(str(copy))
    shutil.rmtree(tmp_path / "copy/base")
    shutil.copytree(tmp_path / "start", tmp_path / "copy/base")
    assert close(load_merged_model(str(copy)), model)


@pytest.mark.parametrize(
    "form",
    [
        LoraSpec(rank=2),
        LoraSpec(rank=2, use_dora=True),
        LoraSpec(rank=2, use_rslora=True),
        LoraSpec(rank=2, modules_to_save=["norm"]),
    ],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)
def test_an_implicit_reward_reads_adapters_of_every_form(tmp_path: Path, form: LoraSpec) -> None:
    base, tokenizer = tiny_model()
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "start")
    spec = ModelSpec(path=str(tmp_path / "start"), lora=form)
    model, tokenizer = load_model(spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    save_adapter(model, tokenizer, tmp_path / "final")
    loaded = ImplicitReward.load(tmp_path / "final", tmp_path / "start", device="cpu")
    assert not close(loaded.reference, model)
    assert close(loaded.policy, model)
    shutil.move(tmp_path / "final/base", tmp_path / "base")  # only its name leads to it
    config = tmp_path / "final/adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(named))
    loaded = ImplicitReward.load(tmp_path / "final", tmp_path / "start", device="cpu")
    assert close(loaded.policy, model)


@pytest.mark.parametrize("modules", [[], ["lm_head"]])
def test_an_adapter_keeps_the_rows_of_training_if_the_tokenizer_has_more_tokens(
    tmp_path: Path, modules: list[str]
) -> None:
    base, tokenizer = tiny_qwen2()  # the class of its tokenizer adds an unknown token
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "start")
    spec = ModelSpec(path=str(tmp_path / "start"), lora=LoraSpec(rank=2, modules_to_save=modules))
    model, tokenizer = load_model(spec, seed=0)
    assert len(tokenizer) > model.get_input_embeddings().num_embeddings
    save_adapter(model, tokenizer, tmp_path / "final")
    merged = load_merged_model(str(tmp_path / "final"))
    assert merged.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    assert close(merged, model)


def test_missing_adapter_base_is_user_error(tmp_path: Path) -> None:
    base, tokenizer = tiny_model()
    base.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model, _ = adapted(str(tmp_path / "m"))
    save_adapter(model, tokenizer, tmp_path / "final")
    (tmp_path / "final/base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the base model '.*' of .* is missing") as error:
        load_model(ModelSpec(path=str(tmp_path / "final")), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [tiny_model, tiny_qwen2])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_weights_are_read_in_the_dtype_they_are_used_in(
    tmp_path: Path, make: Any, stored: torch.dtype, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And compute what plain transformers do: rotary frequencies are not rounded with them."""
    model, tokenizer = make()
    model.to(stored).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    dtype = getattr(torch, asked)
    read, read_as = loading.load_causal_model, []

    def watched(place: str, *, dtype: torch.dtype) -> Any:
        read_as.append(dtype)
        return read(place, dtype=dtype)

    monkeypatch.setattr(loading, "load_causal_model", watched)
    ours, _ = load_model(ModelSpec(path=str(tmp_path), dtype=asked), seed=0)
    assert read_as == [dtype]
    assert {p.dtype for p in ours.parameters()} == {dtype}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    frequencies = [b.dtype for n, b in ours.named_buffers() if n.endswith("inv_freq")]
    assert set(frequencies) == {torch.float32}


def test_requested_attention_implementation_is_kept(tmp_path: Path) -> None:
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    supports_packing = {}
    for name in (None, "eager", "sdpa"):
        spec = ModelSpec(path=str(tmp_path), attn_implementation=name)
        policy = Policy(*load_model(spec, seed=0))
        supports_packing[name] = policy.supports_packing
        assert policy.model.config._attn_implementation == name or name is None
    assert supports_packing == {None: True, "eager": False, "sdpa": False}
    with pytest.raises(UserError, match=r"model\.attn_implementation flesh: ") as error:
        load_model(ModelSpec(path=str(tmp_path), attn_implementation="flesh"), seed=0)
    assert "\n" not in str(error.value)


def test_revision_requires_hub_id(tmp_path: Path) -> None:
    tiny_model()[0].save_pretrained(tmp_path)
    for path in (str(tmp_path), "smollm2-135m-instruct"):
        with pytest.raises(UserError, match=r"model\.revision has no effect on"):
            hub.fetch_model_folder(path, revision="main")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_prj"]}, "target_modules: .*did you mean 'q_proj'"),
        ({"modules_to_save": ["nrm"]}, "modules_to_save: .*did you mean 'norm'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head shares its weights"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens shares its weights"),
        ({"target_modules": ["norm"]}, "LlamaRMSNorm"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused(
    tmp_path: Path, lora: dict[str, Any], words: str
) -> None:
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        load_model(ModelSpec(path=str(tmp_path), lora=LoraSpec(**lora)), seed=0)
    assert "\n" not in str(error.value)


def test_untied_output_head_can_be_trained_fully(tmp_path: Path) -> None:
    model, tokenizer = tiny_qwen2()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    spec = LoraSpec(rank=2, modules_to_save=["lm_head", "embed_tokens"])
    trained, _ = load_model(ModelSpec(path=str(tmp_path / "m"), lora=spec), seed=0)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    save_model(trained, tokenizer, tmp_path / "final")
    assert close(load_merged_model(str(tmp_path / "final")), trained)
    assert not close(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), trained)


def test_invalid_lora_values_are_refused() -> None:
    for keys in ({"alpha": 0}, {"dropout": 1.0}, {"rank": 0}):
        with pytest.raises(UserError, match=rf"lora\.{next(iter(keys))} must be "):
            build_config(ModelSpec, {"path": "folder", "lora": keys})
    with pytest.raises(ValueError, match="q_proj is in both"):
        LoraSpec(target_modules=["q_proj"], modules_to_save=["q_proj"])


def test_a_model_with_nothing_to_train_is_refused() -> None:
    class Empty(nn.Module):
        pass

    with pytest.raises(UserError, match="no parameter to train"):
        make_trainable(Empty())


def test_training_moves_a_model_when_a_bit_of_it_differs() -> None:
    model, _ = tiny_model()
    make_trainable(model)
    movement = WeightChangeDetector(model)
    assert movement.changed_tensor_fraction() == 0
    count = len(list(model.parameters()))
    with torch.no_grad():
        next(model.parameters())[3, 5] *= 1 + 2e-7
    assert movement.changed_tensor_fraction() == pytest.approx(1 / count)
    assert count > 10


def test_saved_model_is_restored_bit_exactly(tmp_path: Path) -> None:
    for name, make in (("llama", tiny_model), ("qwen", tiny_qwen2)):
        model, tokenizer = make(seed=1)
        save_model(model, tokenizer, tmp_path / name)
        other, _ = make(seed=2)
        restore_model(other, tmp_path / name)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert load_tokenizer(str(tmp_path / name)).chat_template


def test_restore_weights_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    """No weight of the model is replaced by a random one, and an error names the folder."""
    model, tokenizer = tiny_model(seed=1)
    save_model(model, tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    norm = weights.pop("model.norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weight model\.norm\.weight is missing"):
        restore_model(model, tmp_path)
    save_file({**weights, "model.norm.weight": norm[:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has the shape \[\d+\]"):
        restore_model(model, tmp_path)


def test_restore_folder_without_model_is_user_error(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"contains no model. A checkpoint of an earlier version"):
        restore_model(tiny_model()[0], tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_quantized_weights_are_refused(tmp_path: Path, method: str) -> None:
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (
        lambda: load_model(ModelSpec(path=str(tmp_path)), seed=0),
        lambda: load_backbone_with_head(str(tmp_path), ["reward"], per_token=False),
    ):
        with pytest.raises(UserError, match=rf"has quantized weights \({method}\)") as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["compressed-tensors", "aqlm", "auto-round", "quark"])
def test_formats_whose_package_is_missing_are_refused_too(tmp_path: Path, method: str) -> None:
    test_quantized_weights_are_refused(tmp_path, method)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", "half"], ids=str
)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_damaged_weights_are_one_line(tmp_path: Path, content: Any, name: str) -> None:
    model, tokenizer = adapted(str(saved(tmp_path / "base")))
    save_model(model, tokenizer, tmp_path / "adapter")
    folder = tmp_path / ("base" if name.startswith("model") else "adapter")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    for load in (
        lambda: load_model(ModelSpec(path=str(folder)), seed=0),
        lambda: load_backbone_with_head(str(folder), ["reward"], per_token=False),
    ):
        with pytest.raises(UserError, match=f"{name} is damaged or incomplete") as error:
            load()
        assert "\n" not in str(error.value)


def test_config_that_is_a_list_is_one_line(tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        load_model(ModelSpec(path=str(tmp_path)), seed=0)


def saved(folder: Path, *, tied: bool = False) -> Path:
    """Save a Llama, and return its folder."""
    model, tokenizer = tiny_model()
    config = LlamaConfig.from_dict(model.config.to_dict() | {"tie_word_embeddings": tied})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [MixtralForCausalLM, Qwen3MoeForCausalLM])
def test_adapters_on_experts_are_saved_with_their_base(tmp_path: Path, kind: Any) -> None:
    """PEFT wraps a module with two adapted tensors twice; the base has the plain names."""
    _, tokenizer = tiny_model()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
    }
    number = "num_local_experts" if kind is MixtralForCausalLM else "num_experts"
    moe = {number: 4, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config: Any = kind.config_class
        kind(config(**settings, **moe)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    model, tokenizer = adapted(str(tmp_path / "start"))
    assert any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
    save_model(model, tokenizer, tmp_path / "final")
    start, base = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("start", "final/base")
    )
    assert start.keys() == base.keys()
    assert all(torch.equal(start[key], base[key]) for key in start)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ours = load_merged_model(str(tmp_path / "final"))
    with torch.no_grad():
        expected, found, origin = (
            m(input_ids=IDS).logits
            for m in (plain, ours, AutoModelForCausalLM.from_pretrained(tmp_path / "start"))
        )
    size = expected.abs().max()
    assert (expected - origin).abs().max() > 0.01 * size
    assert (found - expected).abs().max() <= 1e-5 * size


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["q_proj", "layers.9.self_attn.v_proj"]},
        {"modules_to_save": ["layers.9.mlp"]},
        {"modules_to_save": ["layers.0.norm"]},
    ],
)
def test_a_path_that_no_module_has_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    spec = ModelSpec(path=str(saved(tmp_path)), lora=LoraSpec(rank=2, **keys))
    with pytest.raises(UserError, match="the model has no module 'layers"):
        load_model(spec, seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
    ],
)
def test_an_adapter_whose_merge_would_change_the_logits_is_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A merge into a shared weight acts at every place that uses it."""
    base = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base", tied=True))
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3, generator=generator)
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="cannot be merged into its base: the merge"):
        load_merged_model(str(tmp_path / "adapter"))


def test_an_adapter_without_a_merge_is_one_line(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base"))
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="cannot be merged into its base"):
        load_merged_model(str(tmp_path / "adapter"))


def test_adapters_are_read_under_the_names_of_their_file(tmp_path: Path) -> None:
    """PEFT renames weights of Laguna's shared experts at load, and leaves the adapters at zero."""
    model_of("laguna").save_pretrained(tmp_path / "start")
    tiny_model()[1].save_pretrained(tmp_path / "start")
    model, tokenizer = adapted(str(tmp_path / "start"))
    save_model(model, tokenizer, tmp_path / "final")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        found = load_merged_model(str(tmp_path / "final"))(input_ids=IDS).logits
        again, _ = load_model(ModelSpec(path=str(tmp_path / "start"), lora=LORA), seed=0)
        restore_model(again, tmp_path / "final")
        assert torch.equal(again(input_ids=IDS).logits, expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
def test_adapters_that_the_model_cannot_run_are_refused(tmp_path: Path, family: str) -> None:
    """The router of these families is a linear layer that returns a tuple."""
    model_of(family).save_pretrained(tmp_path)
    tiny_model()[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be run with these adapters"):
        load_model(ModelSpec(path=str(tmp_path), lora=LORA), seed=0)


UNREACHED = {"jamba": "dt_proj", "longcat_flash": "classifier", "zamba": "q_proj"}


@pytest.mark.parametrize("family", UNREACHED)
def test_adapters_that_a_merge_would_apply_differently_are_refused(
    tmp_path: Path, family: str
) -> None:
    """Jamba's scan and LongCat's router read weights themselves; Zamba's layers share theirs."""
    model_of(family).save_pretrained(tmp_path)
    tiny_model()[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"target_modules: .*\b{UNREACHED[family]}\b"):
        load_model(ModelSpec(path=str(tmp_path), lora=LORA), seed=0)
    others = {"jamba": "in_proj", "longcat_flash": "down_proj", "zamba": "in_proj"}
    lora = LoraSpec(rank=2, target_modules=[others[family]])
    load_model(ModelSpec(path=str(tmp_path), lora=lora), seed=0)


def test_an_adapter_that_is_not_used_in_training_is_not_merged(tmp_path: Path) -> None:
    """Jamba's scan reads the weights of a projection itself, so its adapter has no effect."""
    base = model_of("jamba")
    base.save_pretrained(tmp_path / "start")
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["dt_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3, generator=generator)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "start")
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="cannot be merged into its base"):
        load_merged_model(str(tmp_path / "adapter"))
