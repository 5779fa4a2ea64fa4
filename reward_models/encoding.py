"""Encode conversations as token ids, in the same way for training and for scoring.

A reward model must score text in the form on which it was trained, so both use
:func:`encode_conversation`. TRL's ``RewardTrainer`` (checked in trl 1.16.0, ``_prepare_dataset``)
skips its own template, EOS rule and tokenization if the data set has the columns ``chosen_ids`` and
``rejected_ids`` (lists of int; ``margin`` is optional), which this function can fill. The trainer
still drops rows that are longer than ``RewardConfig.max_length``, so truncate with this function
and set that option to None.
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
        append_eos: Make the tokenizer's EOS the last token: remove white space that the template
            writes after it, or append it. Otherwise the ids are exactly the template's.
        max_length: Largest number of tokens. Longer texts lose their oldest tokens, so that the end
            of the reply is kept; a leading [CLS] or BOS is also kept.
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
    """Return what :func:`encode_conversation` returns, and whether the text was truncated."""
    text = render(tokenizer, conversation)
    eos = tokenizer.eos_token
    if append_eos:
        if not isinstance(eos, str):
            raise UserError("append_eos needs a tokenizer with an EOS token; set it to false")
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
    """Render a conversation with the tokenizer's chat template, or join its texts without one.

    Without a template, a single message is its bare text (the form on which sentiment and toxicity
    classifiers are trained), and several messages are ``role: text`` paragraphs separated by empty
    lines. Templates that write today's date render a fixed one, so that scores do not depend on it.

    Raises:
        Unscorable: The template raised (:class:`TemplateRefused`), or there are tool calls and no
            template.
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
    """Change the tokenizer's chat template so that it renders what scoring encodes.

    Call it on the tokenizer that is saved with a reward model that reads EOS. Other libraries
    render with the saved template and read the last token, which without this change can be the
    white space that ChatML writes after EOS. The changed template ends with EOS, writes the fixed
    date, and has the tokenizer's template options as defaults. Rendering a prompt
    (``add_generation_prompt``) is unchanged.
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
    """Give a tokenizer a pad token that is not its EOS, and return its id.

    Transformers' pooling reads the last token that is not padding; with pad == EOS it skips the EOS
    of a finished reply. Uses a reserved token of the vocabulary if there is one, else adds
    ``<|pad|>``; then the model's embeddings must be resized to ``len(tokenizer)``. Set
    ``model.config.pad_token_id`` to the returned id before training.
    """
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    if tokenizer.pad_token is None or tokenizer.pad_token in taken:
        known = tokenizer.get_vocab()
        spare = [token for token in _FALLBACK_PADS if token in known and token not in taken]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else _FALLBACK_PADS[0]})
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
