"""An environment that counts turns, an engine with fixed replies, and collectors for both."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import torch

from rlhf.config.rollout import RolloutSpec
from rlhf.envs.core import FreeText
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.collector import Collector
from rlhf.rollout.environments.calls import EnvironmentCaller
from rlhf.rollout.environments.workers import LockstepWorkers
from rlhf.rollout.episode import EpisodeSeed
from rlhf.rollout.sampling.base import Completion, FinishReason, Request, SamplingParams
from rlhf.rollout.sampling.continuous import ContinuousEngine, Sampler
from rlhf.rollout.sampling.decoder import make_fastest_matching_decoder
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


class FakeEngine:
    """Completes every episode with these texts in turn, and then with the last one again."""

    policy_version = 0

    def __init__(self, *replies: str, stopped: bool = True) -> None:
        self.replies, self.stopped = replies, stopped
        self.turns: dict[int, int] = {}
        self.requests: list[Request] = []
        self.submitted: list[Request] = []
        """All requests so far."""

    def update_policy(self, version: int) -> None:
        self.policy_version = version

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests += requests
        self.submitted += requests

    def poll(self) -> list[Completion]:
        requests, self.requests = self.requests, []
        return [self.complete(request) for request in requests]

    def complete(self, request: Request) -> Completion:
        turn = self.turns.get(request.episode_id, 0)
        self.turns[request.episode_id] = turn + 1
        text = self.replies[min(turn, len(self.replies) - 1)]
        whole = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * self.stopped
        ids = whole[: request.max_new_tokens]
        ended = self.stopped and len(ids) == len(whole)
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        return Completion(request, ids, [-1.0] * len(ids), reason, self.policy_version)

    def release(self, episode_id: int) -> None:
        del self.turns[episode_id]

    def reset(self) -> None:
        self.requests.clear()


def make_collector(
    engine: Any, make: Callable[[], gym.Env] = Tales, *, context: int = 256, **spec: Any
) -> Collector:
    """A collector with this engine, or with one that samples from this model."""
    calls = EnvironmentCaller(spec.pop("errors", "raise"), spec.pop("timeout", None))
    workers = spec.pop("workers", LockstepWorkers)(calls)
    rollout = RolloutSpec(**spec)
    if isinstance(engine, torch.nn.Module):
        engine = ContinuousEngine(engine, max_rows=rollout.parallel)
    return Collector(engine, make, ChatFormat(TOKENIZER), rollout, context=context, workers=workers)


def episode_seeds(*seeds: int) -> list[EpisodeSeed]:
    return [
        EpisodeSeed(seed, group_index=index, sample_index=0) for index, seed in enumerate(seeds)
    ]


def collect_one(engine: Any, *args: Any, seed: int = 0, **settings: Any) -> Any:
    """The rollout of one episode."""
    return make_collector(engine, *args, **settings).collect(episode_seeds(seed))[0]


class TurnSampler:
    """A sampler whose episodes are given turn by turn, by their new tokens."""

    def __init__(self, model: Any, *, rows: int, **sampling: Any) -> None:
        self.sampler = Sampler(model, rows=rows)
        self.sampling = SamplingParams(**sampling)
        self.tokens: dict[int, list[int]] = {}

    def submit(self, name: int, new_tokens: Sequence[int], seed: int, limit: int) -> None:
        """Start a completion of at most ``limit`` tokens after the new tokens of an episode."""
        tokens = self.tokens.setdefault(name, [])
        tokens += new_tokens
        self.sampler.start_request(Request(name, list(tokens), limit, (seed,), self.sampling))

    def step(self) -> dict[int, Completion]:
        """The completions that ended in one pass, by episode."""
        ended = {c.request.episode_id: c for c in self.sampler.step()}
        for name, completion in ended.items():
            self.tokens[name] += completion.tokens
        return ended

    def release(self, name: int) -> None:
        self.sampler.release(name)
        del self.tokens[name]


def record_pass_lengths(monkeypatch, model: Any) -> list[list[int]]:
    """Tokens of each row in every pass through the model, as they come."""
    make_fastest_matching_decoder(model)  # so that its own comparison pass is not counted
    seen: list[list[int]] = []
    plan_forward_pass = RaggedCache.plan_forward_pass

    def noted(cache: RaggedCache, rows: Any, counts: Any) -> Any:
        seen.append([int(count) for count in counts])
        return plan_forward_pass(cache, rows, counts)

    monkeypatch.setattr(RaggedCache, "plan_forward_pass", noted)
    return seen
