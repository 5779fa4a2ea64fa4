"""Write the findings of a report on pairs as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.reward_models.report.markdown import has_interval, percent_with_interval

# Largest acceptable change of a score due to batching, in standard deviations of the scores. The
# rounding errors of float32 are far smaller.
_MAX_CHANGE = 1e-3
# A finding is reported if the standard deviation of scores within a prompt, divided by the overall
# standard deviation, is below this number.
_MIN_SPREAD = 0.1


def finding_sentences(report: Mapping[str, Any]) -> list[str]:
    """Return the findings of a report in a fixed order; without findings, a sentence that says so.

    Findings about accuracies, gains, correlations and the temperature are based on intervals, not
    only on estimates. If all pairs have the same prompt, only this fact and the number of unscored
    pairs are reported.
    """
    accuracy, data = report["accuracy"], report["data"]
    if not has_interval(accuracy):
        same = "All scored pairs have the same prompt, so there is no estimate for other prompts."
        return [same, *_unscored_findings(data)]
    lines = []
    if report["scores"]["std"] == 0:
        lines.append("All scores are equal: the reward does not distinguish replies.")
    if not accuracy["low"] > 0.5:
        lines.append(
            "Accuracy is below chance: most rejected replies score higher than the chosen ones."
            if accuracy["high"] < 0.5
            else "Accuracy is not significantly above chance on these pairs."
        )
    lines += _baseline_findings(report["baselines"])
    lines += _length_findings(report)
    lines += _calibration_findings(report)
    lines += _invariance_findings(report["invariance"])
    lines += _stress_test_findings(report["stress"])
    lines += _policy_findings(report)
    if data["prompts_in_training"]:
        lines.append(
            f"{data['prompts_in_training']} of {data['prompts']} prompts are also in the training "
            "pairs, so the accuracy on new prompts may be lower."
        )
    if data["contradictions"]:
        lines.append(
            f"{data['contradictions']} pairs also occur with chosen and rejected exchanged."
        )
    lines += _unscored_findings(data)
    if data["ties"] > 0.02 * data["pairs"]:
        lines.append(
            f"{data['ties']} pairs have equal scores for both replies: the score is too coarse."
        )
    if data["prompts"] < 100:
        lines.append(f"Only {data['prompts']} prompts: every interval is wide.")
    return lines or ["No problem was found."]


def _unscored_findings(data: Mapping[str, Any]) -> list[str]:
    if not data["unscored"]:
        return []
    share = data["unscored"] / data["pairs"]
    return [f"{data['unscored']} pairs ({share:.1%}) could not be scored and are omitted."]


def _baseline_findings(baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    compared = {name: b for name, b in baselines.items() if has_interval(b["gain"])}
    beaten = [name for name, b in compared.items() if b["gain"]["low"] > 0]
    missing = [name for name in baselines if name not in compared]
    lines = [
        f'There are too few prompts to compare the reward with the baseline "{name}".'
        for name in missing
    ]
    for name, baseline in compared.items():
        gain = baseline["gain"]
        if gain["high"] < 0:
            lines.append(f'Worse than "{name}" ({percent_with_interval(baseline["accuracy"])}).')
        elif not gain["low"] > 0:
            lines.append(
                f'No better than "{name}" ({percent_with_interval(baseline["accuracy"])}).'
            )
    if beaten:
        lines.append("Better than " + ", ".join(f'"{name}"' for name in beaten) + ".")
    return lines


def _length_findings(report: Mapping[str, Any]) -> list[str]:
    rho, matched = report["length"]["spearman"], report["length"]["matched_accuracy"]
    ends = report["length"].get("spearman_interval")
    lines = []
    # The correlation is None if all lengths or all scores are equal.
    if rho is not None and abs(rho) > 0.3 and ends and has_interval(ends):
        direction = "longer" if rho > 0 else "shorter"
        if ends["low"] > 0 or ends["high"] < 0:
            lines.append(
                f"Depends on length: {direction} replies score higher (rank correlation {rho:.2f} "
                f"[{ends['low']:.2f}, {ends['high']:.2f}])."
            )
    if matched is not None and matched["groups"] >= 30 and not matched["low"] > 0.5:
        lines.append(
            "Accuracy is not significantly above chance on pairs of replies whose lengths differ "
            "by at most 10%."
        )
    return lines


def _calibration_findings(report: Mapping[str, Any]) -> list[str]:
    calibration = report["calibration"]
    fitted, current = (calibration[key]["temperature"] for key in ("fitted", "as_given"))
    if fitted is None or fitted == math.inf:
        sure = report["scores"]["std"] == 0 or report["accuracy"]["high"] < 0.5
        return ["At no temperature are the probabilities better than chance."] if sure else []
    ends = calibration["temperature"]
    if ends is None:  # fewer than 20 prompts, or every pair is ordered correctly
        return []
    low, high = (math.inf if end is None else end for end in (ends["low"], ends["high"]))
    ratio = fitted / current
    if ratio > 1.5 and current < low <= fitted:
        return [f"Overconfident: the margins must be divided by {ratio:.1f} to fit the labels."]
    if ratio < 1 / 1.5 and high < current:
        return [
            f"Underconfident: the margins must be multiplied by {1 / ratio:.1f} to fit the labels."
        ]
    return []


def _invariance_findings(invariance: Mapping[str, Any] | None) -> list[str]:
    # The share is nan if no text could be scored in both ways.
    if invariance is None or invariance["share"] is None or not invariance["share"] > _MAX_CHANGE:
        return []
    worst = max(("batch", "order", "padding"), key=lambda kind: invariance[kind])
    what = {"batch": "the batch", "order": "the position in the batch", "padding": "padding"}[worst]
    change = f"{invariance['share']:.2g} standard deviations"
    if math.isinf(invariance["share"]):
        change = (
            f"{invariance['largest_difference']:.2g}, although all scores of the pairs are equal"
        )
    return [f"Scores depend on {what}: the score of a text changes by up to {change}."]


def _policy_findings(report: Mapping[str, Any]) -> list[str]:
    lines = []
    policy, best_of_n = report.get("policy"), report.get("best_of_n")
    if policy and policy["std"] and policy["within_prompt_std"] < _MIN_SPREAD * policy["std"]:
        lines.append(
            "Scores of a policy's replies to one prompt differ little (their spread is "
            f"{policy['within_prompt_std'] / policy['std']:.0%} of the overall spread): a policy "
            "can learn little from them."
        )
    if best_of_n:
        first, last = best_of_n["gold"][0]["mean"], best_of_n["gold"][-1]["mean"]
        lines.append(
            f"Choosing the best of {best_of_n['ns'][-1]} replies by this reward "
            f"{_gold_change_phrase(best_of_n)} from {first:.3g} to {last:.3g}; "
            f"{best_of_n['advice']}."
        )
    return lines


def _gold_change_phrase(best_of_n: Mapping[str, Any]) -> str:
    """Return a verb phrase that says whether the gold score changed significantly, and how."""
    gain = best_of_n.get("gain")  # reports of 0.1.0 have none
    if gain and has_interval(gain) and (gain["low"] > 0 or gain["high"] < 0):
        return "raises the gold score" if gain["low"] > 0 else "lowers the gold score"
    return "does not significantly change the gold score:"


def _stress_test_findings(tests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, result in tests.items():
        if result["passed"] is False:
            verb = "does not lower" if result["expect"] == "fall" else "raises"
            change = result["change"]["value"]
            lines.append(f'Stress test "{name}" {verb} the score ({change:+.2f} std).')
    return lines
