"""Text that is decoded token by token, stop strings, and names of tokens."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.rollout.text_decoder import IncrementalTextDecoder
from rlhf.serving.text import StopStringFilter, TokenNames
from tests.helpers.models import tiny_tokenizer

TEXTS = [
    "The sky is blue.",
    "é ü 漢字 🙂👩‍👩‍👧 a",
    " two  spaces\n\nlines ",
    "",
    "\x00\u202e\ufffd!",
]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like those of SentencePiece, with tokens for bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "b"), ("▁a", "b")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def step_by_step(tokenizer, ids, context=()) -> str:
    decoder = IncrementalTextDecoder(tokenizer, context)
    return "".join([*(decoder.append([token]) for token in ids), decoder.finish()])


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_the_same_step_by_step(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert step_by_step(tokenizer, ids) == text
    decoder = IncrementalTextDecoder(tokenizer)
    assert decoder.append(ids) + decoder.finish() == text


def test_random_tokens_are_the_same_step_by_step_as_at_once():
    tokenizer = tiny_tokenizer()
    for seed in range(200):
        ids = random.Random(seed).choices(range(len(tokenizer)), k=30)
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert step_by_step(tokenizer, ids) == expected, f"seed {seed}"


def test_a_part_of_a_character_waits_for_its_rest():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    decoder = IncrementalTextDecoder(tokenizer)
    pieces = [decoder.append([token]) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_a_completion_keeps_the_space_after_its_prompt():
    tokenizer = sentencepiece_tokenizer()
    prompt, ids = [1, *tokenizer("a b")["input_ids"]], tokenizer("ab a")["input_ids"]
    assert tokenizer.decode(ids) == "ab a"
    assert step_by_step(tokenizer, ids, prompt) == " ab a"
    assert step_by_step(tokenizer, ids) == "ab a"


@pytest.mark.parametrize(
    ("stops", "parts", "text", "found"),
    [
        (["END"], ["a E", "N", "D b"], "a ", True),
        (["END"], ["a E", "NX"], "a ENX", False),
        (["ab", "b"], ["xab"], "x", True),  # the earlier start counts
        (["aab"], ["aa", "ab"], "a", True),
        (["\n"], ["", "x\ny\nz"], "x", True),
        ([], ["x"], "x", False),
    ],
)
def test_stop_strings(stops, parts, text, found):
    stop = StopStringFilter(stops)
    shown = "".join(stop.append(part) for part in parts)
    assert (shown + stop.finish(), stop.found) == (text, found)
    assert text.startswith(shown)


def test_stop_strings_equal_a_search_in_the_whole_text():
    for seed in range(500):
        draw = random.Random(seed)
        parts = ["".join(draw.choices("ab", k=draw.randint(0, 3))) for _ in range(8)]
        stops = ["".join(draw.choices("ab", k=draw.randint(3, 5))) for _ in range(2)]
        stop, shown = StopStringFilter(stops), ""
        whole = ""
        for part in parts:
            whole += part
            shown += stop.append(part)
            starts = [whole.find(s) for s in stops if s in whole]
            if starts:
                assert stop.found, f"seed {seed}"
                assert shown == whole[: min(starts)], f"seed {seed}"
                break
        else:
            assert shown + stop.finish() == whole, f"seed {seed}"


def test_names_of_tokens_are_their_bytes():
    tokenizer = tiny_tokenizer()
    names = TokenNames(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(names.bytes_of, ids)).decode() == text
    assert names.name(tokenizer.eos_token_id) == tokenizer.eos_token
    parts = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert [names.name(i) for i in parts] == [f"bytes:\\x{byte:02x}" for byte in "🙂".encode()]
    assert names.bytes_of(len(tokenizer) + 5) == b""
    other = TokenNames(sentencepiece_tokenizer())
    assert [other.name(i) for i in (262, 3 + 0xE2, 3 + 0x41)] == [" a", "bytes:\\xe2", "A"]


def test_every_byte_has_one_token_name():
    tokenizer = tiny_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = TokenNames(tokenizer)
    found = {names.bytes_of(tokenizer.convert_tokens_to_ids(piece)) for piece in alphabet}
    assert found == {bytes([byte]) for byte in range(256)}
