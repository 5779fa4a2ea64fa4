"""Bags of words on texts with few words or none."""

import math

import numpy as np
import pytest

from rlhf.data.suspects import cross_fitted_margins
from rlhf.reward_models.pairs import Pair
from rlhf.reward_models.report.baselines import bag_of_words_margins
from rlhf.reward_models.report.labeled import class_logprobs_from_words, predict_ratings_from_words
from rlhf.reward_models.words import fit_tfidf


def pair(index: int, chosen: str, rejected: str) -> Pair:
    prompt = [{"role": "user", "content": f"question {index}"}]

    def said(text: str) -> list[dict[str, str]]:
        return [*prompt, {"role": "assistant", "content": text}]

    return Pair(prompt, said(chosen), said(rejected))


@pytest.mark.parametrize(("good", "bad"), [("a", "b"), ("👍", "👎"), ("!", "?")])
def test_single_character_replies_are_distinguished(good, bad):
    pairs = [pair(i, good, bad) for i in range(20)]
    assert (bag_of_words_margins(pairs) > 0).all()
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen[-1:], "rejected": p.rejected[-1:]} for p in pairs
    ]
    assert cross_fitted_margins(rows, seed=0).accuracy == 1.0
    texts, labels = [good, bad] * 10, [1, 0] * 10
    found = class_logprobs_from_words(texts, labels, [good, bad], num_classes=2)
    assert found.argmax(1).tolist() == [1, 0]
    rated = predict_ratings_from_words(texts, [3.0, 1.0] * 10, [good, bad])
    assert rated[0] > rated[1]


def test_texts_without_words_give_no_features():
    assert fit_tfidf(["", " ", "\n"]) is None
    assert (bag_of_words_margins([pair(i, "", " ") for i in range(8)]) == 0).all()
    assert predict_ratings_from_words(["", " "], [1.0, 3.0], [""]) == pytest.approx([2.0])


def test_words_that_occur_once_do_not_stop_the_search_for_suspects():
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "chosen": [{"role": "assistant", "content": f"yes{i}"}],
            "rejected": [{"role": "assistant", "content": f"no{i}"}],
        }
        for i in range(10)
    ]
    assert cross_fitted_margins(rows, seed=0).margin.tolist() == [0.0] * 10


def test_one_class_is_certain():
    found = class_logprobs_from_words(["good", "fine"], [1, 1], ["other"], num_classes=2)
    assert found.tolist() == [[-math.inf, 0.0]]
    assert np.exp(found).sum() == 1
