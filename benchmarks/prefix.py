"""An update on eight replies to one prompt of 512 tokens: the prompt computed once, or eight times.

Both sides take the same update of the online loop; the plain one gives the model back transformers'
own attention, with which every row is computed whole.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.agreement import take_gradient
from benchmarks.worker import Job, Pace
from rlhf.cli.table import configure
from rlhf.rollout.batch import Rollout, collate
from rlhf.training.experience import prepare
from rlhf.training.optimize import learn
from rlhf.training.session import Session, open_session

PROMPT, REPLY, ROWS = 512, 32, 8


def update(job: Job, pace: Pace, *, shared: bool) -> None:
    """The whole update, optimizer step included. Work: tokens, each row counted in full."""
    session = make_session(job, shared=shared)
    experience = make_experience(session)
    numbers = iter(range(session.config.num_steps))

    def step() -> float:
        learn(session, experience, step=next(numbers))
        return job.work

    pace.loop(step)


def check(job: Job) -> dict[str, float]:
    """Relative difference of the gradients of both in float32."""
    gradients = []
    for shared in (True, False):
        session = make_session(job, shared=shared, dtype="float32")
        experience = make_experience(session)
        gradients.append(gradient_of(session, experience))
    ours, plain = gradients
    return {"gradient": ((ours - plain).norm() / plain.norm()).item()}


def make_session(job: Job, *, shared: bool, dtype: str = "auto") -> Session:
    """What an online run holds."""
    tree = job.settings["config"]
    tree = {**tree, "model": {**tree["model"], "dtype": dtype}}
    session = open_session("grpo", configure("grpo", tree))
    if not shared:
        session.policy.model.set_attn_implementation("sdpa")
    return session


def make_experience(session: Session) -> Any:
    """Eight replies of random tokens to one random prompt, with different scores."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 4000, (PROMPT,), generator=generator).tolist()
    rollouts = []
    for member in range(ROWS):
        rollout = Rollout(seed=0, group=0, member=member)
        rollout.append(prompt, turn=0, logprobs=None)
        reply = torch.randint(100, 4000, (REPLY,), generator=generator).tolist()
        rollout.append(reply, turn=0, logprobs=[-1.0] * REPLY)
        rollout.pay(float(member))
        rollouts.append(rollout)
    tokenizer: Any = session.policy.tokenizer
    batch = collate(rollouts, pad_id=tokenizer.pad_token_id, device=session.policy.device)
    return prepare(session, batch)


def gradient_of(session: Session, experience: Any) -> torch.Tensor:
    """Of the policy loss of the whole batch."""
    from rlhf.algorithms.update import denominator_for, policy_loss_for

    batch, credit = experience.batch, experience.credit
    scored = session.policy.score(batch.tokens, batch.attention_mask, batch.action_mask)
    loss, _ = policy_loss_for(
        session.algorithm,
        scored.logprobs,
        credit,
        old_logprobs=experience.old_logprobs,
        denominator=denominator_for(session.algorithm, credit.mask, max_tokens=REPLY),
    )
    loss.backward()
    return take_gradient(session.policy.model)
