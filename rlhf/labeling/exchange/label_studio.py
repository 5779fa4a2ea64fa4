"""Convert labels to and from the JSON of Label Studio (tasks with annotations).

A task corresponds to an item, and an annotation to a label. The controls of its project are in
`PROJECT_CONFIGS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf.config.labeling import LabelMode
from rlhf.data.columns import Row
from rlhf.labeling.exchange import CountProblem, ForeignNames, skip_and_count_unreadable
from rlhf.labeling.exchange.rows import (
    NOT_PLAIN,
    ForeignLabel,
    has_only_plain_messages,
    labels_by_item,
    plain_messages_by_name,
    reply_names_best_first,
)

_PARAGRAPHS = (
    '<Paragraphs name="{0}" value="${0}" layout="dialogue" nameKey="role" textKey="content"/>'
)
_NOTE = '<TextArea name="note" toName="prompt"/>'

PROJECT_CONFIGS: Mapping[LabelMode, str] = {
    "pairs": "\n".join(
        [
            "<View>",
            *map(_PARAGRAPHS.format, ("prompt", "response_a", "response_b")),
            '<Pairwise name="preference" toName="response_a,response_b"/>',
            '<Choices name="tie" toName="prompt"><Choice value="tie"/></Choices>',
            '<Rating name="strength" toName="prompt" maxRating="3"/>',
            _NOTE,
            "</View>",
        ]
    ),
    "ratings": "\n".join(
        [
            "<View>",
            *map(_PARAGRAPHS.format, ("prompt", "completion")),
            '<Rating name="rating" toName="completion" maxRating="5"/>',
            _NOTE,
            "</View>",
        ]
    ),
    "rankings": "\n".join(
        [
            "<View>",
            _PARAGRAPHS.format("prompt"),
            '<List name="replies" value="$replies"/>',
            '<Ranker name="ranking" toName="replies"/>',
            _NOTE,
            "</View>",
        ]
    ),
    "demonstrations": "\n".join(
        [
            "<View>",
            _PARAGRAPHS.format("prompt"),
            '<TextArea name="completion" toName="prompt"/>',
            _NOTE,
            "</View>",
        ]
    ),
}
"""Mode -> labeling configuration of a project to which the tasks can be imported."""


def to_label_studio(rows: Iterable[Row], count_problem: CountProblem) -> list[dict[str, Any]]:
    """Return one task for each item, with one annotation for each label.

    A label with tied ranks is counted and has no annotation. Label Studio assigns imported
    annotations to the user who imports them. The key `annotator` keeps the id of the annotator, and
    the key `gold` the known answer of a check item.
    """
    tasks = []
    for number, labels in enumerate(labels_by_item(rows), start=1):
        annotations = [_annotation(row, count_problem) for row in labels]
        tasks.append(
            {
                "id": number,
                "data": _task_data(labels[0]),
                "annotations": [a for a in annotations if a is not None],
            }
        )
    return tasks


def _task_data(row: Row) -> dict[str, Any]:
    fields = plain_messages_by_name(row)
    if row["mode"] != "rankings":
        return dict(fields)
    replies = [_ranker_entry(name, fields[name]) for name in fields if name != "prompt"]
    return {"prompt": fields["prompt"], "replies": replies}


def _ranker_entry(name: str, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the entry of a reply in the list of a ranker.

    Label Studio shows the text of the entry. If the reply has several messages, the key `messages`
    contains them.
    """
    entry = {"id": name, "title": name, "body": "\n".join(turn["content"] for turn in messages)}
    return entry if len(messages) == 1 else {**entry, "messages": list(messages)}


def _annotation(row: Row, count_problem: CountProblem) -> dict[str, Any] | None:
    """Return the annotation of a label; None if it has tied ranks."""
    if not has_only_plain_messages(row):
        count_problem(NOT_PLAIN)
    results = [] if row.get("skipped") else _results(row)
    if results is None:
        count_problem("with tied ranks (not exported)")
        return None
    if row.get("note"):
        results.append(_control_result("note", "prompt", "textarea", {"text": [row["note"]]}))
    annotation = {
        "annotator": row["annotator"],
        "result": results,
        "was_cancelled": bool(row.get("skipped")),
        "created_at": row.get("time") or None,
        "lead_time": row.get("seconds"),
        "gold": row.get("gold"),
    }
    return {key: value for key, value in annotation.items() if value is not None}


def _results(row: Row) -> list[dict[str, Any]] | None:
    """Return the results of a label; None if it cannot be expressed."""
    match row["mode"]:
        case "pairs":
            if row["winner"] == "tie":
                return [_control_result("tie", "prompt", "choices", {"choices": ["tie"]})]
            side = {"a": "left", "b": "right"}[row["winner"]]
            results = [
                # The validator of Label Studio's SDK accepts only the first of the two targets.
                _control_result("preference", "response_a", "pairwise", {"selected": side})
            ]
            if row.get("margin"):
                results.append(
                    _control_result("strength", "prompt", "rating", {"rating": row["margin"]})
                )
            return results
        case "ratings":
            return [_control_result("rating", "completion", "rating", {"rating": row["rating"]})]
        case "rankings":
            names = reply_names_best_first(row)
            if names is None:
                return None
            return [_control_result("ranking", "replies", "ranker", {"ranker": {"ranking": names}})]
        case _:
            text = row["completion"][-1]["content"]
            return [_control_result("completion", "prompt", "textarea", {"text": [text]})]


def _control_result(name: str, target: str, kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a control, which refers to the field ``target``."""
    return {"id": name, "from_name": name, "to_name": target, "type": kind, "value": dict(value)}


def from_label_studio(
    tasks: Iterable[Mapping[str, Any]], names: ForeignNames, count_problem: CountProblem
) -> Iterator[ForeignLabel]:
    """Yield the labels of tasks.

    Args:
        tasks: The list in the JSON file.
        names: Name of a field or control in this toolkit -> its name in the project.
        count_problem: Counts the labels that are not read.
    """
    for task in tasks:
        is_task = isinstance(task, Mapping)
        data, annotations = (task.get(key) if is_task else None for key in ("data", "annotations"))
        if not isinstance(data, Mapping) or not isinstance(annotations, list):
            count_problem("task without data and annotations")
            continue
        for annotation in annotations:
            yield from skip_and_count_unreadable(
                (_label(data, each, names) for each in [annotation]),
                count_problem,
                malformed="malformed annotation",
                unknown="annotation without a preference, rating, ranking or completion",
            )


def _label(
    data: Mapping[str, Any], annotation: Mapping[str, Any], names: ForeignNames
) -> ForeignLabel | None:
    """Return the label of an annotation.

    The result is None if the controls have other names, or if the answer is missing or incomplete
    and the item was not skipped.
    """

    def field(name: str) -> Any:
        return data.get(names.get(name, name))

    values = {result.get("from_name"): result.get("value") or {} for result in annotation["result"]}

    def value(name: str, key: str) -> Any:
        return values.get(names.get(name, name), {}).get(key)

    common: dict[str, Any] = {
        "annotator": _annotator_id(annotation),
        "prompt": field("prompt"),
        "note": "\n".join(_text_area_texts(value("note", "text"))),
        "seconds": annotation.get("lead_time"),
        "time": annotation.get("created_at") or "",
        "skipped": bool(annotation.get("was_cancelled")),
    }
    pair = [field("response_a"), field("response_b")]
    side = value("preference", "selected")
    if all(reply is not None for reply in pair):
        if side not in ("left", "right") and not (value("tie", "choices") or common["skipped"]):
            return None
        winner = {"left": 0, "right": 1}.get(side)
        margin = value("strength", "rating")
        gold = {"a": 0, "b": 1}.get(annotation.get("gold", ""))
        return ForeignLabel(
            "pairs", **common, replies=pair, winner=winner, margin=margin, gold=gold
        )
    if isinstance(replies := field("replies"), list):
        ranks = _ranks(value("ranking", "ranker"), replies, names.get("ranking", "ranking"))
        bodies = [reply.get("messages") or reply["body"] for reply in replies]
        known = bool(ranks) or common["skipped"]
        return ForeignLabel("rankings", **common, replies=bodies, ranks=ranks) if known else None
    if (rating := value("rating", "rating")) is not None or field("completion") is not None:
        known = rating is not None or common["skipped"]
        reply = [field("completion")]
        return ForeignLabel("ratings", **common, replies=reply, rating=rating) if known else None
    written_replies = _text_area_texts(value("completion", "text"))
    if written_replies or common["skipped"]:
        return ForeignLabel("demonstrations", **common, replies=written_replies)
    return None


def _text_area_texts(value: Any) -> list[str]:
    """Return the texts of a text area: a list of texts, or one text."""
    return [value] if isinstance(value, str) else [str(text) for text in value or []]


def _annotator_id(annotation: Mapping[str, Any]) -> str:
    user = annotation.get("annotator") or annotation.get("completed_by")
    if isinstance(user, Mapping):
        user = user.get("email") or user.get("id")
    return str(user if user is not None else "unknown")


def _ranks(ranking: Any, replies: Sequence[Mapping[str, Any]], control: str) -> list[int]:
    """Return the rank of each reply; [] if the ranking is incomplete.

    Args:
        ranking: A list of ids, or a mapping with such a list under the name of the control or _.
        replies: The replies with their ids.
        control: Name of the control.
    """
    if isinstance(ranking, Mapping):
        ranking = ranking.get(control, ranking.get("_"))
    if not isinstance(ranking, list):
        return []
    rank_by_name = {name: rank for rank, name in enumerate(ranking, start=1)}
    ranks = [rank_by_name.get(reply.get("id"), 0) for reply in replies]
    return ranks if all(ranks) else []
