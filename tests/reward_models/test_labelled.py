"""Metrics on labeled texts: hand-worked numbers, sklearn as oracle, coverage of intervals."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from rlhf.reward_models.report import labeled
from rlhf.reward_models.report.markdown import labeled_report_markdown


def test_measures_by_hand():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0], [5.0, 4.5]])
    labels = np.array([0, 1, 0, 1])
    assert labeled.correctness_indicators(scores, labels).tolist() == [1, 1, 0, 0]
    # each class: precision 1/2, recall 1/2
    assert labeled.macro_f1(scores, labels) == pytest.approx(0.5)
    # class 1 leads by 1 and -0.5 where the label is 1, by -1 and 1 where it is 0: two couples
    # won, one tied, one lost; class 0 mirrors it
    assert labeled.macro_auc(scores, labels) == pytest.approx(2.5 / 4)
    assert labeled.rmse(np.array([1.0, 3.0]), np.array([1.0, 1.0])) == pytest.approx(2**0.5)
    assert labeled.spearman(np.array([1.0, 2, 9]), np.array([0.0, 5, 6])) == pytest.approx(1.0)


def test_a_class_that_does_not_occur_has_no_f1():
    right = np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [3.0, 0.0, 0.0]])
    assert labeled.macro_f1(right, np.array([0, 1, 0])) == 1.0
    # class 2 is predicted once: F1 of 2/3, 1 and 0
    wrong = np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    assert labeled.macro_f1(wrong, np.array([0, 1, 0])) == pytest.approx(5 / 9)


@pytest.mark.parametrize("seed", range(3))
def test_measures_agree_with_sklearn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size=200)
    scores = rng.normal(size=(200, 3)) + np.eye(3)[labels]
    expected = f1_score(labels, scores.argmax(1), average="macro")
    assert labeled.macro_f1(scores, labels) == pytest.approx(expected)
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = roc_auc_score(labels, share, average="macro", multi_class="ovr")
    assert labeled.macro_auc(scores, labels) == pytest.approx(expected)
    assert labeled.macro_auc(scores + rng.normal(size=(200, 1)), labels) == pytest.approx(expected)


def test_a_column_of_zeros_beside_the_log_odds_changes_no_auc():
    odds, labels = np.array([3.0, 1.0, 2.0, 0.0]), np.array([1, 1, 0, 0])
    both = np.stack([np.zeros(4), odds], 1)
    assert labeled.macro_auc(both, labels) == pytest.approx(roc_auc_score(labels, odds)) == 0.75


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        labels = rng.integers(0, 2, size=150)
        right = rng.random(150) < 0.8
        chosen = np.where(right, labels, 1 - labels)
        found = labeled.labeled_report(
            labeled.CLASS_MEASURES, np.eye(2)[chosen], labels, baselines={}
        )
        accuracy = found["metrics"]["accuracy"]
        held += accuracy["low"] <= 0.8 <= accuracy["high"]
    assert 88 <= held <= 100


def test_the_gain_is_paired():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, size=400)
    ours = np.eye(2)[np.where(rng.random(400) < 0.7, labels, 1 - labels)]
    theirs = ours.copy()
    theirs[:10] = np.eye(2)[1 - labels[:10]]  # the same but for ten rows
    gain = labeled.labeled_report(labeled.CLASS_MEASURES, ours, labels, baselines={"them": theirs})[
        "gains"
    ]["them"]
    spread = gain["accuracy"]["high"] - gain["accuracy"]["low"]
    lost = np.mean(ours[:10].argmax(1) == labels[:10])
    assert gain["accuracy"]["mean"] == pytest.approx(10 * lost / 400)
    assert spread < 0.04  # two unpaired intervals of this size are 0.09 wide each


def test_bag_of_words_baseline_learns_words():
    texts = [f"{'good' if i % 2 else 'bad'} film {i}" for i in range(80)]
    found = labeled.class_logprobs_from_words(
        texts, [i % 2 for i in range(80)], texts[:10], num_classes=3
    )
    assert found[:, :2].argmax(1).tolist() == [i % 2 for i in range(10)]
    assert np.isneginf(found[:, 2]).all()  # a class that training never saw
    rated = labeled.predict_ratings_from_words(texts, [float(i % 2) for i in range(80)], texts[:2])
    assert rated[1] - rated[0] > 0.5


def test_labeled_page_has_a_row_for_each_baseline():
    scores, labels = np.eye(2)[[0, 1, 1]], np.array([0, 1, 0])
    report = labeled.labeled_report(
        labeled.CLASS_MEASURES, scores, labels, baselines={"coin": scores[::-1]}
    )
    page = labeled_report_markdown("mine", report)
    assert "| this model | 0.667" in page
    assert "| coin |" in page
    assert "| gain over coin |" in page
