"""Schemas of public data sets that need more than a mapping of columns.

A schema is recognized by its columns. It converts a row to the cells of any number of canonical
rows: it selects the chosen reply of a pair, converts rankings to pairs and trees to conversations.
docs/data.md lists the schemas.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.data import Kind
from rlhf.data.columns import Row
from rlhf.data.formats import choose, number
from rlhf.data.messages import RowDropped, decode_json, parse_messages
from rlhf.data.trees import gather_messages, tree_items

Item = dict[str, Any] | RowDropped
"""The cells of a canonical row, or the reason why there is none."""


@dataclass(frozen=True)
class Schema:
    """The layout of a public data set."""

    name: str
    needs: frozenset[str]
    """Required columns, by which the schema is recognized."""
    kinds: tuple[Kind, ...]
    """Kinds of rows that it can produce."""
    read: Callable[[Row, Kind], Iterator[Item]]
    """A row of the table -> cells of canonical rows."""
    uses: tuple[str, ...] = ()
    """Optional columns."""
    gather: Callable[[Sequence[Row]], Sequence[Row]] | None = None
    """Merges rows that belong together, before `read`."""
    gives: tuple[str, ...] = ()
    """Computed columns that `keep` can name."""
    without: frozenset[str] = frozenset()
    """Columns of other layouts, which exclude this schema."""
    holds: Callable[[Row], bool] = lambda row: True
    """Whether the cells of the first row have the right types."""


def find_schema(kind: Kind, table: Sequence[Row], present: Collection[str]) -> Schema | None:
    """The schema of a table for rows of `kind`, or None."""
    for schema in SCHEMAS:
        if kind in schema.kinds and _matches(schema, table, present):
            return schema
    return None


def _matches(schema: Schema, table: Sequence[Row], present: Collection[str]) -> bool:
    if not schema.needs <= set(present) or schema.without & set(present):
        return False
    return schema.holds(table[0])


def _pairs(
    read: Callable[[Row], dict[str, Any]], prompt: Callable[[Row], Any]
) -> Callable[[Row, Kind], Iterator[Item]]:
    """A reader of rows with one pair; `read` returns its cells or raises RowDropped."""

    def items(row: Row, kind: Kind) -> Iterator[Item]:
        if kind == "prompt":
            yield {"prompt": prompt(row)}
            return
        try:
            yield {"prompt": prompt(row), **read(row)}
        except RowDropped as reason:
            yield reason

    return items


def ranked_items(
    prompt: Any, replies: Sequence[Any], scores: Sequence[Any], kind: Kind, *, margins: bool
) -> Iterator[Item]:
    """Rows of scored replies: one ranking, or all pairs without ties."""
    if kind == "prompt":
        yield {"prompt": prompt}
        return
    scored = []
    for reply, score in zip(replies, scores, strict=True):
        try:
            scored.append((float(number(score, "score")), reply))
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
        if high == low:
            yield RowDropped("tie")
            continue
        margin = {"margin": high - low} if margins else {}
        yield {"prompt": prompt, "chosen": better, "rejected": worse, **margin}


def _signed(row: Row, first: str, second: str, strength: str) -> dict[str, Any]:
    """Cells of a pair whose strength is negative if the first reply is better."""
    value = number(row[strength], strength)
    if value == 0:
        raise RowDropped("tie")
    sides = (first, second) if value < 0 else (second, first)
    return {"chosen": row[sides[0]], "rejected": row[sides[1]], "margin": float(abs(value))}


def _pku(row: Row, *, choice: str = "better_response_id") -> dict[str, Any]:
    index = row.get(choice)
    if index not in (0, 1):
        raise RowDropped(f"{choice} is neither 0 nor 1")
    chosen, rejected = int(index), 1 - int(index)
    return {"chosen": row[f"response_{chosen}"], "rejected": row[f"response_{rejected}"]}


def _pku_items(row: Row, kind: Kind) -> Iterator[Item]:
    yield from _pairs(_pku, lambda row: row["prompt"])(row, kind)


def _pku_safety(row: Row, kind: Kind) -> Iterator[Item]:
    """Pairs by safety, with the labels of a cost model: which of the replies are unsafe."""
    try:
        cells = _pku(row, choice="safer_response_id")
        safer = int(row["safer_response_id"])
    except RowDropped as reason:
        yield reason
        return
    safe = [row.get(f"is_response_{index}_safe") for index in (safer, 1 - safer)]
    unsafe = {"chosen_unsafe": safe[0], "rejected_unsafe": safe[1]}
    flags = {name: None if value is None else not value for name, value in unsafe.items()}
    yield {"prompt": row["prompt"], **cells, **flags}


def _shp(row: Row) -> dict[str, Any]:
    label = row["labels"]
    if label not in (0, 1):
        raise RowDropped("labels is neither 0 nor 1")
    sides = ("human_ref_A", "human_ref_B") if label == 1 else ("human_ref_B", "human_ref_A")
    return {"chosen": row[sides[0]], "rejected": row[sides[1]]}


def _webgpt_prompt(row: Row) -> Any:
    question = decode_json(row["question"])
    return question.get("full_text") if isinstance(question, Mapping) else question


def _webgpt(row: Row) -> dict[str, Any]:
    cells = {"response_a": row["answer_0"], "response_b": row["answer_1"]}
    return choose(cells | {"score_a": row["score_0"], "score_b": row["score_1"]})


def _arena_sides(row: Row) -> list[list[Any]]:
    """Both conversations up to the judged turn."""
    turns = row.get("turn")
    sides = [decode_json(row[f"conversation_{side}"]) for side in "ab"]
    if not all(isinstance(side, list) for side in sides):
        raise RowDropped("conversations are not lists of messages")
    parsed = [parse_messages(side) for side in sides]
    end = 2 * turns if isinstance(turns, int) and turns > 0 else None
    systems = [int(bool(side) and side[0]["role"] == "system") for side in parsed]
    return [
        side[: None if end is None else end + extra]
        for side, extra in zip(parsed, systems, strict=True)
    ]


def _arena(row: Row, kind: Kind) -> Iterator[Item]:
    try:
        first, second = _arena_sides(row)
        if kind == "prompt":
            yield {"prompt": first[: 1 + (first[0]["role"] == "system")] if first else []}
            return
        cells = {"response_a": first, "response_b": second, "winner": row["winner"]}
        yield choose(cells)
    except RowDropped as reason:
        yield reason


def _arena_texts(row: Row, kind: Kind) -> Iterator[Item]:
    """Pairs with one column per verdict and texts as JSON lists of turns."""
    questions, first, second = (
        decode_json(row[name]) for name in ("prompt", "response_a", "response_b")
    )
    columns = [
        [cell] if not isinstance(cell, list) else cell for cell in (questions, first, second)
    ]
    if kind == "prompt":
        yield {"prompt": columns[0][0]}
        return
    verdicts = [row[f"winner_{name}"] in (1, True, "1") for name in ("model_a", "model_b", "tie")]
    if sum(verdicts) != 1 or verdicts[2]:
        yield RowDropped("tie" if verdicts[2] else "winner names neither reply")
        return
    if len({len(column) for column in columns}) != 1:
        yield RowDropped("prompts differ")
        return
    sides = [_interleaved(columns[0], replies) for replies in columns[1:]]
    yield {"chosen": sides[verdicts[1]], "rejected": sides[not verdicts[1]]}


def _interleaved(questions: Sequence[Any], replies: Sequence[Any]) -> list[dict[str, Any]]:
    turns = itertools.chain.from_iterable(zip(questions, replies, strict=True))
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def _alpaca_farm(row: Row) -> dict[str, Any]:
    preference = row["preference"]
    if preference in (0, 1.5):
        raise RowDropped("tie")
    if preference not in (1, 2):
        raise RowDropped("preference is neither 1 nor 2")
    sides = ("output_1", "output_2") if preference == 1 else ("output_2", "output_1")
    return {"chosen": row[sides[0]], "rejected": row[sides[1]]} | _context(row)


def _context(row: Row) -> dict[str, Any]:
    return {"context": row["input"]} if row.get("input") else {}


def _summaries(row: Row) -> dict[str, Any]:
    texts = [part.get("text") for part in row["summaries"]]
    if len(texts) != 2 or row["choice"] not in (0, 1):
        raise RowDropped("choice names neither summary")
    return {"chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]]}


def _summaries_prompt(row: Row) -> Any:
    info = row["info"]
    return info.get("post") or info.get("article")


def _openai_pair(row: Row, kind: Kind) -> Iterator[Item]:
    request = decode_json(row["input"])
    cells = {"prompt": request.get("messages"), "tools": request.get("tools")}
    if kind == "preference":
        cells |= {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    yield cells


def _nectar(row: Row, kind: Kind) -> Iterator[Item]:
    answers = decode_json(row["answers"])
    replies = [answer.get("answer") for answer in answers]
    ranks = [answer.get("rank") for answer in answers]
    scores = [-rank if isinstance(rank, (int, float)) else None for rank in ranks]
    yield from ranked_items(row["prompt"], replies, scores, kind, margins=False)


def _ultrafeedback(row: Row, kind: Kind) -> Iterator[Item]:
    completions = decode_json(row["completions"])
    replies = [completion.get("response") for completion in completions]
    scores = [completion.get("overall_score") for completion in completions]
    yield from ranked_items(row["instruction"], replies, scores, kind, margins=True)


def _by_prompt(table: Sequence[Row]) -> list[Row]:
    """One row per prompt, with its replies and their helpfulness."""
    groups: dict[str, dict[str, Any]] = {}
    for row in table:
        key = str(row["prompt"])
        group = groups.setdefault(key, {"prompt": row["prompt"], "replies": [], "scores": []})
        group["replies"].append(row["response"])
        group["scores"].append(row["helpfulness"])
    return list(groups.values())


def _rated_replies(row: Row, kind: Kind) -> Iterator[Item]:
    yield from ranked_items(row["prompt"], row["replies"], row["scores"], kind, margins=True)


SHEPHERD_TAG = "ки"
"""The end of every step in Math-Shepherd's input; the label has + or - in its place."""


def _shepherd(row: Row, kind: Kind) -> Iterator[Item]:
    """Steps of a solution; input and label are the same text except for the mark of each step."""
    text, marked = row["input"], row["label"]
    pieces = text.split(SHEPHERD_TAG)
    if len(pieces) < 2 or pieces[-1].strip():
        yield RowDropped("a step ends without its mark")
        return
    labels, position = [], 0
    for piece in pieces[:-1]:
        if marked[position : position + len(piece)] != piece:
            yield RowDropped("input and label differ")
            return
        position += len(piece)
        labels.append(marked[position : position + 1])
        position += 1
    question, mark, first = pieces[0].partition("Step 1:")
    if not set(labels) <= {"+", "-"} or not mark or not question.strip():
        yield RowDropped("a step is marked neither + nor -")
        return
    steps = [f"{mark}{first}".strip(), *(piece.strip() for piece in pieces[1:-1])]
    yield {
        "prompt": question.strip(),
        "steps": steps,
        "labels": [int(label == "+") for label in labels],
    }


def _prm800k(row: Row, kind: Kind) -> Iterator[Item]:
    """The chosen path, and a row for each alternative step, in which only that step is labeled."""
    question = row["question"]
    if kind == "prompt":
        yield {"prompt": question["problem"], "answer": question.get("ground_truth_answer")}
        return
    path: list[str] = []
    labels: list[int | None] = []
    for step in row["label"]["steps"] or ():
        rated = [(part["text"], _rating(part.get("rating"))) for part in step["completions"] or ()]
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        for index, (text, label) in enumerate(rated):
            if index != chosen and label is not None:
                unlabelled = [None] * len(path)
                yield _steps_of(question, [*path, text], [*unlabelled, label])
        if chosen is not None:
            text, label = rated[chosen]
        elif human is not None:
            text, label = human["text"], 1  # written by an annotator because no step was right
        else:
            break
        path.append(text)
        labels.append(label)
    if any(label is not None for label in labels):
        yield _steps_of(question, path, labels)


def _steps_of(question: Row, steps: Sequence[str], labels: Sequence[int | None]) -> Item:
    return {"prompt": question["problem"], "steps": list(steps), "labels": list(labels)}


def _rating(value: Any) -> int | None:
    """Label of a rating: 1 and 0 (neutral) are right, -1 is wrong (Lightman et al. 2023)."""
    return None if value is None else int(value >= 0)


def _is_object(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(decode_json(row.get(name)), Mapping) for name in names)


def _is_list_of(name: str, *keys: str) -> Callable[[Row], bool]:
    def holds(row: Row) -> bool:
        cell = decode_json(row.get(name))
        return (
            isinstance(cell, list)
            and bool(cell)
            and isinstance(cell[0], Mapping)
            and set(keys) <= cell[0].keys()
        )

    return holds


PAIRS: tuple[Kind, ...] = ("preference",)
PAIRS_AND_PROMPTS: tuple[Kind, ...] = ("preference", "prompt")
RANKED: tuple[Kind, ...] = ("preference", "ranking")

SAFETY = Schema(
    "PKU-SafeRLHF by safety",
    frozenset({"prompt", "response_0", "response_1", "safer_response_id"}),
    PAIRS,
    _pku_safety,
    uses=("is_response_0_safe", "is_response_1_safe"),
    gives=("chosen_unsafe", "rejected_unsafe"),
)
"""Replaces PKU-SafeRLHF if `keep` names the labels of a cost model."""

SCHEMAS = (
    Schema(
        "PKU-SafeRLHF",
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        PAIRS,
        _pku_items,
    ),
    Schema(
        "SHP",
        frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
        PAIRS_AND_PROMPTS,
        _pairs(_shp, lambda row: row["history"]),
    ),
    Schema(
        "WebGPT comparisons",
        frozenset({"question", "answer_0", "answer_1", "score_0", "score_1"}),
        PAIRS_AND_PROMPTS,
        _pairs(_webgpt, _webgpt_prompt),
    ),
    Schema(
        "Chatbot Arena",
        frozenset({"conversation_a", "conversation_b", "winner"}),
        PAIRS_AND_PROMPTS,
        _arena,
        uses=("turn",),
    ),
    Schema(
        "Chatbot Arena, one column a verdict",
        frozenset({"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"}),
        PAIRS_AND_PROMPTS,
        _arena_texts,
        uses=("winner_tie",),
        holds=lambda row: "winner_tie" in row,
    ),
    Schema(
        "HelpSteer3",
        frozenset({"context", "response1", "response2", "overall_preference"}),
        PAIRS_AND_PROMPTS,
        _pairs(
            lambda row: _signed(row, "response1", "response2", "overall_preference"),
            lambda row: decode_json(row["context"]),
        ),
    ),
    Schema(
        "HelpSteer2 preference",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        PAIRS,
        _pairs(
            lambda row: _signed(row, "response_1", "response_2", "preference_strength"),
            lambda row: row["prompt"],
        ),
    ),
    Schema(
        "HelpSteer",
        frozenset({"prompt", "response", "helpfulness"}),
        RANKED,
        _rated_replies,
        gather=_by_prompt,
        without=frozenset({"chosen", "rejected"}),
    ),
    Schema(
        "Nectar",
        frozenset({"prompt", "answers"}),
        RANKED,
        _nectar,
        holds=_is_list_of("answers", "answer", "rank"),
    ),
    Schema(
        "UltraFeedback",
        frozenset({"instruction", "completions"}),
        RANKED,
        _ultrafeedback,
        holds=_is_list_of("completions", "response", "overall_score"),
    ),
    Schema(
        "AlpacaFarm",
        frozenset({"instruction", "output_1", "output_2", "preference"}),
        PAIRS,
        _pairs(_alpaca_farm, lambda row: row["instruction"]),
        uses=("input",),
    ),
    Schema(
        "Summarize from feedback",
        frozenset({"info", "summaries", "choice"}),
        PAIRS_AND_PROMPTS,
        _pairs(_summaries, _summaries_prompt),
        holds=_is_list_of("summaries", "text"),
    ),
    Schema(
        "OpenAI preference",
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        PAIRS_AND_PROMPTS,
        _openai_pair,
        holds=_is_object("input"),
    ),
    Schema(
        "OASST trees",
        frozenset({"message_tree_id", "prompt"}),
        ("sft", "preference", "ranking", "prompt"),
        tree_items,
        holds=_is_object("prompt"),
    ),
    Schema(
        "OASST messages",
        frozenset({"message_id", "parent_id", "text", "role"}),
        ("sft", "preference", "ranking", "prompt"),
        tree_items,
        uses=("rank", "deleted", "message_tree_id", "tree_state"),
        gather=gather_messages,
    ),
    Schema(
        "Math-Shepherd",
        frozenset({"input", "label"}),
        ("steps",),
        _shepherd,
        holds=lambda row: SHEPHERD_TAG in str(row.get("input")),
    ),
    Schema(
        "PRM800K",
        frozenset({"question", "label"}),
        ("steps", "prompt"),
        _prm800k,
        holds=_is_object("question", "label"),
    ),
)
"""All schemas, in the order in which they are tried."""
