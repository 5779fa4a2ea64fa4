"""Sentences of a reward report that depend on an interval."""

import pytest

from rlhf.reward_models.report.findings import _calibration_findings, _policy_findings


def calibrated(fitted: float | None, low: float | None, high: float | None) -> dict:
    return {
        "accuracy": {"value": 0.6, "low": 0.4, "high": 0.8},
        "scores": {"std": 1.0},
        "calibration": {
            "as_given": {"temperature": 1.0},
            "fitted": {"temperature": fitted},
            "temperature": {"value": fitted, "low": low, "high": high},
        },
    }


@pytest.mark.parametrize(
    ("fitted", "low", "high", "word"),
    [
        (3.0, 1.2, 9.0, "Overconfident"),
        (3.0, 1.2, None, "Overconfident"),  # None: beyond every bound
        (3.0, 0.8, 9.0, ""),
        (0.3, 0.1, 0.8, "Underconfident"),
        (0.3, 0.1, 1.4, ""),
        (None, 1.1, None, ""),
    ],
)
def test_confidence_is_judged_by_the_interval_of_the_temperature(fitted, low, high, word):
    lines = _calibration_findings(calibrated(fitted, low, high))
    assert [line.split(":")[0] for line in lines] == ([word] if word else [])


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ({"low": 0.1, "high": 0.5}, "by this reward raises the gold score from 1 to 1.3"),
        ({"low": -0.5, "high": -0.1}, "by this reward lowers the gold score from 1 to 1.3"),
        ({"low": -0.1, "high": 0.5}, "does not significantly change the gold score: from 1 to 1.3"),
        ({"low": None, "high": None}, "does not significantly change the gold score"),
        (None, "does not significantly change the gold score"),
    ],
)
def test_the_best_of_n_is_judged_by_its_paired_gain(gain, words):
    chosen = {"gold": [{"mean": 1.0}, {"mean": 1.3}], "ns": [1, 8], "gain": gain, "advice": "stop"}
    (line,) = _policy_findings({"best_of_n": chosen})
    assert words in line
