"""What is trained on and sampled from, against the rendering of twelve families' own templates.

``golden_templates.json`` was written once from the families' files, whose source it names: the text
up to the token that ends the last reply, and the pieces that are learned. Two of them differ from
the template's own text, as they must: GLM ends a reply with the next turn's header, and the
template of DeepSeek-R1 drops the reasoning that its generation prompt opens.
"""

from collections import Counter
from typing import Any

import pytest

from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import with_tools
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.demonstrations import encode_example
from tests.rollout.golden import (
    FAMILIES,
    TOOL,
    assistant,
    conversation,
    stand_in,
    stored,
    user,
    without_date,
)

STORED = stored()
CASES = [(family, name) for family in FAMILIES for name in STORED[family]["conversations"]]


def family_tokenizer(family: str) -> Any:
    tokenizer = stand_in(family)
    if tokenizer.chat_template is None:
        pytest.skip("the installed trl does not carry this template")
    return tokenizer


def learned_in(tokenizer: Any, ids: list[int], is_action: list[bool]) -> list[str]:
    runs: list[list[int]] = []
    for place, own in enumerate(is_action):
        if own and (place == 0 or not is_action[place - 1]):
            runs.append([])
        if own:
            runs[-1].append(ids[place])
    return [tokenizer.decode(run) for run in runs]


def test_every_family_has_five_conversations():
    assert len(STORED) == len(FAMILIES) == 12
    assert {len(family["conversations"]) for family in STORED.values()} == {5}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_ids_decode_to_the_template_of_the_family(family, name):
    tokenizer = family_tokenizer(family)
    prompt, completion, tools = conversation(name)
    chat_format = ChatFormat(tokenizer)
    expected = STORED[family]["conversations"][name]
    if "refused" in expected:
        with pytest.raises((RowDropped, UserError)) as refused:
            encode_example(chat_format, with_tools(prompt, tools), completion)
        assert expected["refused"] in str(refused.value)
        return
    ids, is_action = encode_example(chat_format, with_tools(prompt, tools), completion)
    text = without_date(tokenizer.decode(ids))
    assert text.endswith(expected["text"]) if family == "Cohere R7B" else text == expected["text"]
    assert learned_in(tokenizer, ids, is_action) == expected["learned"]
    assert is_action[-1]
    assert ids[-1] in chat_format.stop_ids  # what is learned last would have stopped the sampler
    # What is learned first follows what sampling would be shown.
    if FAMILIES[family].file and (family, name) not in UNLIKE_SAMPLING:
        shown = chat_format.encode_prompt([{**prompt[0], "tools": tools}, *prompt[1:]])
        first = is_action.index(True)
        assert name in ("turns", "tools") or ids[:first] == shown


# The template's generation prompt opens a block that a reply without reasoning does not begin with.
UNLIKE_SAMPLING = {
    (family, name)
    for family in ("DeepSeek-R1", "Nemotron-3")
    for name in ("system", "empty", "turns", "tools")
}


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_without_the_block_of_the_generation_prompt_are_counted(family):
    chat_format = ChatFormat(family_tokenizer(family))
    prompt, completion, _ = conversation("empty")
    notes: Counter[str] = Counter()
    encode_example(chat_format, prompt, completion, notes=notes)
    counted = any("block of the generation prompt" in note for note in notes)
    assert counted == ((family, "empty") in UNLIKE_SAMPLING)


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].file])
def test_appended_turns_are_the_template_rendered_as_a_whole(family):
    """Rollouts append; a template that rewrites earlier turns is refused or said to be so."""
    tokenizer = family_tokenizer(family)
    chat_format = ChatFormat(tokenizer)
    turns = [("user", "Sky?"), ("assistant", "Blue."), ("user", "Grass?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    reply = [*tokenizer("Blue.")["input_ids"], chat_format.closing.token]
    ids = [*chat_format.encode_prompt(messages[:1]), *reply]
    summary = chat_format.describe()
    if family == "gpt-oss":
        with pytest.raises(UserError, match="rewrites earlier turns"):
            chat_format.encode_text_between_replies("Grass?", reply=reply)
        return
    ids += chat_format.encode_text_between_replies("Grass?", reply=reply)
    if family in ("Qwen3.5", "DeepSeek-R1", "Nemotron-3", "GLM-4.5"):
        assert "keep their reasoning" in summary
    elif family == "Qwen3":
        assert "keep their reasoning" in summary
        assert tokenizer.decode(ids) == whole
    else:
        assert "one or several turns" in summary
        assert tokenizer.decode(ids) == whole
    # A reply that was cut is closed by the template, with tokens that are not the policy's.
    cut = chat_format.encode_text_between_replies("Grass?", reply=reply[:-1])
    assert chat_format.closing.token in cut[:3]


def test_a_sampled_reply_of_gpt_oss_is_read_from_its_final_channel():
    tokenizer = family_tokenizer("gpt-oss")
    chat_format = ChatFormat(tokenizer)
    head = "<|channel|>analysis<|message|>Six sevens.<|end|><|start|>assistant"
    said = f"{head}<|channel|>final<|message|>42<|return|>"
    assert chat_format.decode_reply(tokenizer(said)["input_ids"]) == "42"
    assert chat_format.decode_reply(tokenizer("just 42")["input_ids"]) == "just 42"


def test_thinking_can_be_switched_off_and_stays_off(tmp_path):
    from transformers import AutoTokenizer

    from rlhf.reward_models.chat_template import set_chat_options

    tokenizer = family_tokenizer("Nemotron-3")
    set_chat_options(tokenizer, kwargs={"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        chat_format = ChatFormat(found)
        prompt, completion, _ = conversation("empty")
        shown = chat_format.encode_prompt(prompt)
        assert found.decode(shown).endswith("<|im_start|>assistant\n<think></think>")
        notes: Counter[str] = Counter()
        ids, is_action = encode_example(chat_format, prompt, completion, notes=notes)
        assert not notes
        assert ids[: is_action.index(True)] == shown
        assert learned_in(found, ids, is_action) == ["<|im_end|>"]
    with pytest.raises(ValueError, match=r"enable_thinkin has no effect.*does not read"):
        set_chat_options(tokenizer, kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match="the toolkit sets this variable"):
        set_chat_options(tokenizer, kwargs={"tools": []})


def test_a_final_tool_call_of_glm_ends_with_the_header_of_the_tool_result():
    tokenizer = family_tokenizer("GLM-4.5")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    prompt, reply = with_tools([user("u")], [TOOL]), assistant("", tool_calls=[call])
    (found,) = learned_in(tokenizer, *encode_example(ChatFormat(tokenizer), prompt, [reply]))
    assert found.endswith("</tool_call><|observation|>")
    (found,) = learned_in(
        tokenizer, *encode_example(ChatFormat(tokenizer), prompt, [assistant("a")])
    )
    assert found.endswith("a<|user|>")
