"""Demonstrations that templates treat in special ways: weights, tools, reasoning, system texts."""

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import set_chat_options, with_tools
from rlhf.rollout.chat_format import LEFT_CONTEXT, ChatFormat, generation_stop_ids
from rlhf.rollout.demonstrations import NOT_AS_SAMPLED, encode_example, encode_pieces
from tests.helpers.chat_templates import CHATML, STRICT, chatml
from tests.helpers.models import tiny_tokenizer
from tests.rollout.golden import TOOL as tool_spec
from tests.rollout.golden import assistant, user


def learned(tokenizer: Any, ids: list[int], is_action: list[bool]) -> str:
    """The text with what is learned in brackets."""
    text, current, before = "", [], False
    for token, own in [*zip(ids, is_action, strict=True), (None, False)]:
        if own != before or token is None:
            text += f"[{tokenizer.decode(current)}]" if before else tokenizer.decode(current)
            current, before = [], own
        if token is not None:
            current.append(token)
    return text


def test_the_newline_after_the_closing_token_is_context_and_never_learned():
    tokenizer = chatml()
    chat_format = ChatFormat(tokenizer)
    talk = [assistant("a1"), user("u2"), assistant("a2")]
    found = learned(tokenizer, *encode_example(chat_format, [user("u1")], talk))
    head = "<|im_start|>assistant\n"
    assert found == (
        f"<|im_start|>user\nu1<|im_end|>\n{head}[a1<|im_end|>]\n"
        f"<|im_start|>user\nu2<|im_end|>\n{head}[a2<|im_end|>]"
    )


def test_replies_of_weight_zero_are_context():
    tokenizer = chatml()
    chat_format = ChatFormat(tokenizer)
    talk = [assistant("a1", weight=0), user("u2"), assistant("a2", weight=1)]
    found = learned(tokenizer, *encode_example(chat_format, [user("u1")], talk))
    assert found.count("[") == 1
    assert "assistant\na1<|im_end|>\n" in found
    assert found.endswith("[a2<|im_end|>]")
    talk[2]["weight"] = 0
    with pytest.raises(RowDropped, match="every weight is 0"):
        encode_example(chat_format, [user("u1")], talk)
    base = ChatFormat(tokenizer, chat=False)
    with pytest.raises(RowDropped, match="no reply to learn from"):
        encode_example(base, [user("u1")], talk)
    ids, is_action = encode_example(base, [user("u1")], [*talk[:2], assistant("a2")])
    assert learned(tokenizer, ids, is_action) == "u1\na1<|end|>\nu2\n[a2<|end|>]"


@pytest.mark.parametrize("order", [["tool"], ["tool", "tool"]])
def test_tool_turns_are_the_templates_own(order):
    tokenizer = chatml()
    results = [{"role": role, "content": f"r{i}"} for i, role in enumerate(order)]
    talk = [assistant("call()"), *results, assistant("done")]
    ids, _ = encode_example(ChatFormat(tokenizer), [user("u")], talk)
    whole = tokenizer.apply_chat_template([user("u"), *talk], tokenize=False)
    assert tokenizer.decode(ids) == whole.removesuffix("\n")


def test_a_header_that_prompts_after_tool_results_omit_is_not_learned():
    tokenizer = chatml(
        "{% for m in messages %}{% if m.role == 'tool' %}={{ m.content }}\n{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n"
        "{% endif %}"
    )
    talk = [assistant("call()"), {"role": "tool", "content": "r"}, assistant("done")]
    found = learned(tokenizer, *encode_example(ChatFormat(tokenizer), [user("u")], talk))
    assert found == (
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n[call()<|im_end|>]\n"
        "=r\n<|im_start|>assistant\n[done<|im_end|>]"
    )


def test_what_a_template_cannot_say_is_dropped_or_counted():
    tokenizer = chatml()
    chat_format = ChatFormat(tokenizer)
    call = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    with pytest.raises(RowDropped, match="leaves tool calls out"):
        encode_example(chat_format, [user("u")], [assistant("", tool_calls=[call])])
    notes: Counter[str] = Counter()
    reply = assistant("4", reasoning_content="2+2")
    encode_example(chat_format, with_tools([user("u")], [tool_spec]), [reply], notes=notes)
    assert notes == {
        "replies without their reasoning: the template leaves it out": 1,
        "conversations without their tools: the template leaves them out": 1,
    }


def test_messages_carry_facts_that_no_template_sees():
    shows = chatml("{% for m in messages %}{{ m.keys() | list | sort | join(' ') }}|{% endfor %}")
    with pytest.raises(UserError, match="leaves the reply out"):
        ChatFormat(shows)
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.answer }}")
    text = ChatFormat(tokenizer).encode_prompt([{**user("u"), "answer": "42", "weight": 1}])
    assert "42" not in tokenizer.decode(text)


def test_a_system_text_is_refused_or_folded_into_the_first_user_turn(tmp_path):
    tokenizer = chatml(STRICT)
    prompt = [{"role": "system", "content": "Be kind."}, user("Hi")]
    chat_format = ChatFormat(tokenizer)
    refused = r"System role not supported; remove .*fold_system: true"
    with pytest.raises(UserError, match=refused):
        chat_format.encode_prompt(prompt)
    with pytest.raises(UserError, match=refused):
        encode_example(chat_format, prompt, [assistant("Hello")])
    assert "no system role" in chat_format.describe()
    set_chat_options(tokenizer, fold_system=True)
    tokenizer.save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for found in (tokenizer, reloaded):
        notes: Counter[str] = Counter()
        ids, own = encode_example(ChatFormat(found), prompt, [assistant("Hello")], notes=notes)
        text = learned(found, ids, own)
        assert text == "<|user|>Be kind.\n\nHi<|assistant|>[Hello<|end|>]"
        assert notes == {"system messages added to the first user turn": 1}
        assert ChatFormat(found).encode_prompt(prompt) == ids[: own.index(True)]
    with pytest.raises(ValueError, match="has a system role"):
        set_chat_options(chatml(), fold_system=True)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize(
    "reply", [assistant("<think>\n1+1\n</think>\n\n2"), assistant("2", reasoning_content="1+1")]
)
def test_a_reasoning_block_is_opened_once_and_closed(opening, reply):
    tokenizer = chatml(THINKS.replace("OPENING", opening))
    chat_format = ChatFormat(tokenizer)
    notes: Counter[str] = Counter()
    ids, own = encode_example(chat_format, [user("1+1?")], [reply], notes=notes)
    last = learned(tokenizer, ids, own).rpartition("assistant\n")[2]
    if "</think>" in opening:  # the template has it nowhere: nor have we, and say so
        assert last == "[2<|im_end|>]"
        assert sum(notes.values()) == 2
    else:
        assert last.replace("[", "") == "<think>\n1+1\n</think>\n\n2<|im_end|>]"
        assert ids[: own.index(True)] == chat_format.encode_prompt([user("1+1?")])
    plain, own = encode_example(chat_format, [user("1+1?")], [assistant("2")], notes=notes)
    assert learned(tokenizer, plain, own).endswith("assistant\n[2<|im_end|>]")
    assert notes["replies without the reasoning block of the generation prompt"] >= 1


def test_only_the_last_of_several_replies_is_learned_where_history_is_rewritten():
    tokenizer = chatml(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
        "loop.last and not add_generation_prompt %}<think></think>{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    notes: Counter[str] = Counter()
    talk = [assistant("a1"), user("u2"), assistant("a2")]
    ids, own = encode_example(ChatFormat(tokenizer), [user("u1")], talk, notes=notes)
    found = learned(tokenizer, ids, own)
    assert found.count("[") == 1
    assert found.endswith("[<think></think>a2<|im_end|>]")
    whole = tokenizer.apply_chat_template([user("u1"), *talk], tokenize=False)
    assert tokenizer.decode(ids) == whole.removesuffix("\n")
    assert notes == {NOT_AS_SAMPLED: 1}


def sentencepiece(scheme: str) -> Any:
    """A tokenizer that puts a mark before words, as SentencePiece does, with bytes to fall back."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz?.", "\u2581blue", "\u2581green", "blue"]
    merges = [("b", "l"), ("u", "e"), ("bl", "ue"), ("\u2581", "blue")]
    pieces += ["bl", "ue"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_no_mark_of_a_first_word_stands_in_the_middle(scheme):
    tokenizer = sentencepiece(scheme)
    chat_format = ChatFormat(tokenizer)
    talk = [assistant("blue"), user("grass?"), assistant("green")]
    ids, _ = encode_example(chat_format, [user("sky?")], talk)
    assert tokenizer.decode(ids) == "sky?\nblue</s>\ngrass?\ngreen</s>"
    follow = chat_format.encode_text_between_replies("grass?", reply=[5])
    assert tokenizer.convert_ids_to_tokens(follow)[0] == "<0x0A>"


def test_stop_tokens_come_from_the_generation_configuration():
    model = type("Model", (), {})()
    tokenizer = chatml()
    other = tokenizer.convert_tokens_to_ids("<|system|>")
    assert generation_stop_ids(model) == []
    for eos, expected in ((other, [other]), ([other, 5], [other, 5]), (None, [])):
        model.generation_config = type("Config", (), {"eos_token_id": eos})()
        assert generation_stop_ids(model) == expected
    # Transformers copies the stop tokens of config.json; one id can be the default of the class.
    copied = {"_from_model_config": True}
    for eos, expected in ((other, []), ([other, 5], [other, 5])):
        model.generation_config = type("Config", (), {"eos_token_id": eos, **copied})()
        assert generation_stop_ids(model) == expected
    # A number that is no special token of the tokenizer is another vocabulary's.
    letter = tokenizer("a")["input_ids"][0]
    chat_format = ChatFormat(tokenizer, stop_ids=[other, letter])
    names = tokenizer.convert_ids_to_tokens(sorted(chat_format.stop_ids))
    assert set(names) == {"<|im_end|>", "<|end|>", "<|system|>"}


def test_a_reply_that_ended_with_another_stop_token_is_closed_by_the_template():
    tokenizer = chatml()
    chat_format = ChatFormat(copy.deepcopy(tokenizer))
    end, eos = chat_format.closing.token, tokenizer.eos_token_id
    closed = tokenizer.decode(chat_format.encode_text_between_replies("u", reply=[9, end]))
    foreign = tokenizer.decode(chat_format.encode_text_between_replies("u", reply=[9, eos]))
    assert foreign == "<|im_end|>" + closed
    assert closed == "\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"


def test_the_configuration_shows_a_closing_token_that_is_not_special():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat_format = ChatFormat(tokenizer, stop_ids=[end])
    assert chat_format.closing.token == end
    ids, _ = encode_example(chat_format, [user("u")], [assistant("a")])
    assert tokenizer.decode(ids).endswith("a<|im_end|>")


def test_reasoning_of_earlier_replies_is_neither_shown_nor_learned_without():
    tokenizer = chatml(THINKS.replace("OPENING", "<think>\n"))
    notes: Counter[str] = Counter()
    thought = [assistant(a, reasoning_content=r) for r, a in (("r1", "a1"), ("r2", "a2"))]
    talk = [thought[0], user("u2"), thought[1]]
    ids, own = encode_example(ChatFormat(tokenizer), [user("u1")], talk, notes=notes)
    found = learned(tokenizer, ids, own)
    assert found.endswith("<|im_start|>assistant\n<think>\n[r2\n</think>\n\na2<|im_end|>]")
    assert "assistant\na1<|im_end|>" in found
    assert notes == {NOT_AS_SAMPLED: 1}


TURN = "<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments.city }}"
LISTED = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
"""Without it a template renders no tools."""


def chat_of(body: str) -> ChatFormat:
    loop = "{% for m in messages %}" + body + "<|im_end|>\n{% endfor %}"
    return ChatFormat(
        chatml(loop + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    )


@pytest.mark.parametrize(
    ("body", "calls", "omitted"),
    [
        (TURN, 1, "tool calls"),
        (LISTED + TURN, 1, "tool calls"),  # the name of the function appears among the tools
        (TURN + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", 1, "calls"),
        (TURN + CALLS + "{% break %}{% endfor %}", 1, None),
        (TURN + CALLS + "{% break %}{% endfor %}", 2, "tool calls"),  # as gpt-oss does
        (TURN + CALLS + "{% endfor %}", 2, None),
        ("{% if m.role != 'tool' %}" + TURN + CALLS + "{% endfor %}{% endif %}", 1, "results"),
    ],
)
def test_a_row_is_dropped_if_the_template_omits_a_call_or_a_result(body, calls, omitted):
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    talk = [assistant("", tool_calls=[call] * calls), {"role": "tool", "content": "rain"}]
    chat_format = chat_of(body)
    prompt = with_tools([user("u")], [tool_spec])
    if omitted:
        with pytest.raises(RowDropped, match=omitted):
            encode_example(chat_format, prompt, [*talk, assistant("done")])
        return
    ids, is_action = encode_example(chat_format, prompt, [*talk, assistant("done")])
    head = "<|im_start|>assistant\n"
    assert learned(chat_format.tokenizer, ids, is_action) == (
        f"<|im_start|>user\nu<|im_end|>\n{head}[{'weather Oslo' * calls}<|im_end|>]\n"
        f"<|im_start|>tool\nrain<|im_end|>\n{head}[done<|im_end|>]"
    )


def test_the_text_before_a_call_is_rendered_or_counted():
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    talk = [assistant("I look.", tool_calls=[call])]
    counted = {"tool calls without the text before them: the template leaves it out": 1}
    calls_only = "<|im_start|>{{ m.role }}\n{{ '' if m.tool_calls else m.content }}"
    for turn, expected in ((TURN, {}), (calls_only, counted)):
        notes: Counter[str] = Counter()
        encode_example(chat_of(turn + CALLS + "{% endfor %}"), [user("u")], talk, notes=notes)
        assert notes == expected


def test_a_base_model_drops_tool_calls_and_counts_tools_and_reasoning():
    chat_format = ChatFormat(chatml(), chat=False)
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    with pytest.raises(RowDropped, match="tool calls cannot be rendered without a chat template"):
        encode_example(chat_format, [user("u")], [assistant("", tool_calls=[call])])
    notes: Counter[str] = Counter()
    reply = assistant("4", reasoning_content="2+2")
    encode_example(chat_format, with_tools([user("u")], [tool_spec]), [reply], notes=notes)
    assert notes == {
        "conversations without their tools (there is no chat template)": 1,
        "conversations without their reasoning (there is no chat template)": 1,
    }


@pytest.mark.parametrize("reply", ["End", "d", "yes", "yes  \n"])
def test_a_reply_ends_where_its_text_ends_if_the_template_writes_a_plain_ending(reply):
    tokenizer = chatml(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n### End\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.eos_token = "<|im_end|>"
    talk = [assistant(reply), user("u2"), assistant(reply)]
    text = learned(tokenizer, *encode_example(ChatFormat(tokenizer), [user("u1")], talk))
    assert text == (
        f"user: u1\n### End\nassistant: [{reply}<|im_end|>]\n### End\n"
        f"user: u2\n### End\nassistant: [{reply}<|im_end|>]"
    )


def encode_in_turn(chat_format: ChatFormat, pieces: list[Any]) -> list[int]:
    """The definition of the ids: each piece is encoded on its own after the previous piece."""
    ids: list[int] = []
    left = ""
    for text, _, closing in pieces:
        ids += chat_format.encode_after(left, text) if ids else chat_format.encode(text)
        ids += [chat_format.closing.token] * closing
        left = "" if closing else text
    return ids


def tokenizers_of_every_kind() -> Iterator[Any]:
    yield chatml()
    lenient = chatml()  # an added token that takes the space before it
    lenient.add_tokens([AddedToken("<|mark|>", special=True, lstrip=True)])
    yield lenient
    nested = chatml()  # an added token that contains another one
    nested.add_tokens([AddedToken("x<|im_end|>", special=True, normalized=False)])
    yield nested
    plain = chatml()  # an added token that is not special and that is matched after normalization
    plain.add_tokens([AddedToken("lo wor", normalized=True)])
    yield plain
    for scheme in ("first", "always", "never"):
        tokenizer = sentencepiece(scheme)
        tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
        tokenizer.chat_template = CHATML
        yield tokenizer


@pytest.mark.parametrize("seed", range(4))
def test_pieces_that_are_encoded_together_have_the_ids_of_single_pieces(seed):
    generator = random.Random(seed)
    words = [
        "a",
        " ",
        "blue",
        "\n",
        "<|im_end|>",
        "<|im_start|>",
        "x",
        "lo world",
        "\u2028",
        "é",
        "?",
    ]
    shortened = 0
    for tokenizer in tokenizers_of_every_kind():
        chat_format = ChatFormat(tokenizer)
        conversations = [
            [
                ("".join(generator.choices(words, k=generator.randrange(30))), True, closing)
                for closing in generator.choices([False, False, True], k=generator.randrange(1, 6))
            ]
            for _ in range(60)
        ]
        found = encode_pieces(chat_format, conversations)
        for pieces, (ids, is_action) in zip(conversations, found, strict=True):
            assert ids == encode_in_turn(chat_format, pieces)
            assert len(is_action) == len(ids)
            lefts = [text[-LEFT_CONTEXT:] for text, _, _ in pieces]
            shortened += sum(chat_format.shorten_left_context(left) != left for left in lefts)
    assert shortened > 100


def test_contexts_are_shortened_only_if_added_tokens_separate_texts():
    cut = [
        ChatFormat(tokenizer).shorten_left_context("blue<|im_end|>\n<|im_start|>a\n")
        for tokenizer in tokenizers_of_every_kind()
    ]
    whole, short = "blue<|im_end|>\n<|im_start|>a\n", "<|im_start|>a\n"
    assert cut == [short, whole, short, whole, short, short, short]
