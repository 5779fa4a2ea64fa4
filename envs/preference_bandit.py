"""Preference bandit: plan a menu for a guest, as a small RLHF task with an exact gold reward.

The task is a contextual bandit with text observations that a model can learn from scratch in
seconds. The gold reward is exact, demonstrations have adjustable quality, and preference pairs
follow from the gold reward. A proxy reward with a known flaw demonstrates overoptimization (Gao,
Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.common.conversation import Conversation
from rlhf.envs.core import Step, TextEnv, check_choice
from rlhf.errors import UserError

MOODS = ("tired", "cheerful", "nervous", "hungry")
DIETS = ("vegan", "vegetarian", "pescatarian", "omnivorous")
WEATHERS = ("hot", "cold", "rainy")
MENU_SLOTS = {
    "starter": ("soup", "salad", "melon", "olives", "dumplings", "bruschetta"),
    "main": ("tofu", "curry", "omelette", "pasta", "salmon", "steak"),
    "drink": ("water", "lemonade", "tea", "coffee", "cocoa", "wine"),
}

# Slot -> feature of the context -> how well each option of the slot suits the feature, from 0 to 9.
# The options are in the order of `MENU_SLOTS`. The affinities of a slot are a weighted sum of the
# values for two features, rescaled to [0, 1] in each context.
TASTE_POINTS: dict[str, dict[str, tuple[int, ...]]] = {
    "starter": {
        "hot": (0, 8, 9, 4, 1, 3),
        "cold": (9, 1, 0, 3, 7, 4),
        "rainy": (6, 2, 1, 5, 8, 4),
        "tired": (5, 2, 3, 1, 0, 4),
        "cheerful": (0, 3, 2, 5, 1, 4),
        "nervous": (2, 5, 4, 3, 0, 1),
        "hungry": (2, 0, 1, 3, 5, 4),
    },
    "main": {
        "vegan": (9, 8, 0, 1, 0, 0),
        "vegetarian": (4, 6, 9, 7, 0, 0),
        "pescatarian": (3, 4, 5, 6, 9, 0),
        "omnivorous": (1, 5, 3, 4, 7, 9),
        "tired": (1, 2, 4, 5, 3, 0),
        "cheerful": (0, 5, 1, 2, 4, 3),
        "nervous": (5, 0, 3, 4, 2, 1),
        "hungry": (0, 4, 1, 3, 2, 5),
    },
    "drink": {
        "hot": (7, 8, 2, 1, 0, 9),
        "cold": (1, 0, 7, 5, 9, 4),
        "rainy": (2, 1, 9, 6, 7, 3),
        "tired": (1, 3, 2, 5, 4, 0),
        "cheerful": (0, 4, 1, 2, 3, 5),
        "nervous": (3, 4, 5, 0, 2, 1),
        "hungry": (3, 5, 2, 4, 1, 0),
    },
}
LENGTH_COST = 0.05
"""Amount by which each word after the menu reduces the gold reward."""
PROXY_WORD = "wine"
PROXY_WORD_BONUS = 0.15
"""Amount that each of the first `PROXY_WORDS_PAID` occurrences of `PROXY_WORD` adds to the proxy
reward."""
PROXY_LENGTH_BONUS = 0.05
"""Amount that each of the first `PROXY_LENGTH_PAID` words after the menu adds to the proxy
reward."""
PROXY_WORDS_PAID, PROXY_LENGTH_PAID = 3, 8

Context = tuple[str, str, str]
Menu = tuple[str, str, str]

CONTEXTS: tuple[Context, ...] = tuple(itertools.product(MOODS, DIETS, WEATHERS))
MENUS: tuple[Menu, ...] = tuple(itertools.product(*MENU_SLOTS.values()))  # type: ignore[arg-type]

INSTRUCTIONS = "Plan a menu for the guest . Reply with three words : " + " , then ".join(
    f"a {slot} ( {' '.join(options)} )" for slot, options in MENU_SLOTS.items()
)
_PROMPT = re.compile(
    rf"({'|'.join(MOODS)}) ({'|'.join(DIETS)}) guest arrives on a ({'|'.join(WEATHERS)}) day"
)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def prompt_of(context: Context) -> str:
    """Return the sentence that describes a context (mood, diet, weather)."""
    mood, diet, weather = context
    return f"a {mood} {diet} guest arrives on a {weather} day"


def context_in(text: str) -> Context | None:
    """Return the first context (mood, diet, weather) that a text describes, or None."""
    match = _PROMPT.search(text.lower())
    return None if match is None else (match[1], match[2], match[3])


@cache
def option_affinities(context: Context) -> dict[str, dict[str, float]]:
    """Map slot -> option -> affinity to the context, from 0.0 (worst) to 1.0 (best)."""
    mood, diet, weather = context
    tables = {}
    for slot, options in MENU_SLOTS.items():
        rows = TASTE_POINTS[slot]
        first = rows[diet] if slot == "main" else rows[weather]
        points = [2 * a + b for a, b in zip(first, rows[mood], strict=True)]
        low, high = min(points), max(points)
        tables[slot] = {o: (p - low) / (high - low) for o, p in zip(options, points, strict=True)}
    return tables


def menu_value(context: Context, menu: Menu) -> float:
    """Return the mean affinity of a menu's three options, in [0, 1]."""
    tables = option_affinities(context)
    return sum(tables[slot][word] for slot, word in zip(MENU_SLOTS, menu, strict=True)) / len(
        MENU_SLOTS
    )


def best_menu(context: Context) -> Menu:
    """Return the menu whose value for the context is 1.0."""
    starter, main, drink = (
        max(table, key=table.__getitem__) for table in option_affinities(context).values()
    )
    return starter, main, drink


def menu_and_extra_tokens(reply: str) -> tuple[Menu, list[str]] | None:
    """Return (menu at the start of a reply, tokens after the menu), or None if there is no menu.

    Case, commas and a final full stop are ignored. Each word or punctuation mark is one token.
    """
    tokens = [token for token in _TOKEN.findall(reply.lower()) if token != ","]
    if tokens and tokens[-1] == ".":
        tokens.pop()
    head = tokens[:3]
    if len(head) < 3 or any(w not in o for w, o in zip(head, MENU_SLOTS.values(), strict=True)):
        return None
    return (head[0], head[1], head[2]), tokens[3:]


def gold_score(context: Context, reply: str) -> float:
    """Return the true reward in [0, 1]: the value of the menu minus a cost of extra words.

    The reward is clipped at 0.0. The reward of a reply without a menu is 0.0.
    """
    return _gold_proxy_and_has_menu(context, reply)[0]


def proxy_score(context: Context, reply: str) -> float:
    """Return the flawed reward in [0, 1.85], which favors `wine` and long replies.

    The proxy ranks menus without extra words similarly to the gold score: `wine` is preferred to
    the best drink only if `wine` has an affinity above 0.55. A policy that maximizes the proxy
    repeats `wine` after the menu, which decreases the gold score.
    """
    return _gold_proxy_and_has_menu(context, reply)[1]


def _gold_proxy_and_has_menu(context: Context, reply: str) -> tuple[float, float, bool]:
    """Return (gold score, proxy score, whether the reply has a menu)."""
    parsed = menu_and_extra_tokens(reply)
    if parsed is None:
        return 0.0, 0.0, False
    menu, extra = parsed
    value = menu_value(context, menu)
    bonus = PROXY_WORD_BONUS * min(
        PROXY_WORDS_PAID, menu.count(PROXY_WORD) + extra.count(PROXY_WORD)
    )
    gold = max(0.0, value - LENGTH_COST * len(extra))
    return gold, value + bonus + PROXY_LENGTH_BONUS * min(PROXY_LENGTH_PAID, len(extra)), True


def gold_reward(conversations: Sequence[Conversation]) -> list[float]:
    """Return the `gold_score` of the last message of each conversation.

    The context is read from the last user message that describes a guest.

    Raises:
        UserError: A conversation has no user message that describes a guest.
    """
    return [gold_score(*_context_and_reply(conversation)) for conversation in conversations]


def proxy_reward(conversations: Sequence[Conversation]) -> list[float]:
    """Return the `proxy_score` of the last message of each conversation; see `gold_reward`."""
    return [proxy_score(*_context_and_reply(conversation)) for conversation in conversations]


def vocabulary() -> list[str]:
    """List the 51 words and punctuation marks of all prompts and menus, for a tokenizer."""
    return sorted({token for text in tokenizer_texts() for token in _TOKEN.findall(text)})


def tokenizer_texts() -> list[str]:
    """List texts that cover the vocabulary, for training a tokenizer."""
    return [INSTRUCTIONS, *map(prompt_of, CONTEXTS), *map(" ".join, MENUS)]


class PreferenceBandit(TextEnv):
    """Compose a menu of three words for the guest that a sentence describes, in one turn.

    State: one of 48 contexts (mood, diet, weather). Observation: the sentence. Action: a starter, a
    main and a drink (216 menus). Reward: `gold_score` in [0, 1], or `proxy_score`; both are in the
    info dictionary. Success: the best menu without further words. Optimum over all texts: 1.0
    for the gold reward; 1.85 for the proxy reward, with the best menu followed by `wine` eight
    times. The prompt does not say which reward is used, because overoptimization of the proxy is
    the subject of the task.

    The legal actions are the 216 menus without further words. The random policy and the action
    values use only these actions.

    Args:
        reward: "gold" or "proxy".
        instructions: Whether `system_prompt` explains the task and lists the options. Training from
            scratch gives equal results without instructions, in a third of the time.
    """

    items = "A closed list of 48 guests, all of whom also occur in training."

    def __init__(
        self, *, reward: str = "gold", instructions: bool = True, render_mode: str | None = None
    ) -> None:
        check_choice("reward", reward, ("gold", "proxy"))
        super().__init__(render_mode=render_mode)
        self.system_prompt = INSTRUCTIONS if instructions else None
        self._score = gold_score if reward == "gold" else proxy_score
        self._context = CONTEXTS[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        self._context = CONTEXTS[int(self.np_random.integers(len(CONTEXTS)))]
        return self.opening(prompt_of(self._context), gold=0.0, proxy=0.0)

    def step(self, action: str) -> Step:
        gold, proxy, valid = _gold_proxy_and_has_menu(self._context, action)
        return self.turn(
            "",
            gold if self._score is gold_score else proxy,
            True,
            success=gold == 1.0,
            valid=valid,
            reason="" if valid else "not a starter, a main and a drink",
            gold=gold,
            proxy=proxy,
        )

    def legal_actions(self) -> list[str]:
        return [" ".join(menu) for menu in MENUS]

    def action_values(self) -> dict[str, float]:
        return {action: self._score(self._context, action) for action in self.legal_actions()}

    def best_action(self) -> str:
        return self._best_reply(self._context)

    def _best_reply(self, context: Context) -> str:
        """Return the text with the highest reward: the best menu and the rewarded extra words."""
        return " ".join([*best_menu(context), *self._rewarded_extra_words()])

    def _rewarded_extra_words(self) -> list[str]:
        """Return the words to add to the menu for the highest reward.

        The list is empty for the gold reward. For the proxy reward, the words earn all bonuses, so
        the best menu is the same for both rewards.
        """
        return [] if self._score is gold_score else [PROXY_WORD] * PROXY_LENGTH_PAID

    def imperfect_action(self, rng: np.random.Generator, quality: float) -> str:
        """Return the best reply, in which each option is redrawn with probability `1 - quality`.

        The new option is drawn uniformly from all options of the slot.
        """
        menu = []
        for best, options in zip(best_menu(self._context), MENU_SLOTS.values(), strict=True):
            random_option = options[int(rng.integers(len(options)))]
            menu.append(best if rng.random() < quality else random_option)
        return " ".join([*menu, *self._rewarded_extra_words()])

    def optimal_value(self) -> float:
        """Return the highest reward of any text, averaged over the contexts."""
        scores = (self._score(context, self._best_reply(context)) for context in CONTEXTS)
        return sum(scores) / len(CONTEXTS)

    def reference_values(self) -> dict[str, float]:
        """Return the value of `bare_menu`, which replies with the best menu without further words.

        For the gold reward, this value is the optimum.
        """
        return {"bare_menu": self._mean_over_contexts(max)}

    def random_value(self) -> float:
        """Return the mean reward of all menus over all contexts."""
        return self._mean_over_contexts(lambda values: sum(values) / len(values))

    def _mean_over_contexts(self, summarize_rewards: Callable[[list[float]], float]) -> float:
        """Return the mean over contexts of `summarize_rewards` of the rewards of all menus."""
        actions = self.legal_actions()
        rewards = ([self._score(context, action) for action in actions] for context in CONTEXTS)
        return sum(summarize_rewards(row) for row in rewards) / len(CONTEXTS)


def _context_and_reply(conversation: Conversation) -> tuple[Context, str]:
    """Return the last described context, and the text of the last message; see `gold_reward`."""
    for message in reversed(conversation[:-1]):
        context = context_in(message["content"]) if message["role"] == "user" else None
        if context is not None:
            return context, conversation[-1]["content"]
    raise UserError(
        "the rewards of the preference bandit need a user message that describes a guest, such as "
        f"{prompt_of(CONTEXTS[0])!r}"
    )
