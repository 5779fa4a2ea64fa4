"""What the numbers of a reward report mean, in sentences; and the report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_SAME = 1e-3  # standard deviations that a score may move with its company: float32 stays far below
_FLAT = 0.1  # share of the spread that must lie within prompts for a policy to learn from it


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Plain findings, the gravest first. A claim is made only where an interval supports it."""
    accuracy, data = report["accuracy"], report["data"]
    if not _known(accuracy):
        return ["All pairs share one prompt: what holds for others cannot be told from them."]
    lines = []
    if report["scores"]["std"] == 0:
        lines.append("All scores are equal: it tells no reply from another.")
    if not accuracy["low"] > 0.5:
        lines.append(
            "No better than a coin: it picks the wrong reply more often than not."
            if accuracy["high"] < 0.5
            else "Cannot be told from a coin on these pairs."
        )
    lines += _against_baselines(report["baselines"])
    lines += _about_length(report)
    lines += _about_calibration(report)
    lines += _about_invariance(report["invariance"])
    lines += _about_stress(report["stress"])
    lines += _about_policy(report)
    if data["prompts_in_training"]:
        lines.append(
            f"{data['prompts_in_training']} of {data['prompts']} prompts stand in the training "
            "pairs too: accuracy on new prompts may be lower."
        )
    if data["contradictions"]:
        lines.append(f"{data['contradictions']} pairs stand there both ways round.")
    if data["unscored"]:
        share = data["unscored"] / data["pairs"]
        lines.append(
            f"{data['unscored']} pairs ({share:.1%}) could not be scored and are left out."
        )
    if data["ties"] > 0.02 * data["pairs"]:
        lines.append(f"{data['ties']} pairs are exact ties: the score is too coarse.")
    if data["prompts"] < 100:
        lines.append(f"Only {data['prompts']} prompts: every interval here is wide.")
    return lines or ["Nothing here speaks against this reward."]


def _known(interval: Mapping[str, Any]) -> bool:
    """Whether there is an interval; its ends are None or nan where there is none."""
    low = interval["low"]
    return low is not None and math.isfinite(low)


def _against_baselines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    judged = {name: b for name, b in found.items() if _known(b["gain"])}
    beaten = [name for name, b in judged.items() if b["gain"]["low"] > 0]
    lines = [
        f'Too few prompts to compare it with "{name}".' for name in found if name not in judged
    ]
    for name, baseline in judged.items():
        gain = baseline["gain"]
        if gain["high"] < 0:
            lines.append(f'Worse than "{name}" ({_percent(baseline["accuracy"])}).')
        elif not gain["low"] > 0:
            lines.append(f'No better than "{name}" ({_percent(baseline["accuracy"])}).')
    if beaten:
        lines.append("Better than " + ", ".join(f'"{name}"' for name in beaten) + ".")
    return lines


def _about_length(report: Mapping[str, Any]) -> list[str]:
    rho, matched = report["length"]["spearman"], report["length"]["matched_accuracy"]
    ends = report["length"].get("spearman_interval")
    lines = []
    # None: all lengths are equal, or there are too few prompts for an interval.
    if rho is not None and abs(rho) > 0.3 and ends and _known(ends):
        direction = "longer" if rho > 0 else "shorter"
        if ends["low"] > 0 or ends["high"] < 0:
            lines.append(
                f"Leans on length: {direction} replies score higher (rank correlation {rho:.2f} "
                f"[{ends['low']:.2f}, {ends['high']:.2f}])."
            )
    if matched is not None and matched["groups"] >= 30 and not matched["low"] > 0.5:
        lines.append("Among replies of equal length it cannot be told from a coin.")
    return lines


def _about_calibration(report: Mapping[str, Any]) -> list[str]:
    found = report["calibration"]
    fitted, given = found["fitted"]["temperature"], found["as_given"]["temperature"]
    if fitted is None or fitted == math.inf:
        sure = report["scores"]["std"] == 0 or report["accuracy"]["high"] < 0.5
        return ["No temperature makes its margins informative."] if sure else []
    ends = found["temperature"]  # None: no temperature is too small for pairs that are all right
    if ends is None:
        return []
    low, high = (math.inf if end is None else end for end in (ends["low"], ends["high"]))
    ratio = fitted / given
    if ratio > 1.5 and given < low <= fitted:
        return [f"Overconfident: its margins are {ratio:.1f} times what the labels support."]
    if ratio < 1 / 1.5 and high < given:
        return [f"Underconfident: its margins could be {1 / ratio:.1f} times as large."]
    return []


def _about_invariance(found: Mapping[str, Any] | None) -> list[str]:
    # None: no text was compared, or the scores have no spread to measure a change by.
    if found is None or found["share"] is None or not found["share"] > _SAME:
        return []
    worst = max(("batch", "order", "padding"), key=lambda kind: found[kind])
    what = {"batch": "the batch", "order": "its place in the batch", "padding": "padding"}[worst]
    return [f"Scores depend on {what}: by up to {found['share']:.2g} std for the same text."]


def _about_policy(report: Mapping[str, Any]) -> list[str]:
    lines = []
    policy, chosen = report.get("policy"), report.get("best_of_n")
    if policy and policy["std"] and policy["within_prompt_std"] < _FLAT * policy["std"]:
        lines.append(
            "Hardly tells a policy's replies to one prompt apart (within a prompt "
            f"{policy['within_prompt_std'] / policy['std']:.0%} of the overall spread): there is "
            "little to learn from."
        )
    if chosen:
        first, last = chosen["gold"][0]["mean"], chosen["gold"][-1]["mean"]
        lines.append(
            f"Choosing the best of {chosen['ns'][-1]} by it {_gold_words(chosen)} from "
            f"{first:.3g} to {last:.3g}; {chosen['advice']}."
        )
    return lines


def _gold_words(chosen: Mapping[str, Any]) -> str:
    """Whether gold rises over the same prompts, as far as its interval tells."""
    gain = chosen.get("gain")  # reports of 0.1.0 have none
    if gain and _known(gain) and (gain["low"] > 0 or gain["high"] < 0):
        return "raises gold" if gain["low"] > 0 else "lowers gold"
    return "does not clearly change gold:"


def _about_stress(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, result in found.items():
        if result["passed"] is False:
            verb = "does not lower" if result["expect"] == "fall" else "raises"
            change = result["change"]["value"]
            lines.append(f'Stress test "{name}" {verb} the score ({change:+.2f} std).')
    return lines


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown page: verdict first, then one table per measurement."""
    data, length = report["data"], report["length"]
    parts = [
        f"# Reward report: {report['reward']}",
        "## Verdict\n\n" + "\n".join(f"- {line}" for line in report["verdict"]),
        f"## Accuracy\n\n{_percent(report['accuracy'])} on {data['pairs']} pairs of "
        f"{data['prompts']} prompts; {data['ties']} ties (counted half), "
        f"{data['unscored']} unscored (left out).",
        _table(
            ["baseline", "its accuracy", "gain over it"],
            [
                [name, _percent(b["accuracy"]), _percent(b["gain"])]
                for name, b in report["baselines"].items()
            ],
        ),
        "## By size of the margin\n\n" + _quantile_table(report["by_margin"]),
        "## By length gap (chosen minus rejected, characters)\n\n"
        + _quantile_table(report["by_length_gap"]),
    ]
    if report["by_source"]:
        rows = [[name, str(i["n"]), _percent(i)] for name, i in report["by_source"].items()]
        parts.append("## By source\n\n" + _table(["source", "pairs", "accuracy"], rows))
    parts += [
        "## Calibration\n\n" + _calibration_table(report["calibration"]),
        "## Length\n\n"
        f"Rank correlation of score and length {_correlation(length)}; accuracy where "
        f"lengths differ by at most 10%: {_percent(length['matched_accuracy'])}.",
    ]
    if report["invariance"]:
        found = report["invariance"]
        rows = [[kind, f"{found[kind]:.2g}"] for kind in ("batch", "order", "padding")]
        head = ["company", "largest change of a score"]
        parts.append(f"## Invariance\n\n{found['texts']} texts.\n\n" + _table(head, rows))
    if report["stress"]:
        rows = [
            [name, s["expect"], _interval(s["change"]), f"{s['fell']:.0%}", _mark(s["passed"])]
            for name, s in report["stress"].items()
        ]
        head = ["change to the chosen reply", "should", "score change (std)", "fell", "passed"]
        parts.append("## Stress tests\n\n" + _table(head, rows))
    if report["policy"]:
        policy = report["policy"]
        parts.append(
            f"## On the policy's own replies\n\nMean {_number(policy['mean'])}, standard deviation "
            f"{_number(policy['std'])}, within a prompt {_number(policy['within_prompt_std'])}."
        )
    if chosen := report.get("best_of_n"):
        parts.append("## Best of n\n\n" + _best_of_n_table(chosen))
    parts.append("## Data\n\n" + _table(["what", "how many"], data_rows(data)))
    return "\n\n".join(parts) + "\n"


def data_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """The data card as rows of (what, how many); what is unknown is left out."""
    known = {
        "pairs": data["pairs"],
        "prompts": data["prompts"],
        "exact ties of the score": data["ties"],
        "unscored pairs": data["unscored"],
        "duplicate pairs": data["duplicates"],
        "pairs that another contradicts": data["contradictions"],
        "training pairs": data["training_pairs"],
        "prompts that stand in the training pairs": data["prompts_in_training"],
        "prompts that share 13 words with them": data.get("overlapping"),
        **{f"left out: {reason}": count for reason, count in data["dropped"].items()},
        **{f"event: {name}": count for name, count in data["counts"].items()},
        **{f"from {name}": count for name, count in data["sources"].items()},
        **{f"median characters, {k}": v for k, v in data["median_characters"].items()},
    }
    return [[name, f"{value:,.0f}"] for name, value in known.items() if value is not None]


def _best_of_n_table(chosen: Mapping[str, Any]) -> str:
    rows = [
        [str(n), f"{kl:.2f}", _number(proxy["mean"]), _bounds(gold)]
        for n, kl, proxy, gold in zip(
            chosen["ns"], chosen["kl"], chosen["proxy_score"], chosen["gold"], strict=True
        )
    ]
    return _table(["n", "KL (nats)", "this reward (std)", "gold"], rows)


def _bounds(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return _number(found["mean"])
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _quantile_table(rows: list[Mapping[str, Any]]) -> str:
    cells = [
        [
            f"{_number(r['from'])} to {_number(r['to'])}",
            str(r["accuracy"]["n"]),
            _percent(r["accuracy"]),
        ]
        for r in rows
    ]
    return _table(["range", "pairs", "accuracy"], cells)


def _calibration_table(found: Mapping[str, Any]) -> str:
    rows = [
        [name, *(_number(found[key][column]) for column in ("temperature", "nll", "brier", "ece"))]
        for name, key in (("as given", "as_given"), ("fitted", "fitted"))
    ]
    return _table(["temperature", "value", "NLL (coin 0.693)", "Brier (coin 0.25)", "ECE"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def _percent(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["value"] is None:
        return "unknown"
    if not _known(interval):
        return f"{interval['value']:.1%} (too few prompts for an interval)"
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def _interval(interval: Mapping[str, Any]) -> str:
    if not _known(interval):
        return _number(interval["value"])
    return f"{interval['value']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]"


def _correlation(length: Mapping[str, Any]) -> str:
    ends = length.get("spearman_interval")  # reports of 0.1.0 have none
    text = _number(length["spearman"], 2)
    return f"{text} [{ends['low']:.2f}, {ends['high']:.2f}]" if ends and _known(ends) else text


def _mark(passed: bool | None) -> str:
    return {True: "yes", False: "no", None: "undecided"}[passed]
