"""Implement PPO in one file with the pure functions of `rlhf.algorithms`.

    python examples/ppo_from_scratch.py

A transformer learns to write lower-case vowels. `rlhf.stage("ppo", ...)` runs the same algorithm.
"""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import torch

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.registry import configured_algorithm
from rlhf.config.model import ScratchSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.envs.core import FreeText
from rlhf.models.policy import Policy
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.rollout.batch import collate
from rlhf.rollout.collector import Collector
from rlhf.rollout.episode import EpisodeSeed

STEPS, EPISODES, MAX_TOKENS = 20, 64, 4


class Vowels(gym.Env):
    """An environment with one turn; the reward is the number of vowels divided by `MAX_TOKENS`."""

    observation_space = FreeText()
    action_space = FreeText()
    max_turns = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Return the prompt."""
        super().reset(seed=seed)
        return "vowels", {}

    def step(self, action: str):
        """Return the reward of the completion, and end the episode."""
        return "", sum(letter in "aeiou" for letter in action) / MAX_TOKENS, True, False, {}


gym.register(id="example/Vowels-v0", entry_point=Vowels)


def main() -> None:
    """Train, and print the mean return of each batch of episodes."""
    tokenizer = make_tokenizer(["vowels"], vocab_size=320)
    spec = ScratchSpec(hidden_size=32, num_layers=2, context=32)
    model = make_random_llama_model(spec, tokenizer, seed=0)
    policy = Policy(model, tokenizer, critic="shared")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    algorithm = configured_algorithm("ppo", kl_placement="none", num_epochs=2, num_minibatches=2)
    rollout = RolloutSpec(max_new_tokens=MAX_TOKENS)
    collector = Collector.open(model, tokenizer, EnvSpec(id="example/Vowels-v0"), rollout)
    for step in range(STEPS):
        # 1. Collect episodes. The tensors of the batch have the shape [episodes, tokens].
        numbers = range(step * EPISODES, (step + 1) * EPISODES)
        seeds = [EpisodeSeed(seed=n, group_index=n, sample_index=0) for n in numbers]
        rollouts = collector.collect(seeds)
        rewards = [episode.env_rewards for episode in rollouts]
        batch = collate(rollouts, rewards, pad_id=tokenizer.pad_token_id, device=policy.device)

        # 2. Compute log-probabilities and values of the sampling policy, then advantages (GAE).
        with torch.no_grad():
            scored = policy.score(batch.tokens, batch.attention_mask, batch.action_mask)
        batch = replace(
            batch,
            old_logprobs=scored.logprobs,
            values=scored.values,
            bootstrap=torch.where(batch.truncated, scored.last_value, 0.0),
        )
        batch = estimate_advantages(algorithm, batch)

        # 3. Optimize the clipped surrogate objective and the value loss for several epochs.
        for _ in range(algorithm.settings.num_epochs):
            order = torch.randperm(len(batch), generator=generator)
            for rows in order.chunk(algorithm.settings.num_minibatches):
                part = batch.select(rows)
                scored = policy.score(part.tokens, part.attention_mask, part.action_mask)
                mask = part.require("loss_mask")
                count = loss_denominator(algorithm, mask, max_tokens=MAX_TOKENS)
                loss, _ = compute_loss(
                    algorithm, scored.logprobs, part, denominator=count, values=scored.values
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
        collector.engine.update_policy(step + 1)
        print(f"step {step:2d}  mean return {batch.scores().mean():.3f}")
    collector.close()


if __name__ == "__main__":
    main()
