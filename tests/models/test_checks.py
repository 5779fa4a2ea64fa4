"""What is refused when a model is loaded: random heads, foreign tokenizers, looking ahead."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    LlamaForSequenceClassification,
    Qwen2ForSequenceClassification,
)

from rlhf.config.model import ModelSpec
from rlhf.errors import UserError
from rlhf.models.checks import (
    check_padding_and_causality,
    check_scores_ignore_padding_but_not_last_token,
)
from rlhf.models.loading import load_causal_model, load_model
from rlhf.reward_models.implicit import ImplicitReward
from tests.helpers.models import tiny_model, tiny_qwen2, tiny_tokenizer
from tests.models.families import config_of, model_of


def one_line(error: Any) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def test_classifier_folder_is_refused_as_policy(tmp_path):
    model, _ = tiny_qwen2()  # with an output head of its own
    LlamaForSequenceClassification(tiny_model()[0].config).save_pretrained(tmp_path / "tied")
    Qwen2ForSequenceClassification(model.config).save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match=r"score\.weight are not part of the model") as error:
        load_causal_model(str(tmp_path / "tied"))
    one_line(error)
    with pytest.raises(UserError, match=r"lm_head\.weight are missing") as error:
        load_causal_model(str(tmp_path / "untied"))
    assert "Qwen2ForSequenceClassification" in one_line(error)


def test_decoder_without_head_is_refused_as_policy(tmp_path):
    tiny_qwen2()[0].model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lm_head\.weight are missing") as error:
        load_causal_model(str(tmp_path))
    one_line(error)


def test_decoder_with_tied_head_is_a_policy(tmp_path):
    model, _ = tiny_model()  # tied
    model.model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        load_causal_model(str(tmp_path))(input_ids=ids).logits, model(input_ids=ids).logits
    )


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_weight_is_named(tmp_path, missing):
    tiny_model()[0].save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=missing) as error:
        load_causal_model(str(tmp_path))
    one_line(error)


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path):
    tiny_model()[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(UserError, match="cannot be loaded as a causal model") as error:
        load_causal_model(str(tmp_path))
    one_line(error)


def test_encoder_decoder_is_refused_as_policy(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 320}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    BartForConditionalGeneration(BartConfig(**sizes, **heads, **ffn)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder model") as error:
        load_causal_model(str(tmp_path))
    one_line(error)


def test_an_implicit_reward_refuses_a_model_without_its_head(tmp_path):
    model, tokenizer = tiny_qwen2()
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "trunk")
    for name in ("whole", "trunk"):
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing weights: lm_head\.weight"):
        ImplicitReward.load(tmp_path / "trunk", tmp_path / "whole")


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path):
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path)
    rows = model.config.vocab_size
    with pytest.raises(UserError, match=f"2 tokens .*'<one>' with id {rows}; .* {rows} ") as error:
        load_model(ModelSpec(path=str(tmp_path)), seed=0)
    one_line(error)


@pytest.mark.parametrize("causal", [True, False])
def test_noncausal_model_is_refused(causal):
    config = BertConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        is_decoder=causal,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertLMHeadModel(config).eval()
    if causal:
        check_padding_and_causality(model, tiny_tokenizer())
        return
    with pytest.raises(UserError, match="tokens change the logits of earlier tokens") as error:
        check_padding_and_causality(model, tiny_tokenizer())
    one_line(error)


def test_a_score_of_the_first_token_is_refused():
    """A causal BERT's classifier reads [CLS], which sees nothing but itself."""
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(config_of("bert")).eval()
    with pytest.raises(UserError, match="does not depend on the last token") as error:
        check_scores_ignore_padding_but_not_last_token(model)
    one_line(error)


@pytest.mark.parametrize("name", ["bert", "inkling_text", "opt-projected", "granite", "xlstm"])
def test_logits_of_selected_states_equal_model(name):
    from rlhf.models.architecture import trunk_of
    from rlhf.models.output_head import logits_of

    model = model_of(name)
    ids = torch.arange(40, 60)[None]
    states = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    whole = model(input_ids=ids, use_cache=False).logits
    rows = states[0, [3, 11, 19]].detach().requires_grad_()
    found = logits_of(model, rows)
    torch.testing.assert_close(found, whole[0, [3, 11, 19]], rtol=1e-4, atol=1e-5)
    found.sum().backward()  # the gradient reaches the states
    assert rows.grad is not None
    assert rows.grad.abs().max() > 0
