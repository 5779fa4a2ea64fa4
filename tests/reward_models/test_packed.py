"""Learned rewards in packed batches equal those in padded batches."""

import pytest
import torch

from rlhf import reward_models
from rlhf.models.rewards import load_rewards

PROMPTS = ("how many ?", "fox 7 " * 10 + "why ?")
REPLIES = ("yes", "fox 7 no", "fox " * 9, "7")


@pytest.fixture(scope="module")
def talks(helpers):
    return [helpers["talk"](prompt, reply) for reply in REPLIES for prompt in PROMPTS]


def both(spec):
    plain, ours = reward_models.build(spec), load_rewards(spec)
    assert not any(found._compute_packed_states for found in plain.learned_rewards())
    return plain, ours


@pytest.mark.parametrize("batch_size", [3, 16])
def test_scores_are_those_of_padded_batches(decoder_path, talks, batch_size):
    spec = {"kind": "learned", "path": str(decoder_path), "batch_size": batch_size}
    padded, packed = both(spec)
    assert packed._compute_packed_states
    expected = padded(talks)
    assert max(expected) - min(expected) > 0.01
    assert packed(talks) == pytest.approx(expected, abs=1e-5)
    mask, ids = padded.pad_to_mask_and_ids([padded.encode(talk) for talk in talks], side="left")
    torch.testing.assert_close(
        packed.logits(mask, input_ids=ids), padded.logits(mask, input_ids=ids), atol=1e-5, rtol=0
    )


def test_a_prompt_is_read_once_for_all_its_replies(decoder_path, talks, monkeypatch):
    reward = load_rewards({"kind": "learned", "path": str(decoder_path)})
    read = []
    trunk = reward.model.base_model
    plain = trunk.forward
    monkeypatch.setattr(
        trunk, "forward", lambda **given: read.append(given["input_ids"].numel()) or plain(**given)
    )
    reward(talks)
    lengths = [len(reward.encode(talk)) for talk in talks]
    long = [reward.encode(talk) for talk in talks if "why" in talk[0]["content"]]
    alike = min(
        next(i for i, (a, b) in enumerate(zip(long[0], other, strict=False)) if a != b)
        for other in long[1:]
    )
    assert alike >= 32
    assert sum(read) <= sum(lengths) - (len(long) - 1) * alike


def test_members_of_compositions_are_found(decoder_path, talks):
    one = {"kind": "learned", "path": str(decoder_path)}
    ensemble = {"kind": "ensemble", "paths": [str(decoder_path)] * 2}
    cost = {"kind": "cost", "path": str(decoder_path)}
    for spec in ([{**one, "weight": 2.0}, {"kind": "length", "low": 3}], ensemble, cost):
        padded, packed = both(spec)
        assert packed.learned_rewards()
        assert all(found._compute_packed_states for found in packed.learned_rewards())
        assert packed(talks) == pytest.approx(padded(talks), abs=1e-4)


def test_encoders_are_left_as_they_are(encoder_path, talks):
    padded, ours = both({"kind": "learned", "path": str(encoder_path)})
    assert not ours._compute_packed_states
    assert ours(talks) == padded(talks)
