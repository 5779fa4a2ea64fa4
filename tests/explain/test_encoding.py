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
