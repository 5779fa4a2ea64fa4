"""Environments and keyword arguments with which the stated optima are tested."""

from typing import Any

Variant = tuple[str, dict[str, Any]]

_GRID: dict[str, list[dict[str, Any]]] = {
    "Bandit": [
        {}, {"arms": 2}, {"arms": 2, "horizon": 1}, {"arms": 2, "horizon": 4},
        {"arms": 3, "horizon": 5}, {"arms": 4, "horizon": 3}, {"arms": 5, "horizon": 2},
    ],
    "CliffWalking": [
        {}, {"max_turns": 1}, {"max_turns": 5}, {"max_turns": 12}, {"max_turns": 13},
        {"max_turns": 14}, {"max_turns": 30},
    ],
    "Echo": [{}, {"num_words": 2}, {"num_words": 7}],
    "FrozenLake": [
        {}, {"max_turns": 1}, {"max_turns": 6}, {"max_turns": 20}, {"max_turns": 50},
        {"slippery": False}, {"slippery": False, "max_turns": 5},
        {"slippery": False, "max_turns": 6},
    ],
    "GuessNumber": [
        {}, {"numbers": 2, "guesses": 1}, {"numbers": 7, "guesses": 2},
        {"numbers": 7, "guesses": 3}, {"numbers": 15, "guesses": 3},
        {"numbers": 30, "guesses": 2}, {"numbers": 20, "guesses": 6},
    ],
    "KeyDoor": [
        {}, {"size": 3}, {"size": 3, "step_cost": 0.0}, {"size": 3, "step_cost": 0.02},
        {"size": 5, "step_cost": 0.02}, {"step_cost": 0.0}, {"size": 7},
        {"size": 3, "split": "train"}, {"size": 3, "split": "test"},
    ],
    "KnowledgeGraph": [
        {}, {"hops": 1}, {"hops": 2}, {"hops": 4}, {"hops": 3, "step_cost": 0.0},
        {"hops": 3, "step_cost": 0.1}, {"hops": 1, "step_cost": 0.33},
        {"split": "train"}, {"split": "test"},
    ],
    "KuhnPoker": [
        {"opponent": opponent, "seat": seat}
        for opponent in ("optimal", "random")
        for seat in ("first", "second", "random")
    ],
    "PreferenceBandit": [
        {}, {"instructions": False}, {"reward": "proxy"},
        {"reward": "proxy", "instructions": False},
    ],
    "ProgramSynthesis": [
        {}, {"length": 1}, {"length": 1, "turns": 1}, {"length": 1, "turns": 2, "tests": 1},
        {"length": 2, "turns": 1}, {"length": 2, "turns": 2, "tests": 60},
        {"split": "train"}, {"length": 1, "split": "test"},
    ],
    "Recommend": [{}, {"sessions": 1}, {"sessions": 2}, {"sessions": 3}, {"sessions": 4}],
    "Support": [
        {}, {"cost_limit": 0.0}, {"cost_limit": 0.03}, {"cost_limit": 0.15}, {"cost_limit": 1.0},
        {"turns": 1}, {"turns": 2}, {"turns": 3, "verify_cost": 0.0}, {"verify_cost": 0.2},
        {"honest": 0.3}, {"honest": 0.95}, {"pass_honest": 1.0, "pass_impostor": 0.0},
        {"pass_honest": 0.6}, {"pass_impostor": 0.1},
    ],
    "TMaze": [
        {}, {"length": 1}, {"length": 1, "steps": 2}, {"length": 2, "steps": 3},
        {"length": 6, "steps": 7}, {"length": 4, "steps": 20},
    ],
    "Taxi": [
        {}, {"max_turns": 1}, {"max_turns": 3}, {"max_turns": 6}, {"max_turns": 9},
        {"max_turns": 12}, {"max_turns": 16}, {"max_turns": 20},
    ],
    "TicTacToe": [
        {"opponent": opponent, "seat": seat}
        for opponent in ("optimal", "random")
        for seat in ("first", "second", "random")
    ],
    "ToolLookup": [
        {}, {"hops": 1}, {"hops": 1, "people": 3, "rooms": 2}, {"people": 3, "rooms": 2},
        {"people": 3, "rooms": 2, "call_cost": 0.3}, {"people": 3, "rooms": 3, "call_cost": 0.0},
        {"call_cost": 0.9}, {"hops": 1, "call_cost": 1.0}, {"rooms": 100},
    ],
    "Triage": [
        {}, {"test_cost": 0.0}, {"test_cost": 0.01}, {"test_cost": 0.05}, {"test_cost": 0.1},
        {"test_cost": 0.25}, {"test_cost": 1.0},
    ],
    "Wordle": [
        {}, {"words": 2, "guesses": 1}, {"words": 12, "guesses": 1}, {"words": 12, "guesses": 2},
        {"words": 20, "guesses": 3}, {"words": 30, "guesses": 2},
    ],
}  # fmt: skip
VARIANTS: list[Variant] = [
    (f"text/{name}-v0", kwargs) for name, rows in _GRID.items() for kwargs in rows
]


def named(variants: list[Variant]) -> list[str]:
    """Test ids of variants."""
    return [f"{env_id}{kwargs or ''}" for env_id, kwargs in variants]
