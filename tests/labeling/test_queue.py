"""The order of the items, and the items that check the annotator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.errors import UserError
from rlhf.labeling.items import LabelItem, read_check_items, read_items
from rlhf.labeling.page import task_json
from rlhf.labeling.queue import (
    ensemble_members,
    insert_check_items,
    margin_disagreement,
    order_items,
)
from rlhf.reward_models import PerConversationReward
from rlhf.reward_models.ensemble import Ensemble
from tests.labeling.helpers import lines, open_session, pair_rows, submission


def items_of(folder: Path, rows: list[dict], mode="pairs") -> list[LabelItem]:
    write_jsonl(folder / "rows.jsonl", rows)
    return read_items([DataSpec(str(folder / "rows.jsonl"))], mode)


def word_reward(name: str, scores: dict[str, float]) -> PerConversationReward:
    """A reward that looks up the last word of the reply."""
    return PerConversationReward(lambda c: scores[c[-1]["content"].split()[-1]], name=name)


def no_rewards() -> list:
    raise AssertionError("this order needs no rewards")


def test_disagreement_equals_a_hand_worked_table(tmp_path: Path):
    rows = [{"prompt": f"Q{i}", "chosen": f"x{i}", "rejected": f"y{i}"} for i in range(3)]
    items = items_of(tmp_path, rows)
    # Margins x - y: 1, 1, 2 and 10, -10, 20. Root mean squares: sqrt(2) and 10 sqrt(2).
    first = {"x0": 1, "y0": 0, "x1": 1, "y1": 0, "x2": 2, "y2": 0}
    second = {"x0": 10, "y0": 0, "x1": 0, "y1": 10, "x2": 20, "y2": 0}
    members = ensemble_members([word_reward("a", first), word_reward("b", second)])
    spread = margin_disagreement(items, members)
    # Scaled margins: 1/sqrt(2) twice; 1/sqrt(2) and -1/sqrt(2); sqrt(2) twice.
    assert spread == pytest.approx([0, 1 / np.sqrt(2), 0], abs=1e-12)
    rewards = [word_reward("a", first), word_reward("b", second)]
    ordered = order_items(items, "disagreement", seed=0, load_rewards=lambda: rewards)
    assert [item.prompt[0]["content"] for item in ordered] == ["Q1", "Q0", "Q2"]
    ensemble = Ensemble(rewards)
    same = order_items(items, "disagreement", seed=0, load_rewards=lambda: [ensemble])
    assert same == ordered


def test_items_without_a_score_come_last(tmp_path: Path):
    items = items_of(tmp_path, pair_rows(3))
    table = {"0": None, "1": 1.0, "2": 2.0}
    rewards = [
        PerConversationReward(lambda c: table[c[-1]["content"][-1]], name="a"),
        PerConversationReward(lambda c: float(len(c[-1]["content"])), name="b"),
    ]
    ordered = order_items(items, "disagreement", seed=0, load_rewards=lambda: rewards)
    assert ordered[-1].prompt[0]["content"] == "Question 0?"


def test_one_reward_is_no_ensemble():
    with pytest.raises(UserError, match="at least two members"):
        ensemble_members([word_reward("a", {})])


def test_suspicion_puts_wrong_labels_first(tmp_path: Path):
    rows = [
        {
            "prompt": f"Question {i}?",
            "chosen": f"thanks, a kind answer {i}",
            "rejected": f"no, a rude answer {i}",
        }
        for i in range(60)
    ]
    wrong = {7, 23, 41}
    for i in wrong:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    ordered = order_items(items_of(tmp_path, rows), "suspicion", seed=0, load_rewards=no_rewards)
    assert {item.prompt[0]["content"] for item in ordered[:3]} == {f"Question {i}?" for i in wrong}


def test_suspicion_needs_labels_and_pairs(tmp_path: Path):
    unlabeled = [{"prompt": f"Q{i}", "response_a": "x", "response_b": "y"} for i in range(30)]
    for rows, message in (
        (unlabeled, "needs pairs with labels"),
        (pair_rows(5), "needs at least 20 pairs"),
    ):
        with pytest.raises(UserError, match=message):
            order_items(items_of(tmp_path, rows), "suspicion", seed=0, load_rewards=no_rewards)


def test_the_random_order_is_that_of_its_seed(tmp_path: Path):
    items = items_of(tmp_path, pair_rows(30))
    orders = [order_items(items, "random", seed=s, load_rewards=no_rewards) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0], key=items.index) == items


def test_checks_are_spread_and_are_not_repeated(tmp_path: Path):
    items = items_of(tmp_path, pair_rows(95))
    write_jsonl(tmp_path / "gold.jsonl", pair_rows(105)[90:])  # five are ordinary items too
    checks = read_check_items([DataSpec(str(tmp_path / "gold.jsonl"))])
    queue = insert_check_items(items, checks, every=10, seed="0")
    places = [place for place, item in enumerate(queue) if item.is_check]
    assert [place // 10 for place in places] == list(range(10))  # 90 items: ten blocks of nine
    assert len({place % 10 for place in places}) > 3
    assert len({item.item_id for item in queue}) == len(queue) == 100


def test_the_label_of_a_check_states_the_known_answer(tmp_path: Path):
    session = open_session(tmp_path)
    write_jsonl(tmp_path / "gold.jsonl", pair_rows(1))
    (check,) = read_check_items([DataSpec(str(tmp_path / "gold.jsonl"))])
    session._items = {check.item_id: check}
    task = session.next_task()

    assert "gold" not in json.dumps(task_json(task))
    place = task.reply_order.index(check.best)
    answer = {"choice": ("first", "second")[place], "strength": 1}

    session.submit(submission(task, answer))
    (row,) = lines(tmp_path / "labels.jsonl")
    assert row["winner"] == row["gold"]
