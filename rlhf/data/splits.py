"""Split rows so that no prompt is in two parts. The order of the rows does not change the split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf.common.conversation import comparable_text
from rlhf.common.text import count_text
from rlhf.errors import UserError

RowT = TypeVar("RowT", bound=Mapping[str, Any])


def prompt_text(row: Mapping[str, Any], *, with_role_names: bool = True) -> str:
    """Return the prompt of a row as one text, without the system message.

    If the row has no prompt, its text is returned. If `with_role_names` is set, each turn begins
    with the name of its role.
    """
    prompt = row["prompt"] if "prompt" in row else row["text"]
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn["role"] != "system"]
    return "\n".join(
        f"{t['role']}: {t['content']}" if with_role_names else t["content"] for t in turns
    )


def prompt_key(row: Mapping[str, Any]) -> str:
    """Return a hash of the prompt without its system message.

    Case, white space and Unicode forms (NFKC) are ignored.
    """
    return _sha256_hex(comparable_text(prompt_text(row)))


def split_by_prompt(
    rows: Sequence[RowT], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[list[RowT], list[RowT]]:
    """Split rows into (train, held out), with all rows of a prompt in the same part.

    Prompts are held out in the order of a seeded hash, so the split does not depend on the order of
    `rows`. The rows of each part keep their order. A prompt is skipped if the held-out part would
    become larger than requested, so the part may be smaller than requested. If every prompt has
    more rows than requested, the prompt with the fewest rows is held out.

    Args:
        rows: Rows with a prompt.
        fraction: Fraction of the rows to hold out, at least one row; give either `fraction` or
            `count`.
        count: Number of rows to hold out.
        seed: Seed of the split.

    Raises:
        UserError: Neither or both of `fraction` and `count` are given, the value is out of range,
            or there are fewer than two distinct prompts.
    """
    size = held_out_size(len(rows), fraction, count)
    groups = _prompt_groups(rows, seed)
    check_distinct_prompts(len(rows), len(groups))
    held_out: set[int] = set()
    for group in groups:
        if len(held_out) + len(group) <= size:
            held_out.update(group)
    held_out = held_out or set(min(groups, key=len))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [row for index, row in enumerate(rows) if index in held_out]


def folds_by_prompt(
    rows: Sequence[RowT], num_folds: int, *, seed: int
) -> list[tuple[list[RowT], list[RowT]]]:
    """Return `num_folds` pairs (train, held out), each without common prompts.

    Every row is held out in one fold, see `fold_of_each_row`.

    Raises:
        UserError: As in `fold_of_each_row`.
    """
    fold = fold_of_each_row(rows, num_folds, seed=seed)
    return [
        (
            [row for row, f in zip(rows, fold, strict=True) if f != k],
            [row for row, f in zip(rows, fold, strict=True) if f == k],
        )
        for k in range(num_folds)
    ]


def fold_of_each_row(rows: Sequence[Mapping[str, Any]], num_folds: int, *, seed: int) -> list[int]:
    """Return the fold (0 to num_folds - 1) in which each of the N rows is held out.

    Each prompt is assigned to the fold with the fewest rows so far, so folds have similar sizes.

    Raises:
        UserError: There are fewer distinct prompts than folds, or fewer than two folds.
    """
    groups = _prompt_groups(rows, seed)
    if not 2 <= num_folds <= len(groups):
        raise UserError(
            f"num_folds must be between 2 and the number of distinct prompts ({len(groups)}), "
            f"got {num_folds}"
        )
    fold = [0] * len(rows)
    sizes = [0] * num_folds
    for group in groups:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(group)
        for index in group:
            fold[index] = smallest
    return fold


def _prompt_groups(rows: Sequence[Mapping[str, Any]], seed: int) -> list[list[int]]:
    """Return a list of row indices for each prompt; prompts are ordered by a seeded hash."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(prompt_key(row), []).append(index)
    return [groups[key] for key in sorted(groups, key=lambda key: _sha256_hex(f"{seed}/{key}"))]


def check_distinct_prompts(num_rows: int, num_prompts: int) -> None:
    """Raise UserError if there are fewer than two distinct prompts."""
    if num_prompts < 2:
        raise UserError(
            f"cannot split by prompt: {count_text(num_rows, 'row')} with "
            f"{count_text(num_prompts, 'distinct prompt')}, "
            "but a split needs at least 2: add rows with another prompt, or, for sft, reward, dpo "
            "and kto, give eval_data"
        )


def held_out_size(total: int, fraction: float | None, count: int | None) -> int:
    """Return the number of rows to hold out, at least 1, see `split_by_prompt`.

    Raises:
        UserError: Neither or both of `fraction` and `count` are given, or one is out of range.
    """
    if (fraction is None) == (count is None):
        raise UserError("split_by_prompt needs either fraction or count, not both or neither")
    if fraction is not None:
        if not 0 < fraction < 1:
            raise UserError(f"fraction must lie between 0 and 1, got {fraction}")
        return max(1, round(fraction * total))
    if count is None or not 0 < count < total:
        raise UserError(f"count must lie between 1 and {total - 1} (of {total} rows), got {count}")
    return count


def _sha256_hex(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
