"""Use a language model as a judge: rate single replies, or compare replies in both orders.

A judge is a function ``generate(prompts: list[str]) -> list[str | Exception | None]``. It can call
a local model, or be the result of :func:`endpoint` for an OpenAI-compatible server. If the answer
to a prompt is None, an exception, or a text without a rating or a winner, there is no score, and
the reason is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rlhf.common.chat_api import chat_completion_function, result_within
from rlhf.common.foreign import describe_exception, limit_side_effects
from rlhf.errors import UserError
from rlhf.reward_models.core import (
    Conversation,
    Reward,
    Score,
    Scores,
    Unscorable,
    content_text,
    score_each,
)

Answer = str | Exception | None
"""Answer of a judge; an exception or None if there is no answer."""
Generate = Callable[[list[str]], Sequence[Answer]]
"""Function that returns the judge's answer to each prompt."""

RATING = """Rate how well the last reply serves the user: correct, relevant, clear, harmless.

{conversation}

Think briefly, then end with a line "Rating: N", N a whole number from {low} to {high}."""

COMPARISON = """Which reply serves the user better: more correct, relevant, clear, harmless?
Neither order nor length is a reason.

{prompt}

[Reply A]
{first}

[Reply B]
{second}

Think briefly, then end with a line "Winner: A" or "Winner: B"."""

_RATING_PATTERN = re.compile(r"rating\W{1,4}(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_WINNER_PATTERN = re.compile(r"winner\W{1,4}(?:reply\s+)?([AB])\b", re.IGNORECASE)


class RatingJudge(Reward):
    """Reward that is a judge's rating of each conversation, scaled from [low, high] to [0, 1].

    Args:
        generate: Function that returns the judge's answers.
        template: Prompt of the judge with the field ``{conversation}``, and optionally ``{low}``
            and ``{high}``. The answer must contain "Rating: N".
        low: Lowest rating.
        high: Highest rating.
        name: Name of the component.

    Raises:
        UserError: ``low`` is not below ``high``, or the template lacks ``{conversation}``.
    """

    independent = waits = True

    def __init__(
        self,
        generate: Generate,
        *,
        template: str = RATING,
        low: int = 1,
        high: int = 10,
        name: str = "judge",
    ):
        if not low < high:
            raise UserError(f"judge: low must be below high, got low={low}, high={high}")
        _require_template_fields(template, ("conversation",))
        self.generate, self.template, self.name = generate, template, name
        self.low, self.high = low, high

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        prompts = [
            _fill_template(
                self.template,
                conversation=format_for_judge(c),
                low=str(self.low),
                high=str(self.high),
            )
            for c in conversations
        ]
        answers = _generate_answers(self.generate, prompts)
        values, reasons, counts = score_each(self._scaled_rating, answers, name=self.name)
        return Scores(values, {self.name: values}, counts, reasons)

    def _scaled_rating(self, answer: Answer) -> float:
        """Return the last rating in an answer, scaled to [0, 1].

        Raises:
            Unscorable: The answer is not text, has no rating, or the rating is out of range.
        """
        if isinstance(answer, Exception):
            raise Unscorable(describe_exception(answer))
        if not isinstance(answer, str):
            kind = type(answer).__name__
            raise Unscorable(
                "no answer" if answer is None else f"the answer is of type {kind}, not text"
            )
        ratings = _RATING_PATTERN.findall(answer)
        if not ratings:
            raise Unscorable("no rating in answer")
        rating = float(ratings[-1])
        if not self.low <= rating <= self.high:
            raise Unscorable("rating out of range")
        return (rating - self.low) / (self.high - self.low)


class PairJudge:
    """Estimate P(first reply is better) from two comparisons by a judge, one for each order.

    If the winner depends on the order of the replies, the estimate is 0.5, and the pair is counted
    as ``swapped`` in ``counts``; the other keys are ``agreed`` and ``no verdict``. GPT-4 was
    consistent in only 65% of the pairs of Zheng et al. (2306.05685). This class is not a
    :class:`Reward`, because it scores pairs. Use it to label preference data or to evaluate a
    policy.

    Args:
        generate: Function that returns the judge's answers.
        template: Prompt of the judge with the fields ``{prompt}``, ``{first}`` and ``{second}``.
            The answer must contain "Winner: A" or "Winner: B".
    """

    def __init__(self, generate: Generate, *, template: str = COMPARISON):
        _require_template_fields(template, ("prompt", "first", "second"))
        self.generate, self.template = generate, template
        self.counts: Counter[str] = Counter()

    def prefer(self, first: Sequence[Conversation], second: Sequence[Conversation]) -> list[Score]:
        """Compare the conversations of N pairs; both conversations of a pair have the same prompt.

        Returns:
            For each pair, [N]: 1.0 if the first reply wins in both orders, 0.0 if the second reply
            wins in both orders, 0.5 if the winners differ, and None if an answer has no winner.

        Raises:
            UserError: The conversations of a pair have different prompts.
        """
        prompts = []
        for a, b in zip(first, second, strict=True):
            if a[:-1] != b[:-1]:
                raise UserError("judge: the two conversations of a pair must have the same prompt")
            shared = {"prompt": format_for_judge(a[:-1])}
            texts = [content_text(talk[-1].get("content")) for talk in (a, b)]
            prompts.append(_fill_template(self.template, **shared, first=texts[0], second=texts[1]))
            prompts.append(_fill_template(self.template, **shared, first=texts[1], second=texts[0]))
        answers = _generate_answers(self.generate, prompts)
        return [self._combine_answers(*answers[i : i + 2]) for i in range(0, len(answers), 2)]

    def _combine_answers(self, straight: Answer, swapped: Answer) -> Score:
        """Combine the answers for the given and for the swapped order; see `prefer`."""
        texts = [answer if isinstance(answer, str) else "" for answer in (straight, swapped)]
        letters = [_WINNER_PATTERN.findall(text) for text in texts]
        if not all(letters):
            self.counts["no verdict"] += 1
            return None
        wins = letters[0][-1].upper() == "A", letters[1][-1].upper() == "B"
        self.counts["agreed" if wins[0] == wins[1] else "swapped"] += 1
        return (wins[0] + wins[1]) / 2


def format_for_judge(conversation: Conversation) -> str:
    """Format a conversation as paragraphs, each with the role in brackets on its first line."""
    return "\n\n".join(
        f"[{m['role'].capitalize()}]\n{content_text(m.get('content'))}" for m in conversation
    )


def _fill_template(template: str, **fields: str) -> str:
    """Replace each ``{name}`` by its field in one pass, so that braces in a reply are kept."""
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in fields))
    return pattern.sub(lambda match: fields[match.group()[1:-1]], template)


def _require_template_fields(template: str, fields: Sequence[str]) -> None:
    for field in fields:
        if f"{{{field}}}" not in template:
            raise UserError(f"judge: the template must contain the field {{{field}}}")


def _generate_answers(generate: Generate, prompts: list[str]) -> list[Answer]:
    """Return the judge's answer to each prompt.

    If the judge raises an exception, the exception is the answer to every prompt.

    Raises:
        UserError: The judge raised a UserError, or the number of answers is not that of prompts.
    """
    if not prompts:
        return []
    try:
        with limit_side_effects():
            answers = list(generate(list(prompts)))
    except UserError:
        raise
    except Exception as error:
        return [error] * len(prompts)
    if len(answers) != len(prompts):
        raise UserError(f"judge: got {len(answers)} answers to {len(prompts)} prompts")
    return answers


def endpoint(
    url: str,
    model: str,
    *,
    timeout: float = 60.0,
    parallel: int = 4,
    max_tokens: int = 512,
) -> Generate:
    """Return a judge that is a model on an OpenAI-compatible server, with greedy decoding.

    If a request fails, exceeds the timeout or has a malformed response, the exception is returned
    as the answer. The API key is read from the environment variable ``OPENAI_API_KEY``.

    Args:
        url: Address of the server, such as ``http://localhost:8000/v1``.
        model: Name of the model on the server.
        timeout: Time limit, in seconds, of a request, from the connection to the end of the answer.
        parallel: Number of concurrent requests.
        max_tokens: Maximum length of an answer, in tokens.

    Raises:
        UserError: The address contains a user name or a password, or the API key contains a
            character that is not allowed in an HTTP header.
    """
    complete = chat_completion_function(url, timeout=timeout, what="judge")

    def request_answer(prompt: str) -> Answer:
        messages = [{"role": "user", "content": prompt}]
        query = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        try:
            answer = complete(query)["choices"][0]["message"]["content"]
        except Exception as error:  # a malformed response must not end the other requests
            return error.with_traceback(None)  # the frames would keep the response in memory
        return answer if isinstance(answer, str) else None

    def answer(prompt: str) -> Answer:
        return result_within(timeout, lambda: request_answer(prompt))

    def generate(prompts: list[str]) -> list[Answer]:
        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(answer, prompts))

    return generate


def rating_judge(
    url: str,
    model: str,
    template: str = RATING,
    low: int = 1,
    high: int = 10,
    timeout: float = 60.0,
    parallel: int = 4,
) -> Reward:
    """Build a reward of kind ``judge``: ratings by a model on an OpenAI-compatible server.

    The arguments are those of :func:`endpoint` and :class:`RatingJudge`.
    """
    generate = endpoint(url, model, timeout=timeout, parallel=parallel)
    return RatingJudge(generate, template=template, low=low, high=high)
