"""Adapter for TextWorld: generated text adventures (extra `textworld`)."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.envs.adapters import PrivateGenerators, import_from_extra
from rlhf.envs.core import Step, TextEnv, check_choice, check_range

FIRST_TEST_GAME = 10**6
"""First generator seed of the test split."""


class TextWorld(TextEnv):
    """Play a generated text adventure with one quest.

    State: the state of the game. Observation: first the quest and the room, then the response of
    the game. Action: a command, such as `take key from table`. Reward: the gain in score, divided
    by the maximum score. Success: the quest is completed. The episode ends with the game or after
    `max_turns` commands. Optimum: 1.0, which TextWorld's own walkthrough reaches. Training and test
    games have different generator seeds.

    A game is compiled when it is first drawn, which takes seconds. The compiled game is cached.

    Args:
        rooms: Number of rooms in a game.
        objects: Number of objects in a game.
        quest_length: Number of commands that the quest needs.
        games: Number of games in each split.
        split: "train" or "test".
        folder: Cache of compiled games; None uses a temporary folder of this process.
        max_turns: Maximum number of commands in an episode.
    """

    best_score = 1.0
    separable = True
    items = "A generated game; the generator seeds of evaluation do not occur in training."

    def __init__(
        self,
        rooms: int = 2,
        objects: int = 4,
        quest_length: int = 2,
        *,
        games: int = 10,
        split: str = "train",
        folder: str | None = None,
        max_turns: int = 30,
        render_mode: str | None = None,
    ) -> None:
        check_choice("split", split, ("train", "test"))
        check_range("rooms", rooms, 1, 100)
        check_range("objects", objects, 1, 100)
        check_range("games", games, 1, FIRST_TEST_GAME)
        check_range("quest_length", quest_length, 1, max_turns)
        super().__init__(max_turns=max_turns, render_mode=render_mode)
        self._library = import_from_extra("textworld", "textworld")
        self._games = games
        self._first = 0 if split == "train" else FIRST_TEST_GAME
        self._shape = {"nb_rooms": rooms, "nb_objects": objects, "quest_length": quest_length}
        self._folder = Path(folder) if folder is not None else Path(_temporary_folder().name)
        self._generators = PrivateGenerators()
        self._game: Any = None
        self._state: dict[str, Any] = {"admissible_commands": ["look"], "policy_commands": []}
        self.system_prompt = (
            "You play a text adventure. Write one command per turn, such as: open door, take key "
            f"from table, go north, look, inventory. You have {max_turns} commands."
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.close()
        draw = int(self.np_random.integers(self._games)) if seed is None else seed % self._games
        game = self._first + draw
        wanted = ("objective", "description", "admissible_commands", "policy_commands")
        infos = self._library.EnvInfos(
            max_score=True, score=True, won=True, **dict.fromkeys(wanted, True)
        )
        self._generators.seed(game)
        with self._generators.active(), warnings.catch_warnings():
            # The interpreter warns that it cannot score these games, but TextWorld scores them.
            warnings.simplefilter("ignore")
            self._game = self._library.start(str(self._compiled_game_file(game)), infos)
            self._state = dict(self._game.reset())
        description = _without_input_prompts(self._state["description"])
        text = f"{self._state['objective'].strip()}\n{description}"
        return self.opening(text, game=game)

    def step(self, action: str) -> Step:
        command = " ".join(action.split())[:200]
        valid = command.lower() in self._state["admissible_commands"]
        before = self._state["score"]
        self.turns_left -= 1
        if not valid:
            # The interpreter is a native program, so only admissible commands are passed to it.
            return self.turn("Nothing happens.", 0.0, valid=False, reason="not possible here")
        with self._generators.active():
            state, _, done = self._game.step(command.lower())
        self._state = dict(state)
        gain = (self._state["score"] - before) / self._state["max_score"]
        won = bool(self._state["won"])
        text = _without_input_prompts(self._state["feedback"])
        return self.turn(text, float(gain), bool(done), success=won)

    def close(self) -> None:
        """Stop the game's interpreter."""
        if self._game is not None:
            self._game.close()
            self._game = None

    def legal_actions(self) -> list[str]:
        return sorted(self._state["admissible_commands"])

    def best_action(self) -> str:
        """Return the next command of a walkthrough from the current state."""
        return self._state["policy_commands"][0]

    def optimal_value(self) -> float:
        """Return the maximum score, 1.0; no quest needs more commands than an episode allows."""
        return self.best_score

    def _compiled_game_file(self, generator_seed: int) -> Path:
        """Return the file of the game with this seed; compile it if the file does not exist."""
        name = "-".join(map(str, (*self._shape.values(), generator_seed)))
        path = self._folder / name / "game.z8"
        if not path.exists():
            options = self._library.GameOptions()
            for key, value in self._shape.items():
                setattr(options, key, value)
            options.seeds, options.path = generator_seed, str(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._library.make(options)
        return path


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Create the temporary folder of this process, which is removed when the process exits."""
    return tempfile.TemporaryDirectory(prefix="textworld-")


def _without_input_prompts(text: str) -> str:
    """Remove input prompts and empty lines from a response of the game."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and line != ">")
