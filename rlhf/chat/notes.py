"""Short texts about a reply, which the terminal and the page show below it."""

from __future__ import annotations

from rlhf.chat.session import ChatSession
from rlhf.chat.turn import ReplyScore, Turn
from rlhf.common.text import count_text


def reply_notes(session: ChatSession, turn: Turn, index: int) -> list[str]:
    """Return the notes on a reply: whether it is cut off, its score, and the environment's result.

    Args:
        session: The conversation.
        turn: Turn of the reply.
        index: Index of the model.
    """
    reply, score = turn.replies[index], turn.scores[index]
    notes = []
    if reply is not None and reply.is_cut_off:
        notes.append(f"cut off after {count_text(len(reply.completion.tokens), 'token')}")
    if score is not None:
        notes.append(score_text(score))
    if session.env is not None and turn.results[index] is not None:
        notes += _environment_notes(session, turn, index)
    return notes


def score_text(score: ReplyScore) -> str:
    """Return the score of a reply with its components, or the reason why it has none."""
    if score.value is None:
        return f"no score: {score.reason or 'unknown reason'}"
    parts = ", ".join(
        f"{name} {'none' if value is None else format(value, '.4g')}"
        for name, value in score.components.items()
    )
    return f"score {score.value:.4g}" + (f" ({parts})" if len(score.components) > 1 else "")


def _environment_notes(session: ChatSession, turn: Turn, index: int) -> list[str]:
    """Return a reply's reward, its reason if known, and at the end of an episode the return."""
    result = turn.results[index]
    assert result is not None
    _, reward, terminated, truncated, info = result
    notes = [f"reward of the environment {reward:g}"]
    if reason := info.get("reason"):
        notes.append(str(reason))
    # After a vote, the other models continue with the preferred reply.
    continues = turn is session.turns[-1] and turn.preferred in (None, index)
    if terminated or truncated or (continues and session.branches[index].is_over):
        # After a vote, the earlier replies of the episode can be those of another model.
        earlier = session.branches[index].results[: turn.earlier_reply_counts[index]]
        total = sum(step[1] for step in earlier) + reward
        notes.append(f"the episode is over, return {total:g}")
    return notes
