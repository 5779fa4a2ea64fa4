"""Benchmark of prefix sharing: an update on eight replies to one prompt of 512 tokens.

Both sides run the same update of online training. The first side processes the prompt only once.
The second side uses an attention implementation of Transformers and processes the prompt once for
each reply.
"""

from __future__ import annotations

import torch

from benchmarks.agreement import pop_gradient_vector
from benchmarks.worker import Job, StepTimer
from rlhf.algorithms.batch import TrainingBatch
from rlhf.cli.table import configure
from rlhf.rollout.batch import Rollout
from rlhf.training.batch import make_training_batch
from rlhf.training.online import OnlineTrainer
from rlhf.training.optimize import update_policy

PROMPT, REPLY, ROWS = 512, 32, 8


def time_policy_update(job: Job, timer: StepTimer, *, shared: bool) -> None:
    """Time the update, including its optimizer step.

    The unit of work is a token. The tokens of the prompt count once for each reply. ``shared`` is
    True if the prompt is processed only once.
    """
    trainer = make_trainer(job, shared=shared)
    batch = make_batch(trainer)
    numbers = iter(range(trainer.config.num_steps))

    def step() -> float:
        update_policy(trainer, batch, step=next(numbers))
        return job.work_per_step

    timer.loop(step)


def compare_gradients(job: Job) -> dict[str, float]:
    """Return the relative difference between the gradients of the two sides in float32."""
    gradients = []
    for shared in (True, False):
        trainer = make_trainer(job, shared=shared, dtype="float32")
        gradients.append(policy_gradient(trainer, make_batch(trainer)))
    ours, plain = gradients
    return {"gradient": ((ours - plain).norm() / plain.norm()).item()}


def make_trainer(job: Job, *, shared: bool, dtype: str = "auto") -> OnlineTrainer:
    """Return a GRPO trainer; if ``shared`` is True, it processes a common prompt only once."""
    tree = job.settings["config"]
    tree = {**tree, "model": {**tree["model"], "dtype": dtype}}
    trainer = OnlineTrainer("grpo", configure("grpo", tree))
    if not shared:
        trainer.policy.model.set_attn_implementation("sdpa")
    return trainer


def make_batch(trainer: OnlineTrainer) -> TrainingBatch:
    """Return a batch of eight random replies to one random prompt, with different scores."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 4000, (PROMPT,), generator=generator).tolist()
    rollouts, rewards = [], []
    for sample in range(ROWS):
        rollout = Rollout(seed=0, group_index=0, sample_index=sample)
        rollout.append(prompt, turn=0, logprobs=None)
        reply = torch.randint(100, 4000, (REPLY,), generator=generator).tolist()
        rollout.append(reply, turn=0, logprobs=[-1.0] * REPLY)
        rollouts.append(rollout)
        rewards.append(rollout.with_terminal_reward(rollout.env_rewards, float(sample)))
    return make_training_batch(trainer, rollouts, rewards)[0]


def policy_gradient(trainer: OnlineTrainer, batch: TrainingBatch) -> torch.Tensor:
    """Return the gradient of the policy loss of the whole batch."""
    from rlhf.algorithms.losses import compute_loss, loss_denominator

    scored = trainer.policy.score(batch.tokens, batch.attention_mask, batch.action_mask)
    mask = batch.require("loss_mask")
    loss, _ = compute_loss(
        trainer.algorithm,
        scored.logprobs,
        batch,
        denominator=loss_denominator(trainer.algorithm, mask, max_tokens=REPLY),
    )
    loss.backward()
    return pop_gradient_vector(trainer.policy.model)
