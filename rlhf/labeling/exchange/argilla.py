"""Convert labels to and from the JSON of Argilla 2 (`dataset.records.to_json`).

A record is an item. Its fields are chat fields. Its questions are `preference` (response_a,
response_b or tie), `strength`, `rating`, `ranking` and `completion`, depending on the mode, and
`note`. Argilla identifies users by UUIDs; the metadata `annotators` maps them to the annotators'
ids. If the item was a check for some users, the metadata `checks` maps them to the known answer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.data.columns import Row
from rlhf.labeling.exchange import CountProblem, ForeignNames, skip_and_count_unreadable
from rlhf.labeling.exchange.rows import (
    NOT_PLAIN,
    ForeignLabel,
    has_only_plain_messages,
    labels_by_item,
    plain_messages_by_name,
    reply_names,
    reply_names_best_first,
)

_USER_NAMESPACE = uuid.UUID("2f0c3a3e-3a0c-5d0a-9c46-0a5b8e7d1f10")
"""Namespace of the UUIDs of annotators."""


def to_argilla(rows: Iterable[Row], count_problem: CountProblem) -> list[dict[str, Any]]:
    """Return one record for each item; skipped labels have no response."""
    return [_record_of_item(labels, count_problem) for labels in labels_by_item(rows)]


def _record_of_item(labels: Sequence[Row], count_problem: CountProblem) -> dict[str, Any]:
    """Return the record of an item from all labels of the item.

    A skipped label and a tied ranking are counted and have no response. A label whose messages have
    more than text is counted too.
    """
    first = labels[0]
    responses: dict[str, list[dict[str, Any]]] = {}
    users: dict[str, str] = {}
    checks: dict[str, str] = {}
    for row in labels:
        if not has_only_plain_messages(row):
            count_problem(NOT_PLAIN)
        if row.get("skipped"):
            count_problem("skipped (exported without a response)")
            continue
        user = str(uuid.uuid5(_USER_NAMESPACE, row["annotator"]))
        users[user] = row["annotator"]
        if row.get("gold"):
            checks[user] = row["gold"]
        for question, value in _answers(row, count_problem):
            responses.setdefault(question, []).append({"value": value, "user_id": user})
    metadata = {"mode": first["mode"], "annotators": json.dumps(users, ensure_ascii=False)}
    if checks:
        metadata["checks"] = json.dumps(checks)
    return {
        "id": first["item_id"],
        "fields": plain_messages_by_name(first),
        "metadata": metadata,
        "suggestions": {},
        "responses": responses,
        "vectors": {},
    }


def _answers(row: Row, count_problem: CountProblem) -> Iterator[tuple[str, Any]]:
    """Yield the questions of a label with their answers; for a tied ranking, only count it."""
    match row["mode"]:
        case "pairs":
            names = {"a": "response_a", "b": "response_b", "tie": "tie"}
            yield "preference", names[row["winner"]]
            if row.get("margin"):
                yield "strength", row["margin"]
        case "ratings":
            yield "rating", row["rating"]
        case "rankings":
            names = reply_names_best_first(row)
            if names is None:
                count_problem("with tied ranks (exported without a response)")
                return
            yield "ranking", names
        case "demonstrations":
            yield "completion", row["completion"][-1]["content"]
    if row.get("note"):
        yield "note", row["note"]


def from_argilla(
    records: Iterable[Mapping[str, Any]], names: ForeignNames, count_problem: CountProblem
) -> Iterator[ForeignLabel]:
    """Yield the labels of records.

    Args:
        records: The list in the JSON file.
        names: Name of a field or question in this toolkit -> its name in the records.
        count_problem: Counts the labels that are not read.
    """
    for record in records:
        yield from skip_and_count_unreadable(
            _labels_of_record(record, names),
            count_problem,
            malformed="malformed record",
            unknown="response without a readable preference, rating, ranking or completion",
        )


def _labels_of_record(
    record: Mapping[str, Any], names: ForeignNames
) -> Iterator[ForeignLabel | None]:
    """Yield the label of each user; None if an answer cannot be read."""
    users, checks = (_metadata_by_user(record, key) for key in ("annotators", "checks"))
    for user, answers in _answers_by_user(record["responses"]).items():
        label = _user_label(record["fields"], answers, names, users.get(user, user))
        gold = {"a": 0, "b": 1}.get(checks.get(user, ""))
        yield label if label is None else replace(label, gold=gold)


def _metadata_by_user(record: Mapping[str, Any], key: str) -> Mapping[str, str]:
    """Return user -> text, from the JSON text under a key of the metadata; {} if it has none."""
    metadata = record.get("metadata")
    try:
        texts = json.loads(metadata[key]) if isinstance(metadata, Mapping) else {}
    except (KeyError, TypeError, ValueError):
        return {}
    return {user: str(text) for user, text in texts.items()} if isinstance(texts, dict) else {}


def _answers_by_user(responses: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    users: dict[str, dict[str, Any]] = {}
    for question, question_responses in responses.items():
        for response in question_responses or ():
            users.setdefault(str(response.get("user_id")), {})[question] = response.get("value")
    return users


def _user_label(
    fields: Mapping[str, Any], answers: Mapping[str, Any], names: ForeignNames, annotator: str
) -> ForeignLabel | None:
    """Return the label that one user gave.

    The result is None if no question has a known name, a preference is neither a reply nor a tie,
    or a ranking is incomplete or has unknown replies.
    """

    def field(name: str) -> Any:
        return fields.get(names.get(name, name))

    def answer(name: str) -> Any:
        return answers.get(names.get(name, name))

    common = {"annotator": annotator, "prompt": field("prompt"), "note": answer("note") or ""}
    if (preference := answer("preference")) is not None:
        sides = ("response_a", "response_b")
        winner = next((i for i in (0, 1) if preference == names.get(sides[i], sides[i])), None)
        replies = [field(side) for side in sides]
        if winner is None and preference != "tie":
            return None
        return ForeignLabel(
            "pairs", **common, replies=replies, winner=winner, margin=answer("strength")
        )
    if (rating := answer("rating")) is not None:
        return ForeignLabel("ratings", **common, replies=[field("completion")], rating=rating)
    if (ranking := answer("ranking")) is not None:
        ranked = reply_names(fields)
        ranks = _ranks(ranking, ranked)
        replies = [fields[name] for name in ranked]
        return ForeignLabel("rankings", **common, replies=replies, ranks=ranks) if ranks else None
    if (completion := answer("completion")) is not None:
        return ForeignLabel("demonstrations", **common, replies=[completion])
    return None


def _ranks(ranking: Sequence[Any], names: Sequence[str]) -> list[int] | None:
    """Return the rank of each reply, from names in order or from names with ranks.

    The result is None if the ranking is incomplete or there are no replies.
    """
    if all(isinstance(entry, Mapping) for entry in ranking):
        ranks = {entry.get("value"): entry.get("rank") for entry in ranking}
    else:
        ranks = {name: rank for rank, name in enumerate(ranking, start=1)}
    ordered = [ranks.get(name) for name in names]
    return [rank for rank in ordered if rank] if names and all(ordered) else None
