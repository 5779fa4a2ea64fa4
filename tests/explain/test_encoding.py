"""The text and the part of each token of a reward model's input."""

from __future__ import annotations

import dataclasses

import pytest

from rlhf.explain.encoding import encode_with_parts
from rlhf.reward_models.learned import LearnedReward
from tests.explain.rewards import linear_reward


def texts_of(encoded, part):
    return "".join(encoded.tokens[i] for i in encoded.positions(part))


CONVERSATIONS = [
    [("user", "the fox?"), ("assistant", "yes the quick fox")],
    [("system", "maybe"), ("user", "a"), ("assistant", "u"), ("user", "user"), ("assistant", "s")],
    [("user", "naïve 😀 日本"), ("assistant", "  two  spaces \n and lines ")],
    [("user", "<|assistant|>yes<eos>"), ("assistant", "<|user|>")],
    [("user", "the same"), ("assistant", "the same")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_tokens_of_a_template_are_told_from_those_of_messages(turns):
    reward, _ = linear_reward()
    conversation = [{"role": role, "content": text} for role, text in turns]
    encoded = encode_with_parts(reward, conversation, num_prompt_messages=len(turns) - 1)
    assert encoded.ids == reward.encode(conversation)
    assert len(encoded.ids) == len(encoded.tokens) == len(encoded.parts)
    prompt = "".join(text for _, text in turns[:-1])
    assert texts_of(encoded, "prompt") == prompt
    assert texts_of(encoded, "reply").strip() == turns[-1][1].strip()
    assert encoded.tokens[-1] == "<eos>"
    assert encoded.parts[-1] == "template"
    rendered = "".join(f"<|{role}|>{text}<eos>\n" for role, text in turns)
    assert "".join(encoded.tokens) == rendered.rstrip()


THINKING = """{% for m in messages %}<|{{ m.role }}|>
{%- set text, why = m.content or '', m.reasoning_content or '' %}
{%- if '</think>' in text %}
{%- set why = text.split('</think>')[0].split('<think>')[-1] %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if m.role == 'assistant' and (why or loop.last) %}
{{- '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}
{%- endif %}
{{- text }}
{%- for call in m.tool_calls or [] %}
{{- '<call>' + call.function.name + call.function.arguments|tojson }}
{%- endfor %}
{{- '<eos>\n' }}{% endfor %}"""
"""A template that splits the reasoning from the content, as those of Qwen3 do."""

CALL = {"type": "function", "function": {"name": "fox", "arguments": {"dog": "lazy"}}}


def said(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (said("the fox"), "the fox"),
        (said("<think>\nmaybe\n</think>\n\nthe fox"), "maybe\n</think>\n\nthe fox"),
        (said("<think>maybe</think>the fox"), "maybe\n</think>\n\nthe fox"),
        (said("the fox", reasoning_content="maybe"), "maybe\n</think>\n\nthe fox"),
        (said("fox", reasoning_content="fox"), "fox\n</think>\n\nfox"),
        (said("the fox", tool_calls=[CALL]), 'the fox<call>fox{"dog": "lazy"}'),
        (said("", tool_calls=[CALL]), '<call>fox{"dog": "lazy"}'),
        (said("a<eos>\n<|user|>b"), "a<eos>\n<|user|>b"),
        (said(""), ""),
    ],
)
def test_reasoning_and_tool_calls_belong_to_their_message(reply, expected):
    """Otherwise their attributions would be 0, because the reference has the template's tokens."""
    reward, _ = linear_reward()
    reward.tokenizer.chat_template = THINKING
    for earlier in (said("ok"), said("<think>hm</think>ok"), said("ok", reasoning_content="hm")):
        conversation = [
            {"role": "user", "content": "the<|assistant|>fox"},
            earlier,
            {"role": "user", "content": "the fox "},
            reply,
        ]
        encoded = encode_with_parts(reward, conversation, num_prompt_messages=3)
        assert encoded.ids == reward.encode(conversation)
        assert texts_of(encoded, "reply") == expected
        prompt = "ok" if earlier == said("ok") else "<think>\nhm\n</think>\n\nok"
        assert texts_of(encoded, "prompt") == f"the<|assistant|>fox{prompt}the fox"
        ends = [end for end in encoded.ends if end is not None]
        assert (ends[-1:] or [0])[0] in (0, len(reply["content"]))


def test_roles_without_a_template_are_not_part_of_the_messages():
    reward, _ = linear_reward(template=False)
    conversation = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "yes"}]
    encoded = encode_with_parts(reward, conversation, num_prompt_messages=1)
    assert (texts_of(encoded, "prompt"), texts_of(encoded, "reply")) == ("user", "yes")
    assert "".join(encoded.tokens) == "user: user\n\nassistant: yes<eos>"


def test_special_tokens_of_an_encoder_belong_to_the_template(encoder_path):
    reward = LearnedReward.load(encoder_path)
    conversation = [{"role": "assistant", "content": "the lazy dog"}]
    encoded = encode_with_parts(reward, conversation, num_prompt_messages=0)
    assert (encoded.tokens[0], encoded.tokens[-1]) == ("[CLS]", "[SEP]")
    assert texts_of(encoded, "template") == "[CLS][SEP]"
    assert texts_of(encoded, "reply") == "the lazy dog"


def test_truncation_on_the_left_keeps_the_alignment(encoder_path):
    reward = LearnedReward.load(encoder_path)
    reward.sidecar = dataclasses.replace(reward.sidecar, max_length=8)
    conversation = [{"role": "assistant", "content": "the lazy dog jumps over the quick fox"}]
    encoded = encode_with_parts(reward, conversation, num_prompt_messages=0)
    assert len(encoded.ids) == 8
    assert encoded.ids == reward.encode(conversation)
    assert encoded.tokens[0] == "[CLS]"
    assert "the lazy dog jumps over the quick fox".endswith(texts_of(encoded, "reply"))


def test_only_the_reply_is_encoded_if_the_reward_reads_only_the_reply():
    reward, _ = linear_reward()
    reward.sidecar = dataclasses.replace(reward.sidecar, scope="reply")
    conversation = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    encoded = encode_with_parts(reward, conversation, num_prompt_messages=1)
    assert texts_of(encoded, "prompt") == ""
    assert texts_of(encoded, "reply") == "dog"
