"""Serve the page on which an annotator labels items."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf.common.conversation import Message
from rlhf.common.files import describe_write_error
from rlhf.common.text import escape_invisible
from rlhf.errors import UserError
from rlhf.labeling.session import (
    ConflictingLabel,
    InvalidLabel,
    LabelingSession,
    LabelingTask,
    Submission,
    checked_text,
    turn_text,
)
from rlhf.web.pages import Templates, asset_routes

QUESTIONS = {
    "pairs": "Which reply is better?",
    "ratings": "How good is the reply?",
    "rankings": "Rank the replies from best to worst",
    "demonstrations": "Write the best reply",
}
"""Mode -> question to the annotator."""
MAX_SECONDS = 1e6
"""Maximum recorded time for a label, in seconds. Longer times are stored as this maximum."""


def labeling_app(session: LabelingSession, *, guidelines: str = "") -> Starlette:
    """Return the application of the page; `rlhf.web.security.secured` must protect it.

    Args:
        session: The annotator's session.
        guidelines: Text that the page shows above the items.
    """
    templates = Templates("rlhf.labeling")
    settings = session.settings

    def page(request: Request) -> Response:
        return templates.page(
            "label.html",
            annotator=session.annotator,
            file=session.path.name,
            guidelines=guidelines,
            mode=settings.mode,
            question=QUESTIONS[settings.mode],
            strengths=settings.strengths,
            scale=settings.scale,
            settings_id=settings.id,
        )

    def task(request: Request) -> Response:
        progress = session.progress()
        current = session.next_task()
        return JSONResponse(
            {
                "task": None if current is None else task_json(current),
                "labeled": progress.labeled,
                "skipped": progress.skipped,
                "total": progress.total,
                "last": progress.last_label_id,
            }
        )

    def save(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"saved": session.submit(submission_of(body))}

    def undo(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"undone": session.undo(checked_text(body.get("label_id"), "label_id"))}

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/task", task),
            Route("/api/label", _post_endpoint(save), methods=["POST"]),
            Route("/api/undo", _post_endpoint(undo), methods=["POST"]),
            *asset_routes("rlhf.labeling"),
        ]
    )


def task_json(task: LabelingTask) -> dict[str, Any]:
    """Return the data of an item that the page shows, with the replies in the order of the task.

    The data contain no label of the dataset or of another annotator.
    """
    return {
        "label_id": task.label_id,
        "item_id": task.item.item_id,
        "prompt": [turn_json(turn) for turn in task.item.prompt],
        "replies": [
            [turn_json(turn) for turn in task.item.replies[index]] for index in task.reply_order
        ],
    }


def turn_json(turn: Message) -> dict[str, str]:
    """Return the role and the text of a message, with control codes escaped."""
    return {"role": escape_invisible(turn["role"]), "text": escape_invisible(turn_text(turn))}


def submission_of(body: Mapping[str, Any]) -> Submission:
    """Return the submission in the JSON body of a request.

    Raises:
        InvalidLabel: A value has the wrong type or is not allowed, such as a text that is too long.
    """
    answer, seconds, settings_id = (body.get(key) for key in ("answer", "seconds", "settings_id"))
    if answer is not None and not isinstance(answer, dict):
        raise InvalidLabel("answer must be an object, or null to skip the item")
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (is_number and 0 <= seconds < math.inf):
        raise InvalidLabel("seconds must be a number >= 0")
    if settings_id is not None:
        settings_id = checked_text(settings_id, "settings_id")
    return Submission(
        checked_text(body.get("label_id"), "label_id"),
        checked_text(body.get("item_id"), "item_id"),
        answer,
        checked_text(body.get("note", ""), "note"),
        None if seconds is None else float(min(seconds, MAX_SECONDS)),
        settings_id,
    )


def _post_endpoint(action: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable[..., Any]:
    """Return the endpoint that calls a function with the JSON body of a request.

    A malformed request, a refused label or a failed write becomes a response with the key
    ``error``.
    """

    async def endpoint(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _error_response(400, "the request is not JSON")
        if not isinstance(body, dict):
            return _error_response(400, "the request is not a JSON object")
        try:
            return JSONResponse(await run_in_threadpool(action, body))
        except InvalidLabel as error:
            return _error_response(422, str(error))
        except ConflictingLabel as error:
            return _error_response(409, str(error))
        except UserError as error:
            return _error_response(507, f"the change was not saved: {error}")
        except OSError as error:
            return _error_response(507, f"the change was not saved: {describe_write_error(error)}")

    return endpoint


def _error_response(status: int, message: str) -> Response:
    return JSONResponse({"error": escape_invisible(message)}, status)
