"""Completions through the official client: text, tokens, log-probabilities, streams."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any

import httpx
import openai
import pytest
import torch

from rlhf.config.rollout import RolloutSpec
from rlhf.models.policy import Policy
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.completions import sample_completions
from tests.helpers.models import recomputed_logprobs, tiny_gpt2, tiny_model
from tests.serving.conftest import Running, running

PROMPT = "Which colour is the sky?"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which colour is the sky? 🙂"},
]


def complete(server: Running, **settings: Any) -> Any:
    settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 1, **settings}
    return server.openai().completions.create(**settings)


def chat(server: Running, **settings: Any) -> Any:
    settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 1, **settings}
    return server.openai().chat.completions.create(**settings)


def tokenizer_of(server: Running) -> Any:
    return server.server.completions.model.tokenizer


def test_a_completion_has_the_text_of_its_tokens(tiny):
    response = complete(tiny, extra_body={"return_token_ids": True})
    (choice,) = response.choices
    tokenizer = tokenizer_of(tiny)
    assert choice.prompt_token_ids == tokenizer(PROMPT)["input_ids"]
    assert choice.text == tokenizer.decode(choice.token_ids, skip_special_tokens=True)
    assert choice.finish_reason in ("stop", "length")
    assert response.usage.completion_tokens == len(choice.token_ids) <= 12
    assert response.usage.prompt_tokens == len(choice.prompt_token_ids)
    assert (response.object, response.model) == ("text_completion", "tiny")
    assert choice.logprobs is None


def test_prompts_can_be_texts_or_token_ids(tiny):
    ids = tokenizer_of(tiny)(PROMPT)["input_ids"]
    texts = [
        [choice.text for choice in complete(tiny, prompt=prompt, temperature=0).choices]
        for prompt in (PROMPT, ids, [PROMPT, "Say 7"], [ids, ids])
    ]
    assert texts[0] == texts[1] == texts[2][:1] == texts[3][:1]
    assert list(map(len, texts)) == [1, 1, 2, 2]


def test_a_seed_repeats_a_completion_and_samples_differ(tiny):
    once, again, other = (complete(tiny, n=3, seed=seed) for seed in (5, 5, 6))
    texts = [[choice.text for choice in r.choices] for r in (once, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert [choice.index for choice in once.choices] == [0, 1, 2]
    assert once.usage.prompt_tokens == complete(tiny, n=1).usage.prompt_tokens
    random = {complete(tiny, seed=None).choices[0].text for _ in range(3)}
    assert len(random) == 3


@pytest.mark.parametrize("call", [complete, chat])
@pytest.mark.parametrize("settings", [{}, {"stop": ["e", "ab"]}, {"n": 2, "temperature": 0.3}])
def test_a_stream_has_the_text_of_the_whole_response(tiny, call, settings):
    whole = call(tiny, max_tokens=40, **settings)
    streamed = call(
        tiny, max_tokens=40, stream=True, stream_options={"include_usage": True}, **settings
    )
    texts, reasons, usage, parts = {}, {}, None, 0
    for chunk in streamed:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts += 1
            text = choice.text if call is complete else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + text
            reasons[choice.index] = choice.finish_reason
    expected = [c.text if call is complete else c.message.content for c in whole.choices]
    assert [text for _, text in sorted(texts.items())] == expected
    assert [reason for _, reason in sorted(reasons.items())] == [
        choice.finish_reason for choice in whole.choices
    ]
    assert usage == whole.usage
    assert parts > len(texts)


def test_a_stop_string_ends_the_text_before_it(tiny):
    text = complete(tiny, max_tokens=60).choices[0].text
    stop = text[10:13]
    (choice,) = complete(tiny, max_tokens=60, stop=stop).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_chat_reply_equals_rlhf_generate_with_its_log_probabilities(tiny):
    model, tokenizer = tiny.server.completions.model.model, tokenizer_of(tiny)
    spec = RolloutSpec(max_new_tokens=30)
    (rollout,) = sample_completions(
        model, tokenizer, [MESSAGES], spec, samples=1, seed=0, temperature=0.0
    )
    response = chat(
        tiny,
        max_tokens=30,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True},
    )
    (choice,) = response.choices
    prompt = ChatFormat(tokenizer).encode_prompt(MESSAGES)
    assert choice.prompt_token_ids == prompt == rollout.tokens[: len(prompt)]
    assert choice.token_ids == rollout.tokens[len(prompt) :]
    assert choice.message.content == rollout.conversation[-1]["content"]
    logprobs = [row.logprob for row in choice.logprobs.content]
    assert logprobs == pytest.approx(rollout.logprobs[len(prompt) :], abs=1e-5)
    for row in choice.logprobs.content:
        assert [top.logprob for top in row.top_logprobs] == sorted(
            (top.logprob for top in row.top_logprobs), reverse=True
        )
        assert row.top_logprobs[0].logprob == pytest.approx(row.logprob, abs=1e-5)
        if not row.token.startswith("bytes:"):
            assert bytes(row.bytes).decode() == row.token


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_scoring_path(tiny, temperature):
    model, tokenizer = tiny.server.completions.model.model, tokenizer_of(tiny)
    response = complete(
        tiny,
        n=3,
        max_tokens=30,
        temperature=temperature,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    policy = Policy(model, tokenizer)
    for choice in response.choices:
        tokens = torch.tensor([choice.prompt_token_ids + choice.token_ids])
        actions = torch.arange(tokens.shape[1])[None] >= len(choice.prompt_token_ids)
        with torch.no_grad():
            scored = policy.score(
                tokens, torch.ones_like(actions), actions, temperature=temperature
            ).logprobs[actions]
        assert choice.logprobs.token_logprobs == pytest.approx(scored.tolist(), abs=1e-5)
        assert all(len(likely) == 2 for likely in choice.logprobs.top_logprobs)


@pytest.mark.parametrize("make_model", [tiny_model, tiny_gpt2])
def test_an_echoed_prompt_has_the_log_probabilities_of_a_forward_pass(make_model):
    model, tokenizer = make_model()
    texts = [PROMPT, "The number is too high.", "a"]
    with running(model, tokenizer) as server:
        response = complete(server, prompt=texts, echo=True, logprobs=2, max_tokens=3)
        nothing = complete(server, prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    for text, choice in zip(texts, response.choices, strict=True):
        ids, found = tokenizer(text)["input_ids"], choice.logprobs
        count = len(ids)
        expected = recomputed_logprobs(model, ids)[1:].tolist()
        assert choice.text.startswith(text)
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1:count] == pytest.approx(expected, abs=1e-5)
        assert len(found.tokens) == len(found.text_offset) == len(found.token_logprobs)
        assert len(found.top_logprobs) == len(found.tokens)  # also after a prompt of one token
        assert "".join(found.tokens[:count]) == text
        for token, offset in zip(found.tokens[:count], found.text_offset, strict=False):
            assert choice.text[offset : offset + len(token)] == token
        # A client compares the log-probability of a token with the largest one exactly.
        for logprob, likely in zip(
            found.token_logprobs[1:count], found.top_logprobs[1:count], strict=True
        ):
            assert logprob <= max(likely.values())
    assert nothing.choices[0].text == PROMPT
    assert nothing.choices[0].finish_reason == "length"
    assert nothing.usage.completion_tokens == 0
    assert nothing.choices[0].logprobs.top_logprobs is None


def test_an_echo_without_new_tokens_may_fill_the_context(tiny):
    """With ``max_tokens`` 0, the prompt needs no room for a completion."""
    full = [5] * tiny.server.completions.model.max_tokens
    choice = complete(tiny, prompt=full, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert len(choice.logprobs.token_logprobs) == len(full)
    for prompt, max_tokens in ((full, 1), ([*full, 5], 0)):
        with pytest.raises(openai.BadRequestError, match="limited to"):
            complete(tiny, prompt=prompt, echo=True, max_tokens=max_tokens)


def test_a_greedy_token_has_exactly_the_largest_log_probability(tiny):
    greedy = complete(tiny, temperature=0, extra_body={"return_token_ids": True}).choices[0]
    ids = greedy.prompt_token_ids + greedy.token_ids
    choice = complete(tiny, prompt=ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    count = len(greedy.token_ids)
    rows = zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    assert all(lp == max(top.values()) for lp, top in list(rows)[-1 - count : -1])


def test_an_echo_can_be_streamed(tiny):
    chunks = list(complete(tiny, echo=True, logprobs=1, stream=True, n=2, max_tokens=5))
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        text = "".join(choice.text for choice in own)
        whole = complete(tiny, echo=True, logprobs=1, n=2, max_tokens=5).choices[index]
        assert own[0].text == PROMPT
        assert text == whole.text
        tokens = [token for choice in own for token in choice.logprobs.tokens]
        assert tokens == whole.logprobs.tokens


def test_offsets_of_an_echoed_prompt_count_special_tokens_in_its_text(tiny: Running):
    body = {"model": "tiny", "prompt": "a<|end|>bc", "echo": True, "logprobs": 0, "max_tokens": 1}
    _, reply = tiny.post("/v1/completions", body)
    choice = reply["choices"][0]
    assert choice["text"].startswith("a<|end|>bc")
    assert choice["logprobs"]["tokens"][:4] == ["a", "<|end|>", "b", "c"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 8, 9, 10]


def test_line_ends_of_unicode_do_not_split_the_events_of_a_stream(tiny: Running):
    prompt = "a\u2028b\u2029c\x85d"
    body = {"model": "tiny", "prompt": prompt, "echo": True, "max_tokens": 1, "stream": True}
    with httpx.stream("POST", tiny.listener.url("/v1/completions"), json=body) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == prompt


def test_end_tokens(tiny):
    tokenizer = tokenizer_of(tiny)
    free = {"ignore_eos": True, "return_token_ids": True}
    (choice,) = complete(tiny, max_tokens=200, extra_body=free).choices
    assert len(choice.token_ids) == 200
    ends = {"stop_token_ids": [choice.token_ids[4]], **free}
    (ended,) = complete(tiny, max_tokens=200, extra_body=ends).choices
    assert ended.token_ids == choice.token_ids[: choice.token_ids.index(choice.token_ids[4]) + 1]
    assert ended.finish_reason == "stop"
    if tokenizer.eos_token_id in choice.token_ids:
        (plain,) = complete(tiny, max_tokens=200, extra_body={"return_token_ids": True}).choices
        assert plain.token_ids[-1] == tokenizer.eos_token_id


def test_requests_that_run_together_have_the_completions_of_each_alone(tiny):
    settings: list[dict[str, Any]] = [
        {
            "prompt": PROMPT[: 5 + i],
            "seed": i,
            "temperature": (0, 0.7, 1.0)[i % 3],
            "top_p": 1.0 - 0.2 * (i % 2),
            "max_tokens": 5 + 3 * i,
            "stop": ["q"] if i % 4 == 0 else None,
        }
        for i in range(16)
    ]
    alone = [complete(tiny, **s).choices[0].text for s in settings]

    def text_of_stream(s: dict[str, Any]) -> str:
        return "".join(chunk.choices[0].text for chunk in complete(tiny, stream=True, **s))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        whole = list(pool.map(lambda s: complete(tiny, **s).choices[0].text, settings))
        streamed = list(pool.map(text_of_stream, settings))
    assert alone == whole == streamed


def test_a_base_model_without_a_chat_template_is_served():
    model, tokenizer = tiny_model()
    tokenizer.chat_template = None
    spec = RolloutSpec(max_new_tokens=8)
    messages = [{"role": "user", "content": PROMPT}]
    (rollout,) = sample_completions(
        model, tokenizer, [messages], spec, samples=1, seed=0, temperature=0.0
    )
    with running(model, tokenizer) as server:
        reply = chat(server, messages=messages, temperature=0, max_tokens=8)
    assert reply.choices[0].message.content == rollout.conversation[-1]["content"]


def test_models_are_listed(tiny):
    client = tiny.openai()
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "rlhf", 512)
    assert client.models.retrieve("tiny").id == "tiny"


def test_metrics_count_requests_and_tokens(tiny):
    import urllib.request

    def values() -> dict[str, float]:
        with urllib.request.urlopen(tiny.listener.url("/metrics")) as response:
            lines = response.read().decode().splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    before = values()
    response = complete(tiny, n=2, max_tokens=7)
    for path in ("/nowhere", "/v1/models/tiny", "/v1/models/owner/unknown"):
        tiny.request(path)
    after = values()
    changes = {name: value - before.get(name, 0) for name, value in after.items()}
    ok = 'rlhf_requests_total{route="/v1/completions",status="200"}'
    assert changes[ok] == 1
    assert changes['rlhf_requests_total{route="other",status="404"}'] == 1
    for status in (200, 404):  # under the template, so that clients cannot create counters
        assert changes[f'rlhf_requests_total{{route="/v1/models/{{name}}",status="{status}"}}'] == 1
    assert changes["rlhf_completion_tokens_total"] == response.usage.completion_tokens
    assert changes["rlhf_prompt_tokens_total"] == response.usage.prompt_tokens
    assert after["rlhf_completions_unfinished"] == 0
