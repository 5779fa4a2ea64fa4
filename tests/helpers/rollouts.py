"""An environment that counts, replies from a script, and collectors for both."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym

from rlhf.config.rollout import RolloutSpec
from rlhf.envs.core import FreeText
from rlhf.rollout import collector as collect_module
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.collector import Collector, EpisodeSeed
from rlhf.rollout.sampling.continuous import Reply
from rlhf.rollout.sampling.decoder import decoder_for
from rlhf.rollout.sampling.kv_cache import RaggedCache
from tests.helpers.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Tales(gym.Env):
    """Says a number drawn from the seed, then counts turns; "stop" ends it, "fail" breaks it."""

    observation_space = FreeText()
    action_space: Any = FreeText()
    system_prompt: str | None = None
    made: list["Tales"] = []  # noqa: RUF012

    def __init__(self, **info: Any) -> None:
        self.info, self.closed, self.actions = info, False, []
        Tales.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turns, self.start = 0, int(self.np_random.integers(1000))
        return f"start {self.start}", dict(self.info)

    def step(self, action):
        self.actions.append(action)
        self.turns += 1
        if "fail" in str(action):
            raise RuntimeError("broken\nin two lines")
        over = "stop" in str(action)
        return f"turn {self.turns}", float(self.turns), over, False, {"cost": 0.5}

    def close(self) -> None:
        self.closed = True


def scripted(monkeypatch, *replies: str, stopped: bool = True) -> None:
    """Every episode says these in turn, then the last one again and again."""

    class Script:
        def __init__(self, model: Any, **settings: Any) -> None:
            self.prefilled, self.turns, self.asked = 0, {}, {}

        def submit(self, name, new_tokens, noise) -> None:
            self.asked[name] = len(noise)

        def release(self, name) -> None:
            del self.turns[name]

        def step(self) -> dict[int, Reply]:
            answers = {}
            for name, limit in self.asked.items():
                said = self.turns.get(name, 0)
                self.turns[name] = said + 1
                text = replies[min(said, len(replies) - 1)]
                ids = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * stopped
                cut = ids[:limit]
                answers[name] = Reply(cut, [-1.0] * len(cut), stopped and len(cut) == len(ids))
            self.asked = {}
            return answers

    monkeypatch.setattr(collect_module, "Sampler", Script)


def collector(make: Callable[[], gym.Env] = Tales, *, context: int = 256, **spec: Any) -> Collector:
    errors = spec.pop("errors", "raise")
    return Collector(
        make, ChatFormat(TOKENIZER), RolloutSpec(**spec), context=context, errors=errors
    )


def starts(*seeds: int) -> list[EpisodeSeed]:
    return [EpisodeSeed(seed, group=index, member=0) for index, seed in enumerate(seeds)]


def one(*args: Any, seed: int = 0, **settings: Any) -> Any:
    return collector(*args, **settings).collect(None, starts(seed))[0]


def passes(monkeypatch, model: Any) -> list[list[int]]:
    """Tokens of each row in every pass through the model, as they come."""
    decoder_for(model)  # its own comparison is not to be counted
    seen: list[list[int]] = []
    prepare = RaggedCache.prepare

    def noted(cache: RaggedCache, rows: Any, counts: Any) -> Any:
        seen.append([int(count) for count in counts])
        return prepare(cache, rows, counts)

    monkeypatch.setattr(RaggedCache, "prepare", noted)
    return seen
