"""Render conversations with a chat template, and encode them for training and for scoring.

This is the only module that calls ``apply_chat_template``. A reward model must score text in the
form on which it was trained, so training and scoring render texts with the same functions.

A model's template can have options: template variables such as ``enable_thinking``, and whether the
system message is folded into the first user turn. The options are stored in the tokenizer's
configuration. They are saved and loaded with the tokenizer, so every stage of a pipeline renders
conversations in the same way.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.common.fences import first_think_tag_outside_code
from rlhf.errors import UserError, first_line
from rlhf.reward_models.core import Conversation, Unscorable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
"""Keys of a message that are passed to a template. Other keys, such as ``weight`` and ``answer``,
are not."""

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Template variables that are set from the data or by the toolkit; options must not set them."""

SENTINEL = "\u2063text\u2063"
"""Placeholder for the content of a message; it shows where the template renders the content."""

CALLS_WITHOUT_TEMPLATE = "tool calls cannot be rendered without a chat template"

FIXED_DATE = "01 Jan 2025"
FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + FIXED_DATE + "{%- endmacro -%}"

_PLAIN_JOIN = "plain-1"
_ENDING = "{#- ends where the score is read -#}"

_KWARGS, _FOLD = "chat_template_kwargs", "fold_system"
_READS_THINKING = re.compile(
    r"""\.thinking\b|\[['"]thinking['"]\]|\.get\(['"]thinking['"]|['"]thinking['"] in """
)


class TemplateRefused(Unscorable):
    """Error for messages that the chat template cannot render.

    Args:
        reason: Message of the template's exception in one line, or what the template omits.
        raised: Whether the template raised an exception.
    """

    def __init__(self, reason: str, *, raised: bool = True) -> None:
        what = f"refuses it: {reason}" if raised else reason
        super().__init__(f"the model's chat template {what}")
        self.reason = reason


def chat_template_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the template variables stored in a tokenizer, for example ``enable_thinking``."""
    return dict(tokenizer.init_kwargs.get(_KWARGS) or {})


def folds_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether system messages are folded into the first user turn."""
    return bool(tokenizer.init_kwargs.get(_FOLD, False))


def set_chat_options(
    tokenizer: PreTrainedTokenizerBase,
    *,
    kwargs: Mapping[str, Any] | None = None,
    fold_system: bool = False,
) -> None:
    """Add template options to a tokenizer in place; ``save_pretrained`` saves them.

    Args:
        tokenizer: The tokenizer to change.
        kwargs: Template variables; they override the variables that are stored in the tokenizer.
        fold_system: Whether to fold system messages into the first user turn. False does not change
            the option that is stored in the tokenizer.

    Raises:
        UserError: An option has no effect on the template, or a variable is in ``RESERVED``.
    """
    source = template_source(tokenizer)
    for name in kwargs or {}:
        if name in RESERVED:
            raise UserError(
                f"model.chat_template_kwargs.{name}: the toolkit sets this variable; remove it"
            )
        if not re.search(rf"\b{re.escape(name)}\b", source):
            what = f"does not read {name!r}" if source else "is missing"
            raise UserError(
                f"model.chat_template_kwargs.{name} has no effect: the model's chat template {what}"
            )
    if kwargs:
        tokenizer.init_kwargs[_KWARGS] = chat_template_kwargs(tokenizer) | dict(kwargs)
    if fold_system and not folds_system(tokenizer):
        if not source:
            raise UserError("model.fold_system has no effect: the model has no chat template")
        if system_message_refusal_reason(tokenizer) is None:
            raise UserError("model.fold_system has no effect: the template has a system role")
        tokenizer.init_kwargs[_FOLD] = True


def jinja_variable_defaults(variables: Mapping[str, Any]) -> str:
    """Return Jinja text that sets each variable to its value if the variable is not defined."""
    literals = {
        name: "none" if value is None else json.dumps(value) for name, value in variables.items()
    }
    return "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {literal} %}}{{% endif -%}}"
        for name, literal in literals.items()
    )


def system_message_refusal_reason(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return why the template cannot render a system message, or None if the template can do so."""
    turns = [{"role": "system", "content": SENTINEL}, {"role": "user", "content": "?"}]
    try:
        text = render_chat(tokenizer, turns, add_generation_prompt=True)
    except TemplateRefused as refusal:
        return f"refuses it: {refusal.reason}"
    return None if SENTINEL in text else "leaves the system message out"


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja text of all templates of the tokenizer, or an empty string."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return template or ""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    fixed_date: bool = False,
) -> str:
    """Render ``messages`` with the chat template and the options stored in the tokenizer.

    The first list under the key ``tools`` of a message is passed as the template's ``tools``.
    Templates expect tool calls in different forms: arguments as an object or as JSON text, and
    empty content as None or as an empty string. The forms are tried in order until the template
    renders every tool call and every tool result. To detect omissions, the messages are rendered a
    second time with markers in place of calls and results.

    Args:
        tokenizer: The tokenizer.
        messages: Dictionaries with the keys in ``MESSAGE_KEYS``; ``role`` and ``content`` are
            required.
        add_generation_prompt: Whether to append the beginning of the assistant's next turn.
        fixed_date: Whether templates use a fixed date instead of today's date.

    Raises:
        TemplateRefused: The template raised an exception, or omits tool calls or tool results.
    """
    marked: Sequence[Message] = ()
    markers: dict[str, list[str]] = {}
    if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        marked, markers = _with_tool_markers(messages)
    options: dict[str, Any] = chat_template_kwargs(tokenizer)
    options |= {"tools": tools_of(messages), "add_generation_prompt": add_generation_prompt}
    if fixed_date:
        template = FIXED_CLOCK + tokenizer.get_chat_template(tools=options["tools"])
        options = {"date_string": FIXED_DATE, **options, "chat_template": template}
    refusal = None
    for form in _CALL_FORMS if "tool calls" in markers else _CALL_FORMS[:1]:

        def render(turns: Sequence[Message], form: dict[str, bool] = form) -> str:
            prepared: Any = _prepare_messages(tokenizer, turns, **form)
            return str(tokenizer.apply_chat_template(prepared, tokenize=False, **options))

        try:
            text, marked_text = render(messages), render(marked) if markers else ""
        except Exception as error:  # templates can raise any exception
            reason = first_line(error).strip()
            refusal = refusal or TemplateRefused(reason or type(error).__name__)
            continue
        omitted = [kind for kind in markers if any(m not in marked_text for m in markers[kind])]
        if not omitted:
            return text
        refusal = refusal or TemplateRefused(f"leaves {omitted[0]} out", raised=False)
    assert refusal is not None
    raise refusal


# Forms of an assistant message with tool calls, as arguments of `_prepare_messages`.
_CALL_FORMS = tuple(
    {"arguments_as_text": arguments_as_text, "empty_content_as_none": empty_content_as_none}
    for arguments_as_text in (False, True)
    for empty_content_as_none in (False, True)
)


def _with_tool_markers(
    messages: Sequence[Message],
) -> tuple[list[Message], dict[str, list[str]]]:
    """Replace tool results and the argument values of tool calls by markers.

    The function name and the argument names of a call are kept, because templates can look them up
    in the list of tools. In a call without arguments, the function name is replaced.

    Returns:
        - The messages with markers.
        - "tool calls" or "tool results" -> its markers; only if the messages have some.
    """
    markers: dict[str, list[str]] = {}

    def new_marker(kind: str) -> str:
        texts = markers.setdefault(kind, [])
        texts.append(f"{kind.upper().replace(' ', '')}{len(texts)}X")
        return texts[-1]

    def mark_values(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: mark_values(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark_values(item) for item in value]
        return new_marker("tool calls")

    def mark_call(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": mark_call(call["function"])}
        arguments = _convert_tool_call_arguments(call, arguments_as_text=False).get("arguments")
        if arguments:
            return {**call, "arguments": mark_values(arguments)}
        return {**call, "name": new_marker("tool calls")}

    marked: list[Message] = []
    for message in messages:
        turn = dict(message)
        if turn.get("tool_calls"):
            turn["tool_calls"] = [mark_call(call) for call in turn["tool_calls"]]
        if turn["role"] == "tool" and turn.get("content"):
            turn["content"] = new_marker("tool results")
        marked.append(turn)
    return marked, markers


def tools_of(messages: Sequence[Message]) -> list[Any] | None:
    """Return the ``tools`` of the first message that has tools, or None if there is none."""
    return next((message["tools"] for message in messages if message.get("tools")), None)


def with_tools(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return copies of ``messages``; the first one gets ``tools``, if any, for `render_chat`."""
    copied = [dict(message) for message in messages]
    if tools and copied:
        copied[0]["tools"] = list(tools)
    return copied


def prompt_with_tools(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the prompt of a canonical row, with the row's ``tools`` attached for rendering."""
    return with_tools(row["prompt"], row.get("tools"))


def _prepare_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    arguments_as_text: bool,
    empty_content_as_none: bool,
) -> list[dict[str, Any]]:
    """Return the messages for the template, without keys that are unknown or have no value.

    Args:
        tokenizer: The tokenizer. If `folds_system` is true for it, the system message is folded.
        messages: Messages of a conversation.
        arguments_as_text: Whether the arguments of tool calls become JSON text instead of objects.
        empty_content_as_none: Whether empty content of a message with tool calls becomes None.
    """
    thinking = _template_reads_thinking_key(template_source(tokenizer))
    prepared = []
    for message in messages:
        turn = {key: message[key] for key in MESSAGE_KEYS if message.get(key) not in (None, [])}
        turn.setdefault("content", "")
        if thinking and "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning_content"]  # gpt-oss, LFM2.5
        if "tool_calls" in turn:
            turn["tool_calls"] = [
                _convert_tool_call_arguments(call, arguments_as_text) for call in turn["tool_calls"]
            ]
            if empty_content_as_none and not turn["content"]:
                turn["content"] = None
        prepared.append(turn)
    return fold_system(prepared) if folds_system(tokenizer) else prepared


@functools.lru_cache(maxsize=16)
def _template_reads_thinking_key(source: str) -> bool:
    """Return whether a template reads the reasoning under the name ``thinking``."""
    return _READS_THINKING.search(source) is not None


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return (reasoning, content without reasoning) of a message.

    The reasoning is the value of ``reasoning_content``, or a ``<think>`` block at the start of the
    content, whose opening tag may be missing. If the message has neither of them, the reasoning is
    empty. Tags in a program are part of the program.
    """
    content = str(message.get("content") or "")
    if reasoning := message.get("reasoning_content"):
        return str(reasoning), content
    before, closed, rest = content.partition("</think>")
    lead, _, reasoning = before.rpartition("<think>")
    if not closed or lead.strip() or first_think_tag_outside_code(content) is None:
        return "", content
    return reasoning.strip("\n"), rest.lstrip("\n")


def fold_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return copies of ``messages`` with the system text at the start of the first user turn.

    Without a user turn, the system message becomes a user message. Only a system message at the
    start of the conversation is folded.
    """
    copied = [dict(message) for message in messages]
    if not copied or copied[0]["role"] != "system":
        return copied
    system, *rest = copied
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system['content']}\n\n{message['content']}"
            return rest
    return [{**system, "role": "user"}, *rest]


def _convert_tool_call_arguments(call: Any, arguments_as_text: bool) -> Any:
    """Return a tool call with the arguments as JSON text (OpenAI's form) or as an object.

    Arguments that are not the JSON text of an object remain text.
    """
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {
            **call,
            "function": _convert_tool_call_arguments(call["function"], arguments_as_text),
        }
    arguments = call.get("arguments")
    if arguments_as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if arguments_as_text or not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments)
    except json.JSONDecodeError:
        return dict(call)
    return {**call, "arguments": parsed} if isinstance(parsed, Mapping) else dict(call)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    append_eos: bool,
    max_length: int | None = None,
) -> list[int]:
    """Return the token ids of a conversation, truncated on the left.

    This function can prepare data for TRL's ``RewardTrainer``. If the dataset has the columns
    ``chosen_ids`` and ``rejected_ids`` (lists of int) and optionally ``margin``, the trainer
    applies no template, no EOS rule and no tokenization (checked in trl 1.16.0,
    ``_prepare_dataset``). Set ``RewardConfig.max_length`` to None, because the trainer otherwise
    drops longer rows.

    Args:
        tokenizer: The tokenizer.
        conversation: The conversation; its last message is usually the reply to score.
        append_eos: Whether the last token must be the tokenizer's EOS. If True, white space at the
            end of the rendered text is removed, and EOS is appended if it is missing. If False, the
            ids are those of the rendered text.
        max_length: Maximum number of tokens; None means no limit. The first tokens of longer texts
            are removed, so that the end of the reply is kept. A leading [CLS] or BOS is also kept.

    Raises:
        Unscorable: The conversation cannot be rendered; see :func:`render_conversation`.
        UserError: ``append_eos`` is set and the tokenizer has no EOS token, or the conversation is
            empty.
    """
    ids, _ = ids_and_is_truncated(
        tokenizer, conversation, append_eos=append_eos, max_length=max_length
    )
    return ids


def ids_and_is_truncated(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    tools: Sequence[Any] | None = None,
    *,
    append_eos: bool,
    max_length: int | None,
) -> tuple[list[int], bool]:
    """Return the result of :func:`encode_conversation`, and whether the text was truncated.

    ``tools`` are descriptions of tools for the template, see :func:`with_tools`. The errors are
    those of :func:`encode_conversation`.
    """
    text = render_conversation(tokenizer, with_tools(conversation, tools))
    eos = tokenizer.eos_token
    if append_eos:
        if not isinstance(eos, str):
            raise UserError(
                "append_eos needs a tokenizer with an EOS token; set append_eos to false"
            )
        text = text.rstrip().removesuffix(eos)
    is_plain = tokenizer.chat_template is None
    ids = list(tokenizer(text, add_special_tokens=is_plain, verbose=False)["input_ids"])
    if append_eos and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    if max_length is None or len(ids) <= max_length:
        return ids, False
    if ids[:1] in ([tokenizer.bos_token_id], [tokenizer.cls_token_id]):
        return [ids[0], *ids[len(ids) - max_length + 1 :]], True
    return ids[-max_length:], True


def render_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Render a conversation as text, with the tokenizer's chat template if it has one.

    Without a template, a single message is rendered as its bare content (the form on which
    sentiment and toxicity classifiers are trained), and several messages are rendered as
    ``role: content`` paragraphs separated by empty lines. Templates that use today's date get a
    fixed date, so that scores do not depend on the date.

    Raises:
        Unscorable: The template cannot render the conversation (:class:`TemplateRefused`), or the
            conversation has tool calls and there is no template.
        UserError: The conversation is empty.
    """
    if not conversation:
        raise UserError("cannot encode an empty conversation")
    if tokenizer.chat_template is None:
        if any(message.get("tool_calls") for message in conversation):
            raise Unscorable(CALLS_WITHOUT_TEMPLATE)
        if len(conversation) == 1:
            return conversation[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in conversation)
    return render_chat(tokenizer, conversation, fixed_date=True)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fingerprint (16 hex digits) of the chat template, its options and the EOS token.

    Together with the vocabulary, these determine the result of :func:`encode_conversation`.
    """
    has_template = tokenizer.chat_template is not None
    template = tokenizer.get_chat_template() if has_template else _PLAIN_JOIN
    source = f"{template}\0{tokenizer.eos_token}"
    options = {"kwargs": chat_template_kwargs(tokenizer), "fold_system": folds_system(tokenizer)}
    if any(options.values()):
        source += f"\0{json.dumps(options, sort_keys=True)}"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def make_template_end_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change the tokenizer's chat template in place so that its text ends with EOS, as in scoring.

    Use this function for a tokenizer that is saved with a reward model whose score is read at EOS.
    Other libraries render texts with the saved template and read the score at the last token.
    Without the change, the last token can be white space; ChatML, for example, writes a line break
    after EOS. The changed template also uses the fixed date, and the template variables of the
    tokenizer are its defaults. Prompts (``add_generation_prompt``) are otherwise rendered as
    before. A tokenizer without EOS, without a template, or with several templates is not changed.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or _ENDING in template or tokenizer.eos_token is None:
        return
    defaults = {"date_string": FIXED_DATE, **chat_template_kwargs(tokenizer)}
    lines = [FIXED_CLOCK, jinja_variable_defaults(defaults)]
    body = template.removesuffix("\n")
    lines.append("{%- set rendered_text %}\n" + body + "{% endset -%}")
    lines.append(
        "{%- if add_generation_prompt %}{{ rendered_text }}{% else %}"
        "{{ rendered_text.rstrip().removesuffix(eos_token) + eos_token }}{% endif -%}"
    )
    tokenizer.chat_template = _ENDING + "".join(lines)
