"""Serve the chat as a local page: the API, and the data that the page displays."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.chat.notes import reply_notes
from rlhf.chat.session import SETTINGS, ChatSession, letter_of, parse_seed
from rlhf.chat.turn import Turn
from rlhf.common.files import describe_write_error, find_write_error, json_line
from rlhf.common.foreign import describe_exception
from rlhf.common.text import escape_invisible
from rlhf.errors import UserError
from rlhf.web.pages import Templates, asset_routes

log = logging.getLogger(__name__)

BUSY = "the models are replying: wait, or stop them first"


def chat_application(session: ChatSession, *, labels: str | None = None) -> Starlette:
    """Return the application that serves the page.

    Args:
        session: The conversation. Nothing else may change it while the application runs.
        labels: Path of the file of votes, for the page; None if votes are not recorded.
    """
    return _ChatServer(session, labels).application()


class _ChatServer:
    """Handles the requests of the page. One request at a time uses the session."""

    def __init__(self, session: ChatSession, labels: str | None) -> None:
        self._session, self._labels = session, labels
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._templates = Templates("rlhf.chat")

    def application(self) -> Starlette:
        """Return the ASGI application."""
        changes: dict[str, Callable[[dict[str, Any]], None]] = {
            "undo": lambda body: self._session.undo(),
            "reset": self._reset,
            "settings": self._change_settings,
            "vote": self._vote,
            "unvote": self._unvote,
            "act": lambda body: self._session.reply_for_all_models(_require_text(body, "text")),
        }
        replies: dict[str, Callable[[dict[str, Any]], None]] = {
            "send": lambda body: self._session.add_user_message(_require_text(body, "text")),
            "retry": lambda body: self._session.prepare_retry(),
            "generate": lambda body: None,
        }
        return Starlette(
            lifespan=self._lifespan,
            routes=[
                Route("/", lambda request: self._templates.page("chat.html")),
                Route("/api/state", self._get_state),
                Route("/api/view/{letter}", self._get_token_text),
                Route("/api/transcripts", self._get_transcripts),
                Route("/api/stop", self._post_stop, methods=["POST"]),
                *(
                    Route(f"/api/{name}", self._make_change_endpoint(change), methods=["POST"])
                    for name, change in changes.items()
                ),
                *(
                    Route(f"/api/{name}", self._make_reply_endpoint(change), methods=["POST"])
                    for name, change in replies.items()
                ),
                *asset_routes("rlhf.chat"),
            ],
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Stop the models when the server stops, so that the session can be closed."""
        yield
        self._stop.set()
        await run_in_threadpool(self._busy.acquire)

    # -- requests -----------------------------------------------------------------------------

    def _get_state(self, request: Request) -> Response:
        return self._respond_unless_busy(lambda: JSONResponse(self._page_data()))

    def _get_token_text(self, request: Request) -> Response:
        """Respond with the text of the tokens of a model."""

        def view() -> Response:
            index = self._session.index_of(request.path_params["letter"])
            return JSONResponse(
                {
                    "text": _escape_invisible_in_tree(
                        self._session.branches[index].decode_all_tokens()
                    )
                }
            )

        return self._respond_unless_busy(view)

    def _get_transcripts(self, request: Request) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="conversations.jsonl"'}
        return self._respond_unless_busy(
            lambda: Response(
                "".join(map(json_line, self._session.transcripts())),
                media_type="application/jsonl",
                headers=headers,
            )
        )

    def _respond_unless_busy(self, make_response: Callable[[], Response]) -> Response:
        """Return the response of a function that uses the session, or an error response.

        The status is 409 if the session is in use, 400 after a UserError, and 500 if a file cannot
        be written.
        """
        if not self._busy.acquire(blocking=False):
            return _error_response(409, BUSY)
        try:
            return make_response()
        except UserError as error:
            return _error_response(400, str(error))
        except OSError as error:
            if find_write_error(error) is None:
                raise
            return _error_response(500, f"{error.filename}: {describe_write_error(error)}")
        finally:
            self._busy.release()

    def _post_stop(self, request: Request) -> Response:
        self._stop.set()
        return JSONResponse({})

    def _make_change_endpoint(self, change: Callable[[dict[str, Any]], None]) -> Any:
        """Return an endpoint that changes the session and responds with its state."""

        async def endpoint(request: Request) -> Response:
            body = await _read_json_or_none(request)

            def changed() -> Response:
                change(_require_mapping(body))
                return JSONResponse(self._page_data())

            return await run_in_threadpool(self._respond_unless_busy, changed)

        return endpoint

    def _make_reply_endpoint(self, change: Callable[[dict[str, Any]], None]) -> Any:
        """Return an endpoint that changes the session and then streams the replies.

        Each line of the response is a JSON object with the letter of a reply and its text so far.
        The last object contains the state, and the error if there was one.
        """

        async def endpoint(request: Request) -> Response:
            body = await _read_json_or_none(request)
            return await run_in_threadpool(self._start_reply_stream, change, body)

        return endpoint

    def _start_reply_stream(self, change: Callable[[dict[str, Any]], None], body: Any) -> Response:
        """Change the session, and sample the replies in a thread while they are streamed.

        The status of an error response is 409 if the session is in use, and 400 after a UserError.
        """
        if not self._busy.acquire(blocking=False):
            return _error_response(409, BUSY)
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            change(_require_mapping(body))
            if not self._session.can_generate:
                self._session.begin_turn()  # raises the reason
        except UserError as error:
            self._busy.release()
            return _error_response(400, str(error))
        except BaseException:
            self._busy.release()
            raise
        self._stop.clear()
        # The thread also ends the turn if the browser closes the connection.
        threading.Thread(
            target=self._generate_reply_events, args=(events.put,), daemon=True
        ).start()
        return StreamingResponse(_json_lines_of_events(events), media_type="application/x-ndjson")

    def _generate_reply_events(self, put_event: Callable[[dict[str, Any] | None], None]) -> None:
        """Sample the replies of a turn; put events for the new texts and the state, then None."""
        session = self._session
        last: dict[str, Any] = {}
        try:
            stream = session.generate(interleaved=True)
            for index, text in stream:
                letter = letter_of(session.shown_order.index(index))
                put_event({"letter": letter, "text": escape_invisible(text)})
                if self._stop.is_set():
                    stream.close()
                    button = "Retry" if session.env is None else "Let the models reply"
                    last = {"error": f'stopped: "{button}" samples the replies again'}
                    break
        except UserError as error:
            last = {"error": escape_invisible(str(error))}
        except Exception as error:
            log.exception("the replies could not be sampled")
            last = {"error": escape_invisible(describe_exception(error))}
        finally:
            try:
                put_event(last | {"state": self._page_data()})
            finally:
                put_event(None)
                self._busy.release()

    # -- changes ------------------------------------------------------------------------------

    def _reset(self, body: dict[str, Any]) -> None:
        """Start a new conversation, with the next seed if ``next`` in the body is true."""
        if body.get("next") is True:
            self._session.start_next_episode()
        else:
            self._session.reset()

    def _change_settings(self, body: dict[str, Any]) -> None:
        """Change the settings that the body contains.

        A new seed or system message starts a new conversation.
        """
        session = self._session
        seed = parse_seed(_require_text(body, "seed")) if "seed" in body else session.seed
        current = session.settings.system or ""
        system = _require_text(body, "system") if "system" in body else current
        if changes := {key: body[key] for key in SETTINGS if key in body}:
            session.set_sampling(changes)
        if system != current:
            session.set_system(system)
        if seed != session.seed:
            session.reset(seed=seed)

    def _vote(self, body: dict[str, Any]) -> None:
        """Record a vote for the reply with a letter, or a tie if the letter is null.

        In another turn, the same letter can belong to another model, so a vote from a page with an
        earlier state is refused.
        """
        self._check_turn_is_last(body)
        if "letter" not in body:
            raise UserError("the body must have the letter of a reply, or null for a tie")
        letter = body["letter"]
        self._session.vote(None if letter is None else self._session.index_of(str(letter)))

    def _unvote(self, body: dict[str, Any]) -> None:
        self._check_turn_is_last(body)
        self._session.unvote()

    def _check_turn_is_last(self, body: dict[str, Any]) -> None:
        """Raise UserError if there are turns and the id in the body is not that of the last one."""
        turns = self._session.turns
        if turns and _require_text(body, "turn") != turns[-1].turn_id:
            raise UserError("the conversation has changed in another window: reload the page")

    # -- state --------------------------------------------------------------------------------

    def _page_data(self) -> dict[str, Any]:
        """Return the data that the page shows, in which invisible characters are escaped."""
        session = self._session
        messages = session.branches[0].conversation
        prompt = session.turns[0].prompts[0] if session.turns else messages
        waiting = {
            letter_of(position): session.branches[index].conversation
            for position, index in enumerate(session.shown_order)
            if session.branches[index].needs_reply
        }
        return _escape_invisible_in_tree(
            {
                "models": [policy.name for policy in session.policies],
                "environment": session.env is not None,
                "blind": session.blind,
                "opening": [_role_and_content(message) for message in prompt[:-1]],
                "turns": [_turn_data(session, turn) for turn in session.turns],
                "waiting": _last_messages_by_letter(waiting),
                "can_generate": session.can_generate,
                "no_vote_because": session.why_vote_impossible,
                "labels": self._labels,
                # JavaScript represents integers exactly only up to 2**53.
                "seed": str(session.seed),
                "system": session.settings.system or "",
                "settings": {key: getattr(session.settings, key) for key in SETTINGS},
            }
        )


def _turn_data(session: ChatSession, turn: Turn) -> dict[str, Any]:
    """Return the replies of a turn in the order in which they are shown."""
    prompts, replies = {}, []
    for position, index in enumerate(turn.order):
        reply = turn.replies[index]
        if reply is None:
            continue
        letter = letter_of(position)
        prompts[letter] = turn.prompts[index]
        is_named = len(session.policies) > 1 and (turn.is_voted or not session.blind)
        result = turn.results[index]
        replies.append(
            {
                "letter": letter,
                "name": session.policies[index].name if is_named else None,
                "text": reply.text,
                "notes": reply_notes(session, turn, index),
                "end": result[0] if result is not None and (result[2] or result[3]) else "",
                "preferred": turn.is_voted and turn.preferred == index,
            }
        )
    return {
        **_last_messages_by_letter(prompts),
        "id": turn.turn_id,
        "replies": replies,
        "given_by_user": turn.given_by_user,
        "is_voted": turn.is_voted,
        "is_tie": turn.is_voted and turn.preferred is None,
    }


def _last_messages_by_letter(prompts: dict[str, Any]) -> dict[str, Any]:
    """Return the last message of each prompt: once if all are equal, otherwise by letter."""
    last = {letter: str(prompt[-1]["content"]) for letter, prompt in prompts.items() if prompt}
    if len(set(last.values())) == 1:
        return {"message": next(iter(last.values())), "messages": {}}
    return {"message": None, "messages": last}


def _role_and_content(message: dict[str, Any]) -> dict[str, str]:
    return {"role": str(message["role"]), "content": str(message["content"])}


def _escape_invisible_in_tree(tree: Any) -> Any:
    """Return a copy of plain data in which invisible characters are escaped."""
    if isinstance(tree, str):
        return escape_invisible(tree)
    if isinstance(tree, dict):
        return {key: _escape_invisible_in_tree(value) for key, value in tree.items()}
    return [_escape_invisible_in_tree(item) for item in tree] if isinstance(tree, list) else tree


def _json_lines_of_events(events: queue.SimpleQueue[dict[str, Any] | None]) -> Iterator[str]:
    """Yield events as lines of JSON until None."""
    while (event := events.get()) is not None:
        yield json.dumps(event) + "\n"


def _error_response(status: int, reason: str) -> Response:
    return JSONResponse({"error": escape_invisible(" ".join(reason.split()))}, status)


async def _read_json_or_none(request: Request) -> Any:
    """Return the JSON value in the body of a request, or None if the body is not JSON."""
    try:
        return json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError):
        return None


def _require_mapping(body: Any) -> dict[str, Any]:
    """Return the body of a request; raise UserError if it is not a JSON object."""
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    return body


def _require_text(body: dict[str, Any], key: str) -> str:
    """Return a text in the body of a request; raise UserError if it is missing."""
    if not isinstance(body.get(key), str):
        raise UserError(f"the body must have the text {key!r}")
    return body[key]
