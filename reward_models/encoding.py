"""The one way from a conversation to token ids, shared by training and scoring.

A reward model is only as good as the agreement between the text it was trained on and the text it
scores, so both call :func:`encode_conversation`. TRL's ``RewardTrainer`` (checked in trl 1.16.0,
``_prepare_dataset``) skips its own template, its own EOS rule and its own tokenisation when the
data set has the columns ``chosen_ids`` and ``rejected_ids`` (lists of int; ``margin`` optional):
fill them with this function. Rows longer than ``RewardConfig.max_length`` are still dropped there,
so truncate here and set that option to None.
"""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.reward_models.chat_template import (
    FIXED_CLOCK,
    FIXED_DATE,
    chat_template_kwargs,
    folds_system,
    render_chat,
    template_defaults,
)
from rlhf.reward_models.core import Conversation

_PLAIN_JOIN = "plain-1"
_ENDING = "{#- ends where the score is read -#}"

# Tokens that models set aside and that never stand in ordinary text, in order of preference.
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
    max_length: int | None,
) -> list[int]:
    """Token ids of ``conversation``, truncated from the left.

    ``append_eos`` makes the tokenizer's EOS the very last token: white space that a template writes
    after it is cut, and a missing EOS is added. Otherwise the ids are exactly the template's.
    Too long a text loses its oldest tokens, so that the reply and its end survive; a leading
    [CLS] or BOS is kept.
    """
    ids = full_ids(tokenizer, conversation, append_eos=append_eos)
    return truncate_left(ids, max_length, tokenizer=tokenizer)


def full_ids(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, append_eos: bool
) -> list[int]:
    """Token ids before truncation."""
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
    return ids


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """``conversation`` as text: the tokenizer's chat template, or plain joining without one.

    Plain joining writes a single message as its bare text (what a sentiment or toxicity classifier
    was trained on) and several as ``role: text`` paragraphs with an empty line between. Templates
    that print today's date see a fixed one, or every score would change overnight.

    Raises:
        TemplateRefused: the template raised; an :class:`Unscorable`.
    """
    if not conversation:
        raise UserError("cannot encode an empty conversation")
    if tokenizer.chat_template is None:
        if len(conversation) == 1:
            return conversation[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in conversation)
    return render_chat(tokenizer, conversation, fixed_date=True)


def truncate_left(
    ids: list[int], max_length: int | None, *, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The last ``max_length`` ids, a leading [CLS] or BOS kept in front of them."""
    if max_length is None or len(ids) <= max_length:
        return ids
    if ids[:1] in ([tokenizer.bos_token_id], [tokenizer.cls_token_id]):
        return [ids[0], *ids[len(ids) - max_length + 1 :]]
    return ids[-max_length:]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of all that :func:`encode_conversation` takes from the tokenizer beside its
    vocabulary: the chat template (or the plain joining) with its options, and the EOS token.
    16 hex digits."""
    has_template = tokenizer.chat_template is not None
    template = tokenizer.get_chat_template() if has_template else _PLAIN_JOIN
    source = f"{template}\0{tokenizer.eos_token}"
    options = {"kwargs": chat_template_kwargs(tokenizer), "fold_system": folds_system(tokenizer)}
    if any(options.values()):
        source += f"\0{json.dumps(options, sort_keys=True)}"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def end_template_at_score(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's own chat template write exactly what :func:`full_ids` encodes.

    Call it on the tokenizer that is saved beside a reward model that reads EOS. A plain tool
    renders with the saved template and reads the last token: without this it would read the white
    space that ChatML writes after EOS. The saved template ends with EOS, prints the fixed date, and
    has the tokenizer's template options as defaults. Rendering a prompt alone
    (``add_generation_prompt``) stays as it was.
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
    """Give ``tokenizer`` a pad token that is not its EOS, and return its id.

    Transformers' own pooling reads the last token that is not padding; with pad == EOS it cannot
    see whether a reply ended. Prefers a token the vocabulary already has, else adds ``<|pad|>``:
    then resize the model's embeddings to ``len(tokenizer)``. Set ``model.config.pad_token_id`` to
    the returned id before training.
    """
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    if tokenizer.pad_token is None or tokenizer.pad_token in taken:
        known = tokenizer.get_vocab()
        spare = [token for token in _FALLBACK_PADS if token in known and token not in taken]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else _FALLBACK_PADS[0]})
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
