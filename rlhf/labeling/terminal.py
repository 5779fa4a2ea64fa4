"""Label items in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.common.conversation import Message
from rlhf.common.text import escape_invisible
from rlhf.labeling.session import (
    ConflictingLabel,
    InvalidLabel,
    LabelingSession,
    LabelingTask,
    LabelSettings,
    Submission,
    turn_text,
)

Read = Callable[[str], str]
"""Function that shows a prompt and returns a line; it raises EOFError at the end of the input."""

STRENGTH_NAMES: dict[int, tuple[str, ...]] = {
    1: ("better",),
    2: ("slightly better", "much better"),
    3: ("slightly better", "better", "much better"),
}
"""Number of strengths -> their names, in ascending order."""


def label_in_terminal(
    session: LabelingSession, *, read: Read = input, write: Callable[[str], Any] = print
) -> None:
    """Label items until all are labeled or skipped, the annotator quits, or the input ends.

    Args:
        session: The annotator's session.
        read: Function that reads a line.
        write: Function that prints a text.
    """
    write(commands_text(session.settings))
    note, shown = "", ""
    while (task := session.next_task()) is not None:
        if task.label_id != shown:
            note, shown = "", task.label_id
            progress = session.progress()
            done = progress.labeled + progress.skipped
            write(f"\nItem {done + 1} of {progress.total}")
            write(task_text(task))
        try:
            line = read("> ").strip()
            if line == "q":
                return
            if line == "u":
                _undo_last_label(session, write)
            elif line == "n":
                note = read("Note: ")
            else:
                session.submit(_submission(line, task, session.settings, note, read))
        except EOFError:
            return
        except (InvalidLabel, ConflictingLabel) as error:
            write(f"Not saved: {error}")
    write("All items are labeled or skipped.")


def commands_text(settings: LabelSettings) -> str:
    """Return the commands of the mode."""
    answers = {
        "pairs": "; ".join(f"{key} {text}" for key, text, _ in pair_answers(settings.strengths)),
        "ratings": f"1 to {settings.scale}: the rating, {settings.scale} is the best",
        "rankings": "the numbers of the replies, the best first, such as 2 1 3",
        "demonstrations": "w, then the reply; a line with only a period ends it",
    }[settings.mode]
    return f"{answers}\ns skip; u undo; n note; q quit"


def pair_answers(strengths: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the key, the text and the answer of each choice, in the order of the web page."""
    names = STRENGTH_NAMES[strengths]
    choices: list[tuple[str, dict[str, Any]]] = [
        *(
            (f"reply 1 is {names[s - 1]}", {"choice": "first", "strength": s})
            for s in range(strengths, 0, -1)
        ),
        ("tie", {"choice": "tie"}),
        *(
            (f"reply 2 is {names[s - 1]}", {"choice": "second", "strength": s})
            for s in range(1, strengths + 1)
        ),
    ]
    return [(str(key), text, answer) for key, (text, answer) in enumerate(choices, start=1)]


def task_text(task: LabelingTask) -> str:
    """Return the prompt and the replies as text, with control codes escaped.

    All lines of the data are indented, so that no text looks like the title of a reply.
    """
    parts = [_indented_escaped_turns(task.item.prompt, with_role=True)]
    for position, index in enumerate(task.reply_order, start=1):
        title = f"Reply {position}" if len(task.reply_order) > 1 else "Reply"
        reply = task.item.replies[index]
        parts.append(f"--- {title} ---\n{_indented_escaped_turns(reply, with_role=len(reply) > 1)}")
    return "\n\n".join(parts)


def _indented_escaped_turns(turns: Sequence[Message], *, with_role: bool) -> str:
    texts = [(f"[{turn['role']}] " if with_role else "") + turn_text(turn) for turn in turns]
    return textwrap.indent(escape_invisible("\n".join(texts)), "  ")


def _undo_last_label(session: LabelingSession, write: Callable[[str], Any]) -> None:
    last = session.progress().last_label_id
    if last is None:
        write("There is no label to undo.")
    else:
        session.undo(last)


def _submission(
    line: str, task: LabelingTask, settings: LabelSettings, note: str, read: Read
) -> Submission:
    """Return the submission of a line.

    Raises:
        InvalidLabel: The line is not an answer.
    """
    answer = None if line == "s" else _answer_of_line(line, settings, read)
    return Submission(task.label_id, task.item.item_id, answer, note)


def _answer_of_line(line: str, settings: LabelSettings, read: Read) -> dict[str, Any]:
    """Return the answer of a line; for a written reply, also read the lines of the reply.

    Raises:
        InvalidLabel: The line is not an answer.
    """
    if settings.mode == "pairs":
        for key, _, answer in pair_answers(settings.strengths):
            if line == key:
                return answer
    elif settings.mode == "ratings" and _is_short_number(line):
        return {"rating": int(line)}
    elif settings.mode == "rankings" and all(map(_is_short_number, line.split())):
        best_first = [int(word) for word in line.split()]
        if sorted(best_first) == list(range(1, len(best_first) + 1)):
            return {"ranks": [best_first.index(n) + 1 for n in range(1, len(best_first) + 1)]}
    elif settings.mode == "demonstrations" and line == "w":
        lines = []
        while (text := read("")) != ".":
            lines.append(text)
        return {"completion": "\n".join(lines)}
    raise InvalidLabel(f"{line!r} is not an answer:\n{commands_text(settings)}")


def _is_short_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 9
