"""Settings and rows for a short training of each kind of reward model."""

from tests.helpers.training import WORDS, assistant, pair_rows, user


def labeled_texts(count=32):
    return [{"text": f"{w} {i}", "label": int(w == "apple")} for i in range(count) for w in
            (("apple", "river")[i % 2],)]  # fmt: skip


def with_columns(rows, make):
    return [row | make(i) for i, row in enumerate(rows)]


def ranking_rows(**more):
    return [
        {"prompt": row["prompt"], "replies": [row["chosen"], row["rejected"], assistant("x")]}
        | more
        for row in pair_rows()
    ]


def step_rows():
    return [
        {"prompt": user(f"solve {i}"), "steps": [f"apple {i}", "river"], "labels": [1, i % 2]}
        for i in range(32)
    ]


def rated_rows():
    return [
        {"text": f"{WORDS[i % 4]} {i}", "good": i % 4 / 2, "long": None if i % 3 else 1.0}
        for i in range(32)
    ]


def flagged_rows():
    return [{"text": f"{WORDS[i % 4]} {i}", "a": i % 2, "b": i % 4 // 2} for i in range(32)]


def three_classes():
    return [{"text": f"{WORDS[i % 3]} {i}", "label": i % 3} for i in range(32)]


MARGIN = with_columns(pair_rows(), lambda i: {"margin": 1.0 + i % 2})
UNSAFE = with_columns(pair_rows(), lambda i: {"chosen_unsafe": i % 4 == 0, "rejected_unsafe": 1})

REWARD_RUNS = {
    "preference": ({}, pair_rows()),
    "heads": ({"kind": "preference", "num_heads": 3}, pair_rows()),
    "smoothed": ({"flip_rate": 0.1, "margins": True}, MARGIN),
    "unbiased": ({"flip_rate": 0.1}, pair_rows()),
    "scaled": ({}, MARGIN),
    "length_debiased": ({"micro_batch_size": 8}, pair_rows()),
    "cost": ({}, UNSAFE),
    "ranking": ({}, ranking_rows()),
    "best_of": ({}, ranking_rows(best=1)),
    "pairwise": ({}, pair_rows()),
    "regression": ({"labels": ["good", "long"]}, rated_rows()),
    "classification": ({}, labeled_texts(32)),
    "classes": ({"kind": "classification", "labels": ["a", "b", "c"]}, three_classes()),
    "multilabel": ({"labels": ["a", "b"]}, flagged_rows()),
    "process": ({}, step_rows()),
}
