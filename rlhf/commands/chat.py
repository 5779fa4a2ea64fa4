"""Implements `rlhf chat`, with which a user talks to models in the terminal or on a page."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf.config.chat import ChatConfig

if TYPE_CHECKING:
    from rlhf.chat.session import ChatSession


def chat(config: ChatConfig) -> Iterator[str]:
    """Run a chat until the user ends it; yield the address of the page if there is one."""
    if config.interface == "page":
        from rlhf.web import require_web_packages

        require_web_packages("rlhf chat --interface page")
    with _open_session(config) as session:
        if config.interface == "page":
            yield from _serve_page(session, config)
        else:
            _talk_in_terminal(session)


@contextlib.contextmanager
def _open_session(config: ChatConfig) -> Iterator[ChatSession]:
    """Return a context manager of the session; the file of votes is opened before models load."""
    from rlhf.chat.policy import load_policies
    from rlhf.chat.session import ChatSession
    from rlhf.chat.votes import VoteRecorder
    from rlhf.data.load import load_and_log
    from rlhf.labeling.store import LabelFile
    from rlhf.models.rewards import load_rewards
    from rlhf.reward_models.chat_template import prompt_with_tools

    with contextlib.ExitStack() as stack:
        recorder = None
        if config.labels:
            file = stack.enter_context(LabelFile(config.labels))
            recorder = VoteRecorder(file, config.annotator)
        specs = config.env.prompts if config.env else []
        rows = load_and_log(specs, "prompt", data_name="prompts", seed=config.seed)
        reward = load_rewards(config.rewards) if config.rewards else None
        policies = load_policies(config, prompts=[prompt_with_tools(row) for row in rows])
        session = ChatSession(
            policies,
            config.env,
            seed=config.seed,
            reward=reward,
            blind=config.blind,
            on_vote=recorder.record if recorder else None,
            on_unvote=recorder.take_back if recorder else None,
        )
        stack.callback(session.close)
        yield session


def _talk_in_terminal(session: ChatSession) -> None:
    from rlhf.chat.terminal import Terminal

    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # lets `input` edit lines and recall earlier ones

        assert readline
    # The encoding of the terminal may lack a character of a reply.
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        reconfigure(errors="backslashreplace")
    Terminal(session).run()


def _serve_page(session: ChatSession, config: ChatConfig) -> Iterator[str]:
    from rlhf.chat.page import chat_application
    from rlhf.web.security import new_token, secured
    from rlhf.web.server import open_listener, serve

    token = new_token()
    app = secured(chat_application(session, labels=config.labels), token=token)
    listener = open_listener(port=config.port)
    yield f"Chat: open {listener.url(token=token)}\nCtrl-C ends"
    serve(
        app,
        listener,
        stop_message_suffix=f"the votes are in {config.labels}" if config.labels else "",
    )
