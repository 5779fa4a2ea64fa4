"""Prefix curves, influence of the prompt, counterfactual edits and nearest training pairs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf.config.explain import AttributionSpec
from rlhf.errors import UserError
from rlhf.explain.counterfactuals import find_counterfactual
from rlhf.explain.encoding import encode_with_parts
from rlhf.explain.neighbors import TrainingPairIndex, head_inputs
from rlhf.explain.prefix_curve import prefix_curve
from rlhf.explain.prompt_influence import prompt_influence
from rlhf.explain.reward.explainer import RewardExplainer
from rlhf.explain.score_function import DifferentiableReward
from rlhf.explain.words import Word, without_words, word_attributions, words_of_last_message
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.core import last_reply
from rlhf.reward_models.learned import LearnedReward
from tests.explain.rewards import PAIRS, linear_reward, pair


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_prefix_is_scored_like_a_reply_that_ends_there(kind, decoder_path, encoder_path):
    reward = LearnedReward.load(decoder_path if kind == "decoder" else encoder_path)
    conversation = PAIRS[0].chosen
    encoded = encode_with_parts(reward, conversation, num_prompt_messages=1)
    curve = prefix_curve(DifferentiableReward(reward), encoded, {}, max_points=1000)
    assert curve.tokens == list(range(1, len(encoded.positions("reply")) + 1))
    for count, score in zip(curve.tokens, curve.scores, strict=True):
        text = "".join(encoded.tokens[i] for i in encoded.positions("reply")[:count])
        shorter = [conversation[0], {"role": "assistant", "content": text}]
        # A shorter text can be tokenized differently.
        if len(reward.encode(shorter)) == len(encoded.ids) - len(curve.tokens) + count:
            assert score == pytest.approx(reward.score([shorter]).values[0], abs=1e-5)
    assert curve.scores[-1] == pytest.approx(reward.score([conversation]).values[0], abs=1e-5)


def test_a_prefix_curve_has_at_most_the_given_number_of_points_and_ends_at_the_reply():
    reward, _ = linear_reward()
    encoded = encode_with_parts(reward, PAIRS[0].chosen, num_prompt_messages=1)
    curve = prefix_curve(DifferentiableReward(reward), encoded, {}, max_points=4)
    assert len(curve.tokens) == 4
    assert (curve.tokens[0], curve.tokens[-1]) == (1, len(encoded.positions("reply")))
    empty = pair("fox", "", "dog")
    encoded = encode_with_parts(reward, empty.chosen, num_prompt_messages=1)
    assert prefix_curve(DifferentiableReward(reward), encoded, {}).tokens == []


def count_words(reward_of_conversation):
    return PerConversationReward(reward_of_conversation, name="words")


def overlap(conversation):
    """Number of words of the reply that the prompt contains."""
    prompt = conversation[0]["content"].split()
    return float(sum(word in prompt for word in last_reply(conversation).split()))


def test_the_influence_of_the_prompt_is_measured_by_replacing_it():
    item = pair("a b c", "a b", "c")
    others = [[{"role": "user", "content": text}] for text in ("a b", "c", "c x", "a c", "b c", "")]
    found = prompt_influence(count_words(overlap), item, others, share=0.25)
    assert found.share == 0.25
    assert found.without_prompt == 0.0
    # The margins after the six prompts are 2, -1, -1, 0, 0 and 0.
    assert found.other_prompts.value == pytest.approx(0.0)
    assert found.other_prompts.units == 6
    alone = prompt_influence(count_words(overlap), item, [], share=None)
    assert alone.other_prompts is None


def test_a_reward_that_ignores_the_prompt_is_not_influenced_by_it():
    item = pair("a b c", "a b", "c")
    length = count_words(lambda talk: float(len(last_reply(talk).split())))
    found = prompt_influence(length, item, [PAIRS[0].prompt], share=None)
    assert (found.without_prompt, found.other_prompts.value) == (1.0, 1.0)


def test_words_are_removed_with_the_white_space_before_them():
    talk = [{"role": "assistant", "content": "one two  three\nfour"}]
    words = words_of_last_message(talk, "chosen")
    assert [word.text for word in words] == ["one", "two", "three", "four"]
    assert without_words(talk, words[1:3])[0]["content"] == "one\nfour"
    assert without_words(talk, words[:1])[0]["content"] == "two  three\nfour"
    assert without_words(talk, words)[0]["content"] == ""
    assert talk[0]["content"] == "one two  three\nfour"


def test_attributions_of_words_are_sums_over_their_tokens():
    reward, weights = linear_reward()
    talk = [
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": " quick, naïve 😀 fox "},
    ]
    encoded = encode_with_parts(reward, talk, num_prompt_messages=1)
    values = weights[torch.tensor(encoded.ids)].tolist()
    words = words_of_last_message(talk, "chosen")
    found = word_attributions(words, talk, encoded, values)
    reply = encoded.positions("reply")
    assert sum(found) == pytest.approx(
        sum(values[i] for i in reply if encoded.tokens[i].strip() or not encoded.tokens[i]),
        abs=1e-4,
    )
    assert [word.text for word in words] == ["quick,", "naïve", "😀", "fox"]


VALUES = {"wine": 5.0, "good": 1.0, "fine": 1.0, "bad": -2.0}


def sentiment(conversation):
    return sum(VALUES.get(word, 0.0) for word in last_reply(conversation).split())


def candidates(item):
    return [
        *words_of_last_message(item.chosen, "chosen"),
        *words_of_last_message(item.rejected, "rejected"),
    ]


def test_a_counterfactual_deletes_the_fewest_words_that_it_needs():
    item = pair("q", "good wine and fine", "good fine")  # margin 7 - 2
    found = find_counterfactual(count_words(sentiment), item, 5.0, candidates(item))
    # Without wine the margin is 0, which is no flip; good or fine of the chosen reply completes it.
    assert found.flips
    assert found.margin == -1.0
    assert [w.text for w in found.words] in (["wine", "good"], ["wine", "fine"])
    assert {w.side for w in found.words} == {"chosen"}


def test_a_needless_deletion_is_undone():
    margins = {"": 3.0, "a": 1.0, "b": 2.0, "c": 2.0, "ab": 0.5, "ac": 0.8, "abc": -1.0, "bc": -0.5}

    def score(conversation):
        present = last_reply(conversation).split()
        return 0.0 if present == ["d"] else margins["".join(w for w in "abc" if w not in present)]

    item = pair("q", "a b c", "d")
    found = find_counterfactual(
        count_words(score), item, 3.0, words_of_last_message(item.chosen, "chosen")
    )
    # The rounds delete a, b and c. After the flip, a is restored.
    assert [w.text for w in found.words] == ["b", "c"]
    assert found.margin == -0.5
    assert found.evaluations == 3 + 2 + 1 + 2


def test_a_verdict_for_the_rejected_reply_is_flipped_too():
    item = pair("q", "good bad", "wine")  # margin -1 - 5
    found = find_counterfactual(count_words(sentiment), item, -6.0, candidates(item))
    assert found.flips
    assert found.margin == 1.0
    assert {(w.side, w.text) for w in found.words} == {("rejected", "wine"), ("chosen", "bad")}


def test_a_verdict_that_no_deletion_changes_is_not_flipped():
    item = pair("q", "a b", "c")
    item.chosen[-1]["best"] = True
    constant = count_words(lambda talk: 1.0 if talk[-1].get("best") else 0.0)
    assert find_counterfactual(constant, item, 0.0, candidates(item)) is None
    assert find_counterfactual(constant, item, 1.0, candidates(item)) is None
    long = pair("q", "wine wine wine", "bad")
    words = words_of_last_message(long.chosen, "chosen")
    limited = find_counterfactual(count_words(sentiment), long, 17.0, words, max_words=2)
    assert not limited.flips
    assert (len(limited.words), limited.margin) == (2, 7.0)


def test_words_are_tried_in_the_order_of_their_attributions(decoder_path):
    reward = LearnedReward.load(decoder_path)
    options = AttributionSpec(methods=["gradient_x_input"], prefix_points=0, other_prompts=0)
    explained = RewardExplainer(reward, options).explain_pairs(PAIRS).pairs
    for item, found in zip(PAIRS, explained, strict=True):
        edit = found.counterfactual
        assert edit is not None
        shortened = [
            without_words(talk, [w for w in edit.words if w.side == side])
            for side, talk in (("chosen", item.chosen), ("rejected", item.rejected))
        ]
        chosen, rejected = reward.score(shortened).values
        assert chosen - rejected == pytest.approx(edit.margin, abs=1e-5)
        assert edit.flips == (edit.margin * found.margin < 0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_pair_is_its_own_nearest_neighbor_and_its_swap_is_opposite(
    kind, decoder_path, encoder_path
):
    reward = LearnedReward.load(decoder_path if kind == "decoder" else encoder_path)
    swapped = pair("the fox?", "no lazy dog 1 2 3", "yes the quick fox")
    index = TrainingPairIndex(reward, [PAIRS[1], swapped, PAIRS[0], PAIRS[2]])
    nearest = index.nearest(PAIRS[0], 10)
    assert [n.index for n in (nearest[0], nearest[-1])] == [2, 1]
    assert nearest[0].similarity == pytest.approx(1.0, abs=1e-5)
    assert nearest[-1].similarity == pytest.approx(-1.0, abs=1e-5)
    chosen, rejected = reward.score([PAIRS[0].chosen, PAIRS[0].rejected]).values
    assert nearest[0].margin == pytest.approx(chosen - rejected, abs=1e-5)
    assert nearest[0].chosen == "yes the quick fox"
    assert len(index.nearest(PAIRS[0], 2)) == 2


def test_hidden_states_times_the_head_are_the_logits(decoder_path):
    reward = LearnedReward.load(decoder_path)
    texts = [reward.encode(pair.chosen) for pair in PAIRS]
    logits = reward.model.score(head_inputs(reward, texts))
    torch.testing.assert_close(logits, reward.logits_of_token_ids(texts))


def test_training_pairs_without_scores_are_refused():
    reward, _ = linear_reward()
    refused = pair("q", "a", "b")
    reward.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="can score none of the pairs"):
        TrainingPairIndex(reward, [refused])


def test_word_positions_are_those_of_the_content():
    word = words_of_last_message([{"role": "assistant", "content": "  a bc"}], "text")[1]
    assert word == Word("text", 4, 6, "bc")


def test_a_token_with_characters_of_the_template_belongs_to_its_word():
    # The token "x\n" is the last character of a message and the line break of the template.
    reward, _ = linear_reward()
    state = json.loads(reward.tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"]["use_regex"] = False
    state["model"]["vocab"]["xĊ"] = len(reward.tokenizer)
    state["model"]["merges"].insert(0, ["x", "Ċ"])
    core = Tokenizer.from_str(json.dumps(state))
    reward.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    reward.sidecar = dataclasses.replace(reward.sidecar, append_eos=False)
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    talk = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": " lazy fox"}]
    encoded = encode_with_parts(reward, talk, num_prompt_messages=1)
    assert encoded.tokens[-1] == "x\n"
    assert encoded.parts[-1] == "reply"
    values = [float(len(token.strip())) for token in encoded.tokens]
    assert word_attributions(words_of_last_message(talk, "chosen"), talk, encoded, values) == [
        4.0,
        3.0,
    ]
