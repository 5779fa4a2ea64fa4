"""Encode conversations as token ids, in the same way for training and for scoring.

A reward model must score text in the form on which it was trained, so training and scoring use
:func:`encode_conversation`. It can also prepare data for TRL's ``RewardTrainer``: if the data set
has the columns ``chosen_ids`` and ``rejected_ids`` (lists of int; ``margin`` is optional), the
trainer does not apply a template, an EOS rule and tokenization of its own (checked in trl 1.16.0,
``_prepare_dataset``). It still drops rows that are longer than ``RewardConfig.max_length``, so
truncate with :func:`encode_conversation` and set that option to None.
"""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.reward_models.chat_template import (
    CALLS_WITHOUT_TEMPLATE,
    FIXED_CLOCK,
    FIXED_DATE,
    chat_template_kwargs,
    folds_system,
    render_chat,
    template_defaults,
)
from rlhf.reward_models.core import Conversation, Unscorable

_PLAIN_JOIN = "plain-1"
_ENDING = "{#- ends where the score is read -#}"

# Reserved tokens that do not occur in ordinary text, in order of preference.
_FALLBACK_PADS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
    "[UNK]",
)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    append_eos: bool,
    max_length: int | None = None,
) -> list[int]:
    """Return the token ids of a conversation, truncated on the left.

    Args:
        tokenizer: The tokenizer.
        conversation: The conversation; its last message is usually the reply to score.
        append_eos: Whether the last token must be the tokenizer's EOS. White space that the
            template writes after EOS is then removed, and EOS is appended if it is missing. If
            False, the ids are those of the rendered template.
        max_length: Maximum number of tokens; None is no limit. The first tokens of longer texts are
            removed, so that the end of the reply is kept; a leading [CLS] or BOS is also kept.

    Raises:
        Unscorable: The conversation cannot be rendered; see :func:`render`.
        UserError: ``append_eos`` is set and the tokenizer has no EOS token, or the conversation is
            empty.
    """
    ids, _ = encode_truncated(tokenizer, conversation, append_eos=append_eos, max_length=max_length)
    return ids


def encode_truncated(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    append_eos: bool,
    max_length: int | None,
) -> tuple[list[int], bool]:
    """Return the result of :func:`encode_conversation`, and whether the text was truncated."""
    text = render(tokenizer, conversation)
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


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Render a conversation as text, with the tokenizer's chat template if it has one.

    Without a template, a single message is rendered as its bare content (the form on which
    sentiment and toxicity classifiers are trained), and several messages are rendered as
    ``role: content`` paragraphs separated by empty lines. Templates that write today's date write a
    fixed date instead, so that scores do not depend on the date.

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


def end_template_at_score(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change the tokenizer's chat template in place so that its text ends with EOS, as in scoring.

    This is for a tokenizer that is saved with a reward model whose score is read at EOS. Other
    libraries render with the saved template and read the score at the last token. Without the
    change, the last token can be white space, which ChatML writes after EOS. The changed template
    also writes the fixed date, and has the tokenizer's template options as defaults. The rendering
    of prompts (``add_generation_prompt``) does not change otherwise.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or _ENDING in template or tokenizer.eos_token is None:
        return
    defaults = {"date_string": FIXED_DATE, **chat_template_kwargs(tokenizer)}
    lines = [FIXED_CLOCK, template_defaults(defaults)]
    body = template.removesuffix("\n")
    lines.append("{%- set rendered_text %}\n" + body + "{% endset -%}")
    lines.append(
        "{%- if add_generation_prompt %}{{ rendered_text }}{% else %}"
        "{{ rendered_text.rstrip().removesuffix(eos_token) + eos_token }}{% endif -%}"
    )
    tokenizer.chat_template = _ENDING + "".join(lines)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer a pad token that differs from EOS and BOS, and return the token's id.

    The pooling of Transformers reads the last token that is not padding; if the pad token is EOS,
    it skips the EOS of a finished reply. The pad token is a reserved token of the vocabulary if
    there is one. Otherwise ``<|pad|>`` is added, and the model's embeddings must be resized to
    ``len(tokenizer)``. In both cases, set ``model.config.pad_token_id`` to the returned id before
    training.
    """
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    if tokenizer.pad_token is None or tokenizer.pad_token in taken:
        known = tokenizer.get_vocab()
        spare = [token for token in _FALLBACK_PADS if token in known and token not in taken]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else _FALLBACK_PADS[0]})
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
