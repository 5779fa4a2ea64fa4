"""Preference bandit: plan a guest's menu. RLHF in miniature, with a gold reward one can compute.

A contextual bandit in words: small enough to learn from scratch in seconds, with the whole story in
it. The gold reward is exact, demonstrations have a dial for their quality, preference pairs follow
from the gold reward, and a proxy reward with a planted flaw shows what over-optimisation does (Gao,
Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from rlhf.envs.core import Conversation, Step, TextEnv, check_choice
from rlhf.errors import UserError

MOODS = ("tired", "cheerful", "nervous", "hungry")
DIETS = ("vegan", "vegetarian", "pescatarian", "omnivorous")
WEATHERS = ("hot", "cold", "rainy")
SLOTS = {
    "starter": ("soup", "salad", "melon", "olives", "dumplings", "bruschetta"),
    "main": ("tofu", "curry", "omelette", "pasta", "salmon", "steak"),
    "drink": ("water", "lemonade", "tea", "coffee", "cocoa", "wine"),
}

# How well each option of a slot (in the order above) suits a feature of the guest: 0 not at all ...
# 9. A slot's affinity adds two features' rows and is then stretched to [0, 1] within the context.
TASTES: dict[str, dict[str, tuple[int, ...]]] = {
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
"""What each word beyond the menu costs in gold reward."""
PROXY_WORD = "wine"
PROXY_WORD_BONUS = 0.15
"""What the proxy overpays for each `PROXY_WORD` (at most three)."""
PROXY_LENGTH_BONUS = 0.05
"""What the proxy pays, instead of charging, for each word beyond the menu (at most eight)."""
PROXY_WORDS_PAID, PROXY_LENGTH_PAID = 3, 8

Context = tuple[str, str, str]
Menu = tuple[str, str, str]

CONTEXTS: tuple[Context, ...] = tuple(itertools.product(MOODS, DIETS, WEATHERS))
MENUS: tuple[Menu, ...] = tuple(itertools.product(*SLOTS.values()))  # type: ignore[arg-type]

INSTRUCTIONS = "Plan a menu for the guest . Reply with three words : " + " , then ".join(
    f"a {slot} ( {' '.join(options)} )" for slot, options in SLOTS.items()
)
_PROMPT = re.compile(
    rf"({'|'.join(MOODS)}) ({'|'.join(DIETS)}) guest arrives on a ({'|'.join(WEATHERS)}) day"
)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def prompt_of(context: Context) -> str:
    """The sentence that describes a context (mood, diet, weather)."""
    mood, diet, weather = context
    return f"a {mood} {diet} guest arrives on a {weather} day"


def context_in(text: str) -> Context | None:
    """The context that a text describes, or None."""
    found = _PROMPT.search(text.lower())
    return None if found is None else (found[1], found[2], found[3])


@cache
def affinities(context: Context) -> dict[str, dict[str, float]]:
    """For each slot, how well each option suits the context: the best 1.0, the worst 0.0."""
    mood, diet, weather = context
    tables = {}
    for slot, options in SLOTS.items():
        rows = TASTES[slot]
        first = rows[diet] if slot == "main" else rows[weather]
        points = [2 * a + b for a, b in zip(first, rows[mood], strict=True)]
        low, high = min(points), max(points)
        tables[slot] = {o: (p - low) / (high - low) for o, p in zip(options, points, strict=True)}
    return tables


def menu_value(context: Context, menu: Menu) -> float:
    """Mean affinity of a menu's three options, in [0, 1]."""
    tables = affinities(context)
    return sum(tables[slot][word] for slot, word in zip(SLOTS, menu, strict=True)) / len(SLOTS)


def best_menu(context: Context) -> Menu:
    """The menu of value 1.0."""
    starter, main, drink = (
        max(table, key=table.__getitem__) for table in affinities(context).values()
    )
    return starter, main, drink


def parse_reply(reply: str) -> tuple[Menu, list[str]] | None:
    """The menu at the start of a reply and the tokens after it, or None when there is no menu.

    Case, commas and a final full stop do not matter. Each later word or sign is one extra token.
    """
    tokens = [token for token in _TOKEN.findall(reply.lower()) if token != ","]
    if tokens and tokens[-1] == ".":
        tokens.pop()
    head = tokens[:3]
    if len(head) < 3 or any(w not in o for w, o in zip(head, SLOTS.values(), strict=True)):
        return None
    return (head[0], head[1], head[2]), tokens[3:]


def gold_score(context: Context, reply: str) -> float:
    """The true reward in [0, 1]: menu value less the cost of extra words; 0.0 without a menu."""
    return _scores(context, reply)[0]


def proxy_score(context: Context, reply: str) -> float:
    """The flawed reward: likes wine and long replies. In [0, 1.85]; 0.0 without a menu.

    Among bare menus it ranks much as gold does: `wine` wins its slot only where it is a fair drink
    anyway (affinity above 0.55). A policy that maximises it repeats the word, and gold falls.
    """
    return _scores(context, reply)[1]


def _scores(context: Context, reply: str) -> tuple[float, float, bool]:
    """Gold, proxy, and whether the reply has a menu."""
    parsed = parse_reply(reply)
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
    """`gold_score` of each conversation's last reply, the context being read from the prompt.

    Raises:
        UserError: a conversation has no user message that describes a guest.
    """
    return [gold_score(*_context_and_reply(conversation)) for conversation in conversations]


def proxy_reward(conversations: Sequence[Conversation]) -> list[float]:
    """`proxy_score` of each conversation's last reply; as `gold_reward` otherwise."""
    return [proxy_score(*_context_and_reply(conversation)) for conversation in conversations]


def vocabulary() -> list[str]:
    """Every word and sign of prompts, instructions and menus, sorted: 60 or so, for a word
    tokenizer.
    """
    return sorted({token for text in texts() for token in _TOKEN.findall(text)})


def texts() -> list[str]:
    """Texts that cover the vocabulary, from which a tokenizer can be trained."""
    return [INSTRUCTIONS, *map(prompt_of, CONTEXTS), *map(" ".join, MENUS)]


class PreferenceBandit(TextEnv):
    """One turn: a sentence describes a guest, and the reply is a menu of three words.

    State: one of 48 contexts (mood, diet, weather). Observation: the sentence. Action: a starter, a
    main and a drink (216 menus). Reward: `gold_score` in [0, 1], or `proxy_score`; both are in the
    info dictionary. Success: the best menu and nothing else. Optimum over all texts: 1.0 for gold;
    1.85 for the proxy, which the best menu with eight times `wine` after it earns. The agent is not
    told who pays, for that is the subject.

    Legal actions, hence the random policy and the action values, are the 216 bare menus.

    Args:
        reward: "gold" or "proxy".
        instructions: Whether `system_prompt` explains the task and lists the options. A model
        trained
            from scratch learns as well without, and three times faster.
    """

    items = "A closed list of 48 guests, all of them in training too."

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
        super().reset(seed=seed)
        self._context = CONTEXTS[int(self.np_random.integers(len(CONTEXTS)))]
        return self.opening(prompt_of(self._context), gold=0.0, proxy=0.0)

    def step(self, action: str) -> Step:
        gold, proxy, valid = _scores(self._context, action)
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
        """The reply that earns most of all texts: under the proxy, a menu and flattery."""
        return " ".join([*best_menu(self._context), *self._flattery()])

    def _flattery(self) -> list[str]:
        """The words after the menu that the reward pays for.

        The bonuses of the proxy do not depend on the menu, as the words after it can earn all of
        them; so the best menu stays the best.
        """
        return [] if self._score is gold_score else [PROXY_WORD] * PROXY_LENGTH_PAID

    def expert(self, rng: np.random.Generator | None = None, *, quality: float = 1.0) -> str:
        """The best reply, each slot of which is random instead with probability `1 - quality`.

        Raises:
            UserError: `quality` is below 1 and there is no generator.
        """
        if quality == 1.0:
            return self.best_action()
        if rng is None or not 0.0 <= quality <= 1.0:
            raise UserError(f"expert needs a generator and a quality in [0, 1], got {quality}")
        chosen = []
        for best, options in zip(best_menu(self._context), SLOTS.values(), strict=True):
            free = options[int(rng.integers(len(options)))]
            chosen.append(best if rng.random() < quality else free)
        return " ".join([*chosen, *self._flattery()])

    def optimal_value(self) -> float:
        """Mean over contexts of the best text's reward."""
        flattery = self._flattery()
        best = (" ".join([*best_menu(context), *flattery]) for context in CONTEXTS)
        scores = map(self._score, CONTEXTS, best)
        return sum(scores) / len(CONTEXTS)

    def reference_values(self) -> dict[str, float]:
        """`bare_menu`: the best menu with nothing after it (under gold that is the optimum)."""
        return {"bare_menu": self._mean_over_contexts(max)}

    def random_value(self) -> float:
        """Mean reward of all menus over all contexts."""
        return self._mean_over_contexts(lambda values: sum(values) / len(values))

    def _mean_over_contexts(self, summary: Any) -> float:
        actions = self.legal_actions()
        rewards = ([self._score(context, action) for action in actions] for context in CONTEXTS)
        return sum(summary(row) for row in rewards) / len(CONTEXTS)


def _context_and_reply(conversation: Conversation) -> tuple[Context, str]:
    for message in reversed(conversation[:-1]):
        context = context_in(message["content"]) if message["role"] == "user" else None
        if context is not None:
            return context, conversation[-1]["content"]
    raise UserError("this reward reads the guest from the prompt, and no user message has one")
