"""Splits have no common prompts and do not depend on the order of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.splits import fold_of_each_row, folds_by_prompt, prompt_key, split_by_prompt
from rlhf.errors import UserError


def row(prompt, number=0):
    return {"prompt": [{"role": "user", "content": prompt}], "number": number}


def bare(rows):
    """Normalized prompts, computed independently of the code under test."""
    return {" ".join(r["prompt"][-1]["content"].lower().split()) for r in rows}


prompt_lists = st.lists(st.sampled_from(["a", "A ", "b", "b  c", "B C", "d", "e", "f"]), min_size=2)


@given(prompt_lists.filter(lambda p: len({x.lower().strip() for x in p}) > 2), st.integers(0, 99))
def test_parts_are_disjoint_and_complete(prompts, seed):
    rows = [row(prompt, i) for i, prompt in enumerate(prompts)]
    train, held = split_by_prompt(rows, fraction=0.3, seed=seed)
    assert train
    assert held
    assert not bare(train) & bare(held)
    assert sorted(r["number"] for r in train + held) == list(range(len(rows)))


@given(st.randoms(use_true_random=False), st.integers(0, 99))
def test_row_order_does_not_matter(random, seed):
    rows = [row(f"p{i % 17}", i) for i in range(40)]
    moved = random.sample(rows, len(rows))
    held = [
        {r["number"] for r in split_by_prompt(order, count=11, seed=seed)[1]}
        for order in (rows, moved)
    ]
    assert held[0] == held[1]


def test_sizes_are_exact_where_prompts_are_single():
    rows = [row(f"p{i}") for i in range(50)]
    assert len(split_by_prompt(rows, fraction=0.1, seed=0)[1]) == 5
    assert len(split_by_prompt(rows, count=7, seed=0)[1]) == 7
    assert len(split_by_prompt(rows, fraction=0.001, seed=0)[1]) == 1


def test_seed_changes_the_choice_and_parts_keep_the_order():
    rows = [row(f"p{i}", i) for i in range(50)]
    first, second = (split_by_prompt(rows, count=10, seed=s)[1] for s in (0, 1))
    assert {r["number"] for r in first} != {r["number"] for r in second}
    assert [r["number"] for r in first] == sorted(r["number"] for r in first)


def test_a_prompt_too_large_to_hold_out_stays_in_training():
    rows = [row("big", i) for i in range(30)] + [row(f"p{i}", i) for i in range(10)]
    for seed in range(10):
        train, held = split_by_prompt(rows, count=5, seed=seed)
        assert len(held) == 5
        assert "big" not in bare(held)
        assert len(train) == 35


def test_the_smallest_prompt_is_held_out_when_none_fits():
    rows = [row("a")] * 5 + [row("b")] * 3
    assert bare(split_by_prompt(rows, count=1, seed=0)[1]) == {"b"}


def test_keys_ignore_case_space_unicode_form_and_system():
    plain = [{"role": "user", "content": "Café  olé"}]
    system = [{"role": "system", "content": "x"}]
    other = [{"role": "user", "content": "cafe\u0301\nOLÉ"}]
    assert prompt_key({"prompt": plain}) == prompt_key({"prompt": system + other})
    assert prompt_key({"prompt": plain}) != prompt_key({"prompt": plain + plain})
    assert prompt_key({"text": "A"}) == prompt_key({"text": "a "})


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_folds_hold_out_every_row_once(num_folds):
    rows = [row(f"p{i % 13}", i) for i in range(60)]
    folds = folds_by_prompt(rows, num_folds, seed=4)
    assert sorted(r["number"] for _, held in folds for r in held) == list(range(60))
    for train, held in folds:
        assert not bare(train) & bare(held)
        assert len(train) + len(held) == 60
    sizes = [len(held) for _, held in folds]
    assert max(sizes) - min(sizes) <= 5  # a prompt has at most five rows


def test_folds_do_not_depend_on_the_order():
    rows = [row(f"p{i % 13}", i) for i in range(60)]
    forward, backward = fold_of_each_row(rows, 4, seed=0), fold_of_each_row(rows[::-1], 4, seed=0)
    assert forward == backward[::-1]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "either fraction or count"),
        ({"fraction": 0.5, "count": 1}, "either fraction or count"),
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"count": 3}, "between 1 and 2"),
        ({"count": 0}, "between 1 and 2"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(UserError, match=message):
        split_by_prompt([row("a"), row("b"), row("c")], **size, seed=0)


def test_one_prompt_cannot_be_split():
    with pytest.raises(UserError, match="1 distinct prompt"):
        split_by_prompt([row("a"), row("A")], fraction=0.5, seed=0)
    with pytest.raises(UserError, match="between 2 and"):
        folds_by_prompt([row("a"), row("b")], 3, seed=0)
