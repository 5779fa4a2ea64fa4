"""Overlap of evaluation with training, counted by the messages before the policy's first reply."""

from rlhf.rollout.batch import Rollout
from rlhf.rollout.items import SeenOpenings


def conversation(question: str, reply: str) -> list[dict[str, str]]:
    """A prompt of three messages, one of them an assistant message, and the policy's reply."""
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, what do you need?"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": reply},
    ]


def test_prompts_that_differ_after_an_assistant_message_are_different():
    rollout = Rollout(0, 0, 0, conversation=conversation("What is 1 + 1?", "2"))
    rollout.append([5], turn=0, logprobs=[0.0])
    openings = SeenOpenings()
    openings.add([rollout])
    rows = [
        {"messages": conversation("What is 1 + 1?", "3"), "turns": 1},
        {"messages": conversation("What is 2 + 2?", "4"), "turns": 1},
    ]
    assert openings.count_rows_with_seen_opening(rows) == 1


def test_openings_are_compared_without_case_white_space_and_unicode_forms():
    rollout = Rollout(0, 0, 0, conversation=conversation("What is x² ?", "2"))
    rollout.append([5], turn=0, logprobs=[0.0])
    openings = SeenOpenings()
    openings.add([rollout])
    rows = [{"messages": conversation("what IS  x2\n?", "3"), "turns": 1}]
    assert openings.count_rows_with_seen_opening(rows) == 1


def test_replies_of_later_turns_do_not_belong_to_the_opening():
    start = [{"role": "user", "content": "A"}]
    first = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "B"}]
    rollout = Rollout(0, 0, 0, conversation=[*start, *first])  # ended by a limit of turns
    rollout.append([5], turn=0, logprobs=[0.0])
    openings = SeenOpenings()
    openings.add([rollout])
    later = [{"role": "assistant", "content": "y"}, {"role": "user", "content": "C"}] * 2
    rows = [{"messages": [*start, *later], "turns": 2}, {"messages": [*first, *start], "turns": 1}]
    assert openings.count_rows_with_seen_opening(rows) == 1
