"""Turns as ids against the template rendered as a whole."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rlhf.errors import UserError
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.demonstrations import encode_example
from tests.helpers.models import CONVERSATIONS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|end|>")

# Ends turns as Llama 2 does, with a space before the end, and puts a newline after it.
SPACED = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }} <|end|>\n"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Ends turns without any special token.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def with_template(template: str | None) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def whole(conversation: Any) -> list[int]:
    text = TOKENIZER.apply_chat_template(list(conversation), tokenize=False)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def piecewise(chat_format: ChatFormat, conversation: Any, *, stopped: bool) -> list[int]:
    """The ids of an episode that says this conversation; a cut reply lacks its stop token."""
    first = next(i for i, m in enumerate(conversation) if m["role"] == "assistant")
    ids, reply = chat_format.encode_prompt(conversation[:first]), []
    for message in conversation[first:]:
        if message["role"] == "assistant":
            reply = [*TOKENIZER(message["content"])["input_ids"], END][: None if stopped else -1]
            ids += reply
        else:
            ids += chat_format.encode_text_between_replies(message["content"], reply=reply)
    return ids


CONTENT = st.text(alphabet="ab ?.\nñ🙂", max_size=12)


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), st.booleans(), CONTENT)
@settings(max_examples=60, deadline=None)
def test_the_pieces_are_the_template_rendered_as_a_whole(exchanges, has_system, system):
    conversation = [{"role": "system", "content": system}] if has_system else []
    for observation, reply in exchanges:
        conversation.append({"role": "user", "content": observation})
        conversation.append({"role": "assistant", "content": reply})
    chat_format = ChatFormat(TOKENIZER)
    assert piecewise(chat_format, conversation, stopped=True) == whole(conversation)
    # A cut turn is closed by the environment: the same text, but for the very last token.
    assert piecewise(chat_format, conversation, stopped=False) == whole(conversation)[:-1]


def test_a_stopped_turn_is_closed_once():
    chat_format = ChatFormat(TOKENIZER)
    user = TOKENIZER.convert_tokens_to_ids("<|user|>")
    assert chat_format.stop_ids == {END}
    assert chat_format.encode_text_between_replies("x", reply=[9, END])[0] == user
    assert chat_format.encode_text_between_replies("x", reply=[9])[:2] == [END, user]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [TOKENIZER.chat_template, PLAIN, None])
def test_demonstrations_are_encoded_as_they_would_be_sampled(conversation, template):
    chat_format = ChatFormat(with_template(template))
    first = next(i for i, m in enumerate(conversation) if m["role"] == "assistant")
    ids, is_action = encode_example(chat_format, conversation[:first], conversation[first:])
    assert ids == piecewise(chat_format, conversation, stopped=True)
    assert replies_in(chat_format, ids, is_action) == [
        m["content"] for m in conversation if m["role"] == "assistant"
    ]


def replies_in(chat_format: ChatFormat, ids: list[int], is_action: list[bool]) -> list[str]:
    """Texts of the replies that are learned from; each must end with a token that stops one."""
    runs, current = [], []
    for token, own in zip(ids, is_action, strict=True):
        if own:
            current.append(token)
        if own and token in chat_format.stop_ids:
            runs.append(chat_format.decode_reply(current))
            current = []
    assert not current
    return runs


def test_closing_token_may_be_an_added_token_that_is_not_special():
    tokenizer = with_template(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.add_tokens(["[end]", "   "], special_tokens=False)
    chat_format = ChatFormat(tokenizer)
    end = tokenizer.convert_tokens_to_ids("[end]")
    assert chat_format.closing.token == end
    assert end in chat_format.stop_ids
    ids, mask = encode_example(
        chat_format,
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
    )
    assert [token for token, learned in zip(ids, mask, strict=True) if learned] == [
        *tokenizer.encode("b", add_special_tokens=False),
        end,
    ]


def test_what_the_template_writes_before_the_closing_token_is_learned():
    chat_format = ChatFormat(with_template(SPACED))
    turns = [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    talk = [{"role": role, "content": text} for role, text in turns]
    ids, is_action = encode_example(chat_format, talk[:1], talk[1:])
    text = "<|user|>u1<|assistant|>a1 <|end|>\n<|user|>u2<|assistant|>a2 <|end|>"
    assert TOKENIZER.decode(ids) == text
    assert replies_in(chat_format, ids, is_action) == ["a1 ", "a2 "]


@pytest.mark.parametrize("template", [SPACED, PLAIN])
def test_a_reply_of_an_unusual_template_ends_with_its_end_once(template):
    chat_format = ChatFormat(with_template(template))
    assert chat_format.stop_ids == {END}
    reply = [*TOKENIZER("yes")["input_ids"], END]
    stopped = [*reply, *chat_format.encode_text_between_replies("and now?", reply=reply)]
    assert stopped.count(END) == 1
    cut = chat_format.encode_text_between_replies("and now?", reply=reply[:-1])
    assert TOKENIZER.decode(cut) in (
        " <|end|>\n<|user|>and now?<|assistant|>",
        "\nuser: and now?\nassistant: ",
    )


def test_a_template_that_drops_history_can_be_used_for_one_turn():
    chat_format = ChatFormat(with_template(FORGETFUL))
    with pytest.raises(UserError, match="leaves earlier replies out, so rollouts of several turns"):
        chat_format.encode_text_between_replies("next", reply=[END])
    assert "single turn only" in chat_format.describe()
    hello = [{"role": "user", "content": "hello"}]
    assert TOKENIZER.decode(chat_format.encode_prompt(hello)) == "hello<|assistant|>"


def test_without_a_template_texts_are_joined_and_eos_ends_a_reply():
    chat_format = ChatFormat(with_template(None), separator=" | ")
    turns = [("system", "Be brief."), ("user", "Sky?"), ("assistant", "blue"), ("user", "Grass?")]
    talk = [{"role": role, "content": text} for role, text in turns]
    assert not chat_format.chat
    assert TOKENIZER.decode(chat_format.encode_prompt(talk[:2])) == "Be brief. | Sky? | "
    # The separator stands before every reply: as in a prompt that holds earlier ones.
    shown = TOKENIZER.decode(chat_format.encode_prompt(talk))
    assert shown == "Be brief. | Sky? | blue | Grass? | "
    for reply in ([9, END], [9]):
        ids = chat_format.encode_text_between_replies("Grass?", reply=reply)
        assert TOKENIZER.decode(ids) == " | Grass? | "
    ids, is_action = encode_example(
        chat_format, talk[:2], [*talk[2:], {"role": "assistant", "content": "green"}]
    )
    assert TOKENIZER.decode(ids) == "Be brief. | Sky? | blue<|end|> | Grass? | green<|end|>"
    assert replies_in(chat_format, ids, is_action) == ["blue", "green"]


def test_an_empty_prompt_starts_with_one_token():
    tokenizer = with_template(None)
    empty = [{"role": "user", "content": ""}]
    assert ChatFormat(tokenizer).encode_prompt(empty) == [END]
    tokenizer.bos_token = "<|user|>"
    assert ChatFormat(tokenizer).encode_prompt(empty) == [tokenizer.bos_token_id]


def test_a_stop_text_ends_the_reply_at_every_token_that_holds_it():
    tokenizer = with_template(None)
    tokenizer.add_tokens(["!\n\n"])
    chat_format = ChatFormat(tokenizer, stop="\n")
    (newline,), joined = tokenizer("\n")["input_ids"], tokenizer.convert_tokens_to_ids("!\n\n")
    assert chat_format.stop_ids == {END, newline, joined}
    go = tokenizer("Go")["input_ids"]
    assert chat_format.decode_reply([*go, newline]) == "Go"
    assert (
        chat_format.decode_reply([*go, joined]) == "Go!"
    )  # what came before the stop is the reply's
    assert chat_format.decode_reply([*go, END]) == "Go"
    assert chat_format.decode_reply(go) == "Go"
    assert chat_format.decode_reply([]) == ""


def test_what_cannot_work_is_said():
    with pytest.raises(UserError, match="no single token"):
        ChatFormat(with_template(None), stop="no such token")
    with pytest.raises(UserError, match="no chat template"):
        ChatFormat(with_template(None), chat=True)
    tokenizer = with_template(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        ChatFormat(tokenizer)
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(UserError, match="must start with the assistant"):
        encode_example(ChatFormat(TOKENIZER), hello, hello[:1])


def test_a_chat_model_can_be_used_as_a_base_model():
    chat_format = ChatFormat(TOKENIZER, chat=False)
    sky = [{"role": "user", "content": "Sky?"}]
    assert TOKENIZER.decode(chat_format.encode_prompt(sky)) == "Sky?\n"


@pytest.mark.parametrize(
    ("loop", "problem"),
    [
        ("{% for m in messages %}[{{ loop.index }}] ", "renders a turn differently at another"),
        ("{% for m in messages[-3:] %}", "leaves earlier replies out"),
    ],
)
def test_a_template_whose_third_turn_differs_from_its_second_is_for_one_turn(loop, problem):
    body = "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    opening = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    chat_format = ChatFormat(with_template(loop + body + opening))
    assert f"single turn only (the model's chat template {problem}" in chat_format.describe()
    with pytest.raises(UserError, match=problem):
        chat_format.encode_text_between_replies("o", reply=[])


def test_the_prompt_of_a_base_model_has_no_eos_of_the_tokenizer():
    """CodeLlama and embedding models are saved with tokenizers that append EOS to every text."""
    hello = [{"role": "user", "content": "hi"}]
    tokenizer = tiny_tokenizer()
    plain = ChatFormat(tokenizer, chat=False).encode_prompt(hello)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    assert tokenizer("hi")["input_ids"][-1] == tokenizer.eos_token_id
    assert ChatFormat(tokenizer, chat=False).encode_prompt(hello) == plain
