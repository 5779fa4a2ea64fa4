"""Create pairs and rankings from lists of scored replies and from OpenAssistant's message trees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.config.data import Kind
from rlhf.data.formats import parse_number
from rlhf.data.messages import RowDropped

Node = Mapping[str, Any]
CellsOrDropped = dict[str, Any] | RowDropped
"""The cells of a canonical row, or the reason why the row is dropped."""


def items_from_scored_replies(
    prompt: Any,
    replies: Sequence[Any],
    values: Sequence[Any],
    kind: Kind,
    *,
    values_are_ranks: bool,
) -> Iterator[CellsOrDropped]:
    """Yield the rows of `kind` for one list of scored replies.

    Depending on `kind`, the rows are the prompt, one ranking, or all pairs of replies with
    different scores. A RowDropped is yielded for each reply without a score, for each tied pair,
    and for a ranking with ties.

    Args:
        prompt: The prompt cell.
        replies: Reply cells.
        values: Score or rank of each reply.
        kind: "preference", "ranking" or "prompt".
        values_are_ranks: Whether `values` are ranks, of which the lowest is the best. Otherwise
            they are scores, and the margin of a pair is the difference of its scores.
    """
    if kind == "prompt":
        yield {"prompt": prompt}
        return
    scored = []
    for reply, value in zip(replies, values, strict=True):
        try:
            scored.append(
                (float(parse_number(value, "score")) * (-1 if values_are_ranks else 1), reply)
            )
        except RowDropped:
            yield RowDropped("reply without a score")
    scored.sort(key=lambda pair: -pair[0])
    if kind == "ranking":
        ties = len({score for score, _ in scored}) < len(scored)
        cells = {"prompt": prompt, "replies": [reply for _, reply in scored]}
        yield RowDropped("tied replies") if ties else cells
        return
    if len(scored) < 2:
        yield RowDropped("fewer than two replies")
    for (high, better), (low, worse) in itertools.combinations(scored, 2):
        margin = {} if values_are_ranks else {"margin": high - low}
        pair = {"prompt": prompt, "chosen": better, "rejected": worse, **margin}
        yield RowDropped("tie") if high == low else pair


def build_message_trees(table: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Build message trees from a table with one message per row.

    Returns:
        One object per tree: {"prompt": root}, where each message has the key `replies`. A message
        whose parent is missing is the root of {"orphan": root}. A row with an invalid or repeated
        id, or in a cycle of parents, becomes {"unread": reason}.
    """
    nodes: dict[str | int, dict[str, Any]] = {}
    trees: list[Mapping[str, Any]] = []
    for row in table:
        if not isinstance(row.get("message_id"), (str, int)):
            trees.append({"unread": "message_id is not an id"})
        elif not isinstance(row.get("parent_id"), (str, int, float, type(None))):
            trees.append({"unread": "parent_id is not an id"})
        elif row["message_id"] in nodes:
            trees.append({"unread": "message_id is repeated"})
        else:
            nodes[row["message_id"]] = {**row, "replies": []}
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent in (None, ""):
            trees.append({"prompt": node})
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            trees.append({"orphan": node})
    trees += [
        {"unread": "message in a cycle of parents"} for _ in range(_count_unreached(nodes, trees))
    ]
    return trees


def _count_unreached(nodes: Mapping[Any, Node], trees: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of messages that are in no tree, because their parents form a cycle."""
    roots = [tree.get("prompt") or tree.get("orphan") for tree in trees]
    stack = [node for node in roots if node is not None]
    reached = 0
    while stack:
        reached += 1
        stack += stack.pop()["replies"]
    return len(nodes) - reached


def items_of_message_tree(tree: Mapping[str, Any], kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the cells of the canonical rows of a message tree.

    The tree is an item of `build_message_trees` or a row of Open Assistant's tree files.

    - sft: every assistant message, with the turns before it
    - preference: for every user message, all pairs of replies with different ranks (0 is best)
    - ranking: for every user message, all ranked replies
    - prompt: every path from the root to a user message

    A deleted message and the messages below it are dropped.

    Raises:
        RowDropped: The tree is an orphan or an unread row.
    """
    if "unread" in tree:
        raise RowDropped(tree["unread"])
    if "orphan" in tree:
        raise RowDropped("message without its parent")
    stack: list[tuple[list[dict[str, Any]], Node]] = [([], tree["prompt"])]
    while stack:
        before, node = stack.pop()
        if node.get("deleted"):
            yield RowDropped("deleted message")
            continue
        path = [*before, {"role": node["role"], "content": node["text"]}]
        if node["role"] == "assistant" and kind == "sft":
            yield {"prompt": before, "completion": node["text"]}
        replies: list[Node] = list(node.get("replies") or ())
        if node["role"] != "assistant":
            yield from _items_of_user_message(path, replies, kind)
        stack += [(path, reply) for reply in reversed(replies)]


def _items_of_user_message(
    messages: list[dict[str, Any]], replies: list[Node], kind: Kind
) -> Iterator[CellsOrDropped]:
    """Yield the cells of the canonical rows of a user message and its replies."""
    if kind == "prompt":
        yield {"prompt": messages}
    if kind not in ("preference", "ranking") or not replies:
        return
    ranked = [
        reply
        for reply in replies
        if isinstance(reply.get("rank"), (int, float)) and not reply.get("deleted")
    ]
    if len(ranked) < 2:
        yield RowDropped("fewer than two ranked replies")
        return
    texts, ranks = ([reply[key] for reply in ranked] for key in ("text", "rank"))
    yield from items_from_scored_replies(messages, texts, ranks, kind, values_are_ranks=True)
