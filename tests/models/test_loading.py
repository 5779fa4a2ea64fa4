"""Padding tokens, the check of a model's head, adapters, and models from scratch."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf.config.model import LoraSpec, ModelSpec, ScratchSpec
from rlhf.errors import UserError
from rlhf.models.adapters import add_lora
from rlhf.models.architecture import context_length_of
from rlhf.models.loading import (
    check_padding_and_causality,
    ensure_pad_token_and_embedding,
    load_causal_model,
    load_model,
    load_tokenizer,
    merge_adapter,
)
from rlhf.models.output_head import logits_of
from tests.helpers.models import TEXTS, tiny_gpt2, tiny_model, tiny_qwen2, tiny_tokenizer

IDS = torch.tensor([[5, 17, 80, 9, 120]])


def saved(folder, *, pad: str | None = None):
    """A tiny model in a folder; its pad token replaced where one is named."""
    model, tokenizer = tiny_model()
    if pad is not None:
        tokenizer.pad_token = pad
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def one_line(error) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) > 10


def test_a_pad_token_of_its_own_is_kept():
    model, tokenizer = tiny_model()
    model.config.pad_token_id = None
    ensure_pad_token_and_embedding(tokenizer, model)
    assert tokenizer.pad_token == "<|pad|>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_padding_uses_reserved_token_instead_of_eos(pad):
    model, tokenizer = tiny_model()
    tokenizer.pad_token = pad
    rows = model.get_input_embeddings().num_embeddings
    ensure_pad_token_and_embedding(tokenizer, model)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings == rows


def crowded(taken: str):
    """A model whose vocabulary sets nothing aside: every candidate but ``taken`` is missing."""
    model, tokenizer = tiny_model()
    backend = tokenizer.backend_tokenizer.to_str().replace("<|pad|>", taken)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer.from_str(backend)
    return model, PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=taken)


def test_an_added_pad_token_grows_the_embedding_and_leaves_the_other_logits():
    model, tokenizer = crowded("<|endoftext|>")  # a candidate, but the text's end already
    before, rows = model(input_ids=IDS).logits, model.config.vocab_size
    ensure_pad_token_and_embedding(tokenizer, model)
    assert tokenizer.pad_token_id == rows
    assert model.get_input_embeddings().num_embeddings == rows + 1
    after = model(input_ids=IDS).logits
    torch.testing.assert_close(after[..., :rows], before)


def test_an_added_pad_token_is_the_same_every_time():
    def grown(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model, tokenizer = crowded("<|endoftext|>")
        ensure_pad_token_and_embedding(tokenizer, model)
        return model.get_input_embeddings().weight.detach()

    first, draw = grown(0), torch.rand(())
    assert torch.equal(first, grown(1))
    torch.manual_seed(0)
    assert torch.rand(()) == draw  # the global generator is left as it was


def test_an_embedding_with_spare_rows_does_not_shrink():
    model, tokenizer = crowded("<|endoftext|>")
    model.resize_token_embeddings(400)
    ensure_pad_token_and_embedding(tokenizer, model)
    assert model.get_input_embeddings().num_embeddings == 400


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2, tiny_qwen2])
def test_ordinary_models_pass_the_check(make):
    check_padding_and_causality(*make())


class Scaled(LlamaForCausalLM):
    """A head with a form of its own, as families invent them."""

    def forward(self, *args, **kwargs):
        output: Any = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_unknown_output_head_uses_own_forward():
    model, tokenizer = tiny_model()
    model.__class__ = Scaled
    check_padding_and_causality(model, tokenizer)
    hidden = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(logits_of(model, hidden), model(input_ids=IDS).logits)
    torch.testing.assert_close(logits_of(model, hidden), 1.5 * model.lm_head(hidden))


def test_a_scaling_that_the_model_does_not_apply_is_not_applied():
    model, _ = tiny_model()
    model.config.logit_scale = 0.25  # Cohere's name, on a model that does not read it
    hidden = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(logits_of(model, hidden), model.lm_head(hidden))


def test_model_that_depends_on_padding_is_refused():
    model, tokenizer = tiny_model()
    trunk = model.model
    plain = trunk.forward

    def bidirectional(input_ids, **kwargs):
        output = plain(input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(
            1, keepdim=True
        )
        return output

    trunk.forward = bidirectional
    with pytest.raises(UserError, match="padding changes the logits"):
        check_padding_and_causality(model, tokenizer)


def trained_adapter(folder, base: str):
    """A LoRA folder over the base, with weights that do something."""
    adapted = add_lora(load_causal_model(base), LoraSpec(rank=2), seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return adapted.eval()


def test_an_adapter_folder_is_merged_when_it_is_loaded(tmp_path):
    base = saved(tmp_path / "base")
    adapted = trained_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    model, _ = load_model(
        ModelSpec(path=str(tmp_path / "adapter")), seed=0, device=torch.device("cpu")
    )
    assert type(model) is LlamaForCausalLM
    expected = adapted(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base(input_ids=IDS).logits).abs().max() > 1e-2


def test_merging_keeps_the_rows_that_the_vocabulary_does_not_use(tmp_path):
    model, tokenizer = tiny_model()
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = trained_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    merged = load_causal_model(str(tmp_path / "adapter"))
    expected = adapted(input_ids=IDS).logits
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_merge_adapter_writes_an_ordinary_checkpoint(tmp_path):
    saved(tmp_path / "base")
    adapted = trained_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    merged = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (merged / "adapter_config.json").exists()
    assert load_tokenizer(str(merged)).chat_template
    found = load_causal_model(str(merged))(input_ids=IDS).logits
    torch.testing.assert_close(found, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="exists already"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    with pytest.raises(UserError, match=r"no adapter_config\.json") as error:
        merge_adapter(str(tmp_path / "base"), tmp_path / "other")
    assert one_line(error)


@pytest.mark.parametrize("outputs", [1, 3])
def test_merge_adapter_keeps_the_head_that_a_classifier_carries(tmp_path, outputs):
    saved(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=outputs, pad_token_id=0
    )
    config = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"])
    adapted: Any = get_peft_model(base, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter of a classifier, not"):
        load_causal_model(str(tmp_path / "adapter"))
    merged = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    expected = adapted.eval()(input_ids=IDS).logits
    assert expected.shape == (1, outputs)
    torch.testing.assert_close(plain.eval()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_reward_adapter_without_head_is_refused(tmp_path):
    saved(tmp_path / "base")
    trained_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    with pytest.raises(UserError, match="has no head: the adapter was trained without the head"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")


def test_new_adapter_does_not_change_logits():
    model, _ = tiny_model(double=True)
    before = model(input_ids=IDS).logits
    adapted = add_lora(model, LoraSpec(rank=2), seed=0)
    assert torch.equal(adapted(input_ids=IDS).logits, before)


def test_adapters_and_scratch_weights_depend_on_the_seed_only():
    def adapters(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(99)
        state = torch.get_rng_state()
        adapted = add_lora(tiny_model()[0], LoraSpec(rank=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [p for p in adapted.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(adapters(1), adapters(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(adapters(1), adapters(2), strict=True))

    def scratch(seed: int) -> torch.Tensor:
        spec = ModelSpec(scratch=ScratchSpec(hidden_size=16, num_heads=2))
        model, _ = load_model(spec, seed=seed, tokenizer_texts=TEXTS, device=torch.device("cpu"))
        assert not model.training
        return model.lm_head.weight

    assert torch.equal(scratch(3), scratch(3))
    assert not torch.equal(scratch(3), scratch(4))


@pytest.mark.parametrize("text", [*TEXTS, "naïve 🙂\n\ttabs", ""])
def test_the_scratch_tokenizer_encodes_any_text_and_gives_it_back(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_one_id_each():
    tokenizer = tiny_tokenizer()
    for token in ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_folder_without_tokenizer_or_config_is_user_error(tmp_path):
    tiny_model()[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer: set model") as error:
        load_tokenizer(str(tmp_path))
    assert one_line(error)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UserError, match="is not a causal language model") as error:
        load_causal_model(str(tmp_path))
    assert one_line(error)


def test_the_context_does_not_end_at_a_sliding_window():
    config = MistralConfig(
        vocab_size=319,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        sliding_window=24,
    )
    model = MistralForCausalLM(config)
    assert context_length_of(model) == 128
    config.sliding_window = None
    assert context_length_of(MistralForCausalLM(config)) == 128
