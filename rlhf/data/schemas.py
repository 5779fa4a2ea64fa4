"""Schemas of public datasets that need more than a mapping of columns.

A schema is recognized by its columns, and in some cases by the cells of the first row. It converts
a row to the cells of any number of canonical rows. For example, it selects the chosen reply of a
pair, or converts a ranking to pairs or a tree to conversations. docs/data.md lists the schemas.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from rlhf.common.registry import Registry
from rlhf.config.data import Kind
from rlhf.data.columns import Row
from rlhf.data.conversation import without_system
from rlhf.data.formats import parse_number
from rlhf.data.labels import (
    LABEL_COLUMNS,
    LABEL_READERS,
    MODE_COLUMNS,
    RANGE_COLUMNS,
    labels_with_undone_marks,
)
from rlhf.data.messages import RowDropped, decode_if_json, is_filled, parse_messages
from rlhf.data.ranked_replies import (
    CellsOrDropped,
    build_message_trees,
    items_from_scored_replies,
    items_of_message_tree,
)

Reader = Callable[[Row, Kind], Iterator[CellsOrDropped]]
"""Function of a row of the table and a kind that yields the cells of canonical rows.

It raises RowDropped if the row cannot be used.
"""
CellReader = Callable[[Row], dict[str, Any]]
"""Function of a row of the table that returns some cells of one canonical row.

It raises RowDropped if the row cannot be used.
"""


@dataclass(frozen=True)
class Schema:
    """The columns of a public dataset, and functions that read its rows."""

    name: str
    needs: frozenset[str]
    """Required columns, by which the schema is recognized."""
    kinds: tuple[Kind, ...]
    """Kinds of canonical rows that `read` can produce."""
    read: Reader
    uses: tuple[str, ...] = ()
    """Optional columns that `read` uses."""
    gather: Callable[[Sequence[Row]], Sequence[Row]] | None = None
    """Function that merges the rows of the table that belong together, before `read`."""
    gives: tuple[str, ...] = ()
    """Computed columns that can be included in the rows with `keep`."""
    matches: Callable[[Row], bool] = lambda row: True
    """Function that returns whether the first row of a table with these columns has this schema."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> keys that `read` reads in its objects and in the objects inside them."""

    @property
    def columns(self) -> set[str]:
        """All columns that the schema reads."""
        return {*self.needs, *self.uses}

    def unread_keys(self, row: Row) -> set[str]:
        """Return descriptions of the keys in the cells of a row that `read` does not read."""
        return {
            f"{column} key {key!r}"
            for column, known in self.keys.items()
            for key in _unread_keys(decode_if_json(row.get(column)), known)
        }


def _unread_keys(cell: Any, read_keys: Collection[str]) -> Iterator[str]:
    """Yield the keys with values in an object or in a list of objects, except `read_keys`."""
    stack = [cell]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            yield from (key for key in value if key not in read_keys and is_filled(value[key]))
            stack += [value[key] for key in read_keys if key in value]
        elif isinstance(value, list):
            stack += value


def find_schema(kind: Kind, table: Sequence[Row], column_names: Collection[str]) -> Schema | None:
    """Return the first schema that matches a table and can produce rows of `kind`, or None.

    `column_names` are the names of all columns of the table.
    """
    for schema in schemas_by_precedence():
        if kind in schema.kinds and schema.needs <= set(column_names) and schema.matches(table[0]):
            return schema
    return None


def _pair_reader(prompt_of: Callable[[Row], Any], replies_of: CellReader) -> Reader:
    """Return a reader of rows that contain one pair.

    Args:
        prompt_of: Function that returns the prompt cell of a row.
        replies_of: Function that returns the other cells.
    """

    def cells_of_pair_row(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
        cells = {"prompt": prompt_of(row)}
        yield cells if kind == "prompt" else cells | replies_of(row)

    return cells_of_pair_row


def _pair_cell_reader_by_code(
    first_column: str,
    second_column: str,
    *,
    code_column: str,
    codes: tuple[int, int] = (0, 1),
    ties: tuple[float, ...] = (),
) -> CellReader:
    """Return a function that selects the better of two reply columns by the column `code_column`.

    Args:
        first_column: Column of the first reply.
        second_column: Column of the second reply.
        code_column: Column that states which reply is better.
        codes: Values of `code_column` if the first reply is better, and if the second reply is
            better.
        ties: Values of `code_column` for ties.
    """

    def chosen_and_rejected(row: Row) -> dict[str, Any]:
        value = row.get(code_column)
        if value in ties:
            raise RowDropped("tie")
        if value not in codes:
            raise RowDropped(f"{code_column} is neither {min(codes)} nor {max(codes)}")
        chosen, rejected = (
            (first_column, second_column) if value == codes[0] else (second_column, first_column)
        )
        return {"chosen": row[chosen], "rejected": row[rejected]}

    return chosen_and_rejected


def _pair_cell_reader_by_strength(
    first_column: str, second_column: str, *, strength_column: str
) -> CellReader:
    """Return a function that selects the better of two replies by the sign of `strength_column`.

    A negative value means that the first reply is better, and 0 is a tie, which is dropped. The
    margin is the absolute value.
    """

    def chosen_rejected_and_margin(row: Row) -> dict[str, Any]:
        value = parse_number(row[strength_column], strength_column)
        if value == 0:
            raise RowDropped("tie")
        chosen, rejected = (
            (first_column, second_column) if value < 0 else (second_column, first_column)
        )
        return {"chosen": row[chosen], "rejected": row[rejected], "margin": float(abs(value))}

    return chosen_rejected_and_margin


def _ranking_reader(
    prompt_column: str,
    list_column: str,
    reply_key: str,
    value_key: str,
    *,
    values_are_ranks: bool = False,
) -> Reader:
    """Return a reader of rows that contain a list of replies with their scores or ranks.

    Args:
        prompt_column: Column of the prompt.
        list_column: Column of the list.
        reply_key: Key of the reply in an item of the list.
        value_key: Key of the score or rank in an item of the list.
        values_are_ranks: Whether the values are ranks, as in `items_from_scored_replies`.
    """

    def ranking_items(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
        entries = decode_if_json(row[list_column])
        replies, values = ([entry.get(key) for entry in entries] for key in (reply_key, value_key))
        yield from items_from_scored_replies(
            row[prompt_column], replies, values, kind, values_are_ranks=values_are_ranks
        )

    return ranking_items


_pair_cells_by_safer_response = _pair_cell_reader_by_code(
    "response_0", "response_1", code_column="safer_response_id"
)


def _pair_by_safety(row: Row) -> dict[str, Any]:
    """Return a pair whose chosen reply is the safer one, and whether each reply is unsafe."""
    cells = _pair_cells_by_safer_response(row)
    safer = int(row["safer_response_id"])
    for side, index in (("chosen", safer), ("rejected", 1 - safer)):
        safe = row.get(f"is_response_{index}_safe")
        cells[f"{side}_unsafe"] = None if safe is None else not safe
    return cells


def _webgpt_prompt(row: Row) -> Any:
    question = decode_if_json(row["question"])
    return question.get("full_text") if isinstance(question, Mapping) else question


def _webgpt_replies_and_scores(row: Row) -> dict[str, Any]:
    replies = {"response_a": row["answer_0"], "response_b": row["answer_1"]}
    return replies | {"score_a": row["score_0"], "score_b": row["score_1"]}


def _arena_rows(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    first, second = (_judged_turns(row, f"conversation_{side}") for side in "ab")
    if kind == "prompt":
        messages = parse_messages(first, set())
        yield {"prompt": first[: len(first) - len(without_system(messages)) + 1]}
    else:
        yield {"response_a": first, "response_b": second, "winner": row["winner"]}


def _judged_turns(row: Row, column: str) -> list[Any]:
    """Return the messages of a conversation up to the judged turn, as they are in the row.

    Without the number of the turn, all messages are returned.

    Raises:
        RowDropped: The cell is not a list of messages.
    """
    conversation, turns = decode_if_json(row[column]), row.get("turn")
    if not isinstance(conversation, list):
        raise RowDropped("conversations are not lists of messages")
    messages = parse_messages(conversation, set())
    if not isinstance(turns, int) or turns <= 0:
        return conversation
    return conversation[: len(messages) - len(without_system(messages)) + 2 * turns]


def _arena_text_rows(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the pair of a row with one column per verdict and with JSON lists of turns.

    For the kind "prompt", only the first user turn is yielded.

    Raises:
        RowDropped: There is a tie or no winner, or the turns do not match.
    """
    cells = [decode_if_json(row[name]) for name in ("prompt", "response_a", "response_b")]
    questions, *replies = (cell if isinstance(cell, list) else [cell] for cell in cells)
    if kind == "prompt":
        yield {"prompt": questions[0]}
        return
    verdicts = [row[f"winner_{name}"] in (1, True, "1") for name in ("model_a", "model_b", "tie")]
    if sum(verdicts) != 1 or verdicts[2]:
        if sum(verdicts) > 1:
            raise RowDropped("more than one of the winner columns is 1")
        raise RowDropped("tie" if verdicts[2] else "winner names neither reply")
    if any(len(turns) != len(questions) for turns in replies):
        raise RowDropped("prompts differ")
    sides = [_interleave_turns(questions, turns) for turns in replies]
    yield {"chosen": sides[verdicts[1]], "rejected": sides[not verdicts[1]]}


def _interleave_turns(questions: Sequence[Any], replies: Sequence[Any]) -> list[dict[str, Any]]:
    turns = itertools.chain.from_iterable(zip(questions, replies, strict=True))
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


_alpaca_pair_cells = _pair_cell_reader_by_code(
    "output_1", "output_2", code_column="preference", codes=(1, 2), ties=(0, 1.5)
)


def _alpaca_farm_pair(row: Row) -> dict[str, Any]:
    return _alpaca_pair_cells(row) | {"context": row.get("input")}


def _summary_pair(row: Row) -> dict[str, Any]:
    texts = [part.get("text") for part in row["summaries"]]
    if len(texts) != 2 or row["choice"] not in (0, 1):
        raise RowDropped("choice names neither summary")
    return {"chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]]}


def _summary_prompt(row: Row) -> Any:
    info = row["info"]
    return info.get("post") or info.get("article")


def _openai_rows(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    request = decode_if_json(row["input"])
    cells = {"prompt": request.get("messages"), "tools": request.get("tools")}
    if kind == "preference":
        cells |= {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    yield cells


def _group_by_prompt(table: Sequence[Row]) -> list[Row]:
    """Return one row {prompt, replies} per prompt; `replies` are the rows with this prompt."""
    groups: dict[str, dict[str, Any]] = {}
    for row in table:
        prompt = row.get("prompt")
        group = groups.setdefault(str(prompt), {"prompt": prompt, "replies": []})
        group["replies"].append(row)
    return list(groups.values())


SHEPHERD_TAG = "ки"
"""Text at the end of every step in the input column of Math-Shepherd.

In the label column, + or - replaces it.
"""


def _shepherd_rows(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the row of a solution with its steps and their labels.

    Input and label columns are equal except for the marks at the ends of the steps.

    Raises:
        RowDropped: The columns do not have this form, or there is no question before the steps.
    """
    text, marked = row["input"], row["label"]
    pieces = text.split(SHEPHERD_TAG)
    if len(pieces) < 2 or pieces[-1].strip():
        raise RowDropped("a step ends without its mark")
    labels, position = [], 0
    for piece in pieces[:-1]:
        if marked[position : position + len(piece)] != piece:
            raise RowDropped("input and label differ")
        position += len(piece)
        labels.append(marked[position : position + 1])
        position += 1
    question, mark, first = pieces[0].partition("Step 1:")
    if not mark or not question.strip():
        raise RowDropped('input has no question before "Step 1:"')
    if not set(labels) <= {"+", "-"}:
        raise RowDropped("a step is marked neither + nor -")
    steps = [f"{mark}{first}".strip(), *(piece.strip() for piece in pieces[1:-1])]
    yield {
        "prompt": question.strip(),
        "steps": steps,
        "labels": [int(label == "+") for label in labels],
    }


def _prm800k_rows(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the labeled steps of a solution.

    The result has a row for the path of chosen steps, and a row for each rated alternative of a
    step, in which only the alternative is labeled. A path without ratings has no row.
    """
    question = row["question"]
    if kind == "prompt":
        yield {"prompt": question["problem"], "answer": question.get("ground_truth_answer")}
        return
    path: list[str] = []
    labels: list[int | None] = []
    for step in row["label"]["steps"] or ():
        rated = [
            (part["text"], _rating_label(part.get("rating"))) for part in step["completions"] or ()
        ]
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        for index, (text, label) in enumerate(rated):
            if index != chosen and label is not None:
                unlabeled = [None] * len(path)
                yield _steps_cells(question, [*path, text], [*unlabeled, label])
        if chosen is not None:
            text, label = rated[chosen]
        elif human is not None:
            text, label = human["text"], 1  # written by an annotator: no alternative was correct
        else:
            break
        path.append(text)
        labels.append(label)
    if any(label is not None for label in labels):
        yield _steps_cells(question, path, labels)


def _steps_cells(
    question: Row, steps: Sequence[str], labels: Sequence[int | None]
) -> CellsOrDropped:
    return {"prompt": question["problem"], "steps": list(steps), "labels": list(labels)}


def _rating_label(value: Any) -> int | None:
    """Convert a rating (-1, 0 or 1) to a label; neutral steps (0) count as correct, None is kept.

    Lightman et al. (2023, arXiv:2305.20050) count them in the same way.
    """
    return None if value is None else int(value >= 0)


def _cells_are_objects(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(decode_if_json(row.get(name)), Mapping) for name in names)


def _cell_is_list_of(name: str, *keys: str) -> Callable[[Row], bool]:
    """Return a function that returns whether a cell is a list of objects with these keys.

    Only the first object is examined.
    """

    def matches(row: Row) -> bool:
        cell = decode_if_json(row.get(name))
        return (
            isinstance(cell, list)
            and bool(cell)
            and isinstance(cell[0], Mapping)
            and set(keys) <= cell[0].keys()
        )

    return matches


def _cell_equals(name: str, value: Any) -> Callable[[Row], bool]:
    return lambda row: row.get(name) == value


_PRM800K_LABEL_KEYS = (
    "steps",
    "completions",
    "text",
    "rating",
    "chosen_completion",
    "human_completion",
)

PAIR_KINDS: tuple[Kind, ...] = ("preference",)
PAIR_AND_PROMPT_KINDS: tuple[Kind, ...] = ("preference", "prompt")
RANKING_KINDS: tuple[Kind, ...] = ("preference", "ranking")

SAFETY_SCHEMA = Schema(
    "PKU-SafeRLHF by safety",
    frozenset({"prompt", "response_0", "response_1", "safer_response_id"}),
    PAIR_KINDS,
    _pair_reader(itemgetter("prompt"), _pair_by_safety),
    uses=("is_response_0_safe", "is_response_1_safe"),
    gives=("chosen_unsafe", "rejected_unsafe"),
)
"""Used instead of PKU-SafeRLHF if `keep` contains the labels of a cost model."""

_BUILT_IN_SCHEMAS = (
    Schema(
        "PKU-SafeRLHF",
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        PAIR_KINDS,
        _pair_reader(
            itemgetter("prompt"),
            _pair_cell_reader_by_code("response_0", "response_1", code_column="better_response_id"),
        ),
    ),
    Schema(
        "SHP",
        frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
        PAIR_AND_PROMPT_KINDS,
        _pair_reader(
            itemgetter("history"),
            _pair_cell_reader_by_code(
                "human_ref_A", "human_ref_B", code_column="labels", codes=(1, 0)
            ),
        ),
    ),
    Schema(
        "WebGPT comparisons",
        frozenset({"question", "answer_0", "answer_1", "score_0", "score_1"}),
        PAIR_AND_PROMPT_KINDS,
        _pair_reader(_webgpt_prompt, _webgpt_replies_and_scores),
        keys={"question": ("full_text",)},
    ),
    Schema(
        "Chatbot Arena",
        frozenset({"conversation_a", "conversation_b", "winner"}),
        PAIR_AND_PROMPT_KINDS,
        _arena_rows,
        uses=("turn",),
    ),
    Schema(
        "Chatbot Arena, one column a verdict",
        frozenset({"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"}),
        PAIR_AND_PROMPT_KINDS,
        _arena_text_rows,
        uses=("winner_tie",),
        matches=lambda row: "winner_tie" in row,
    ),
    Schema(
        "HelpSteer3",
        frozenset({"context", "response1", "response2", "overall_preference"}),
        PAIR_AND_PROMPT_KINDS,
        _pair_reader(
            lambda row: decode_if_json(row["context"]),
            _pair_cell_reader_by_strength(
                "response1", "response2", strength_column="overall_preference"
            ),
        ),
    ),
    Schema(
        "HelpSteer2 preference",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        PAIR_KINDS,
        _pair_reader(
            itemgetter("prompt"),
            _pair_cell_reader_by_strength(
                "response_1", "response_2", strength_column="preference_strength"
            ),
        ),
    ),
    Schema(
        "HelpSteer",
        frozenset({"prompt", "response", "helpfulness"}),
        RANKING_KINDS,
        _ranking_reader("prompt", "replies", "response", "helpfulness"),
        gather=_group_by_prompt,
        matches=lambda row: not {"chosen", "rejected"} & row.keys(),
    ),
    Schema(
        "Nectar",
        frozenset({"prompt", "answers"}),
        RANKING_KINDS,
        _ranking_reader("prompt", "answers", "answer", "rank", values_are_ranks=True),
        matches=_cell_is_list_of("answers", "answer", "rank"),
        keys={"answers": ("answer", "rank")},
    ),
    Schema(
        "UltraFeedback",
        frozenset({"instruction", "completions"}),
        RANKING_KINDS,
        _ranking_reader("instruction", "completions", "response", "overall_score"),
        matches=_cell_is_list_of("completions", "response", "overall_score"),
        keys={"completions": ("response", "overall_score")},
    ),
    Schema(
        "AlpacaFarm",
        frozenset({"instruction", "output_1", "output_2", "preference"}),
        PAIR_KINDS,
        _pair_reader(itemgetter("instruction"), _alpaca_farm_pair),
        uses=("input",),
    ),
    Schema(
        "Summarize from feedback",
        frozenset({"info", "summaries", "choice"}),
        PAIR_AND_PROMPT_KINDS,
        _pair_reader(_summary_prompt, _summary_pair),
        matches=_cell_is_list_of("summaries", "text"),
        keys={"info": ("post", "article"), "summaries": ("text",)},
    ),
    Schema(
        "OpenAI preference",
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        PAIR_AND_PROMPT_KINDS,
        _openai_rows,
        matches=_cells_are_objects("input"),
        keys={"input": ("messages", "tools")},
    ),
    Schema(
        "OASST trees",
        frozenset({"message_tree_id", "prompt"}),
        ("sft", "preference", "ranking", "prompt"),
        items_of_message_tree,
        matches=_cells_are_objects("prompt"),
        keys={"prompt": ("role", "text", "rank", "deleted", "replies")},
    ),
    Schema(
        "OASST messages",
        frozenset({"message_id", "parent_id", "text", "role"}),
        ("sft", "preference", "ranking", "prompt"),
        items_of_message_tree,
        uses=("rank", "deleted"),
        gather=build_message_trees,
    ),
    Schema(
        "Math-Shepherd",
        frozenset({"input", "label"}),
        ("steps",),
        _shepherd_rows,
        matches=lambda row: SHEPHERD_TAG in str(row.get("input")),
    ),
    Schema(
        "PRM800K",
        frozenset({"question", "label"}),
        ("steps", "prompt"),
        _prm800k_rows,
        matches=_cells_are_objects("question", "label"),
        keys={"question": ("problem", "ground_truth_answer"), "label": _PRM800K_LABEL_KEYS},
    ),
)

_LABEL_SCHEMAS = tuple(
    Schema(
        f"labels of mode {mode}",
        LABEL_COLUMNS,
        kinds,
        read,
        uses=("undoes", "skipped", "gold", *MODE_COLUMNS[mode], *RANGE_COLUMNS.values()),
        gather=labels_with_undone_marks,
        matches=_cell_equals("mode", mode),
    )
    for mode, (kinds, read) in LABEL_READERS.items()
)

SCHEMAS: Registry[Schema] = Registry(
    "data format", {schema.name: schema for schema in (*_LABEL_SCHEMAS, *_BUILT_IN_SCHEMAS)}
)
"""All schemas. `rlhf.plugins.register_data_format` adds a schema."""


def schemas_by_precedence() -> list[Schema]:
    """Return the schemas in the order in which they are tried, those of plug-ins first."""
    added = [SCHEMAS[name] for name in SCHEMAS.sources]
    return [*added, *(schema for name, schema in SCHEMAS.items() if name not in SCHEMAS.sources)]
