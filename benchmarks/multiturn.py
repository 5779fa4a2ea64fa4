"""Benchmark of rollouts with ten turns: the toolkit's collector, and TRL with plain-text replies.

The unit of work is a token of an episode, including the tokens of the environment. The update is
not timed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.multi_turn_env import ENV_ID, Interview
from benchmarks.worker import Job, StepTimer
from rlhf.config.rollout import Concurrency


def time_toolkit_rollouts(
    job: Job, timer: StepTimer, *, delay: float = 0.0, concurrency: Concurrency = "lockstep"
) -> None:
    """Time `Collector.collect`, which keeps the KV cache for the whole episode.

    Args:
        job: job of the workload.
        timer: timer of the steps.
        delay: time that the environment waits in each step, in seconds.
        concurrency: value of ``env.concurrency``.
    """
    from rlhf.config.model import ModelSpec
    from rlhf.config.rollout import EnvSpec, RolloutSpec
    from rlhf.models.loading import load_model
    from rlhf.rollout.collector import Collector
    from rlhf.rollout.episode import EpisodeSeed

    s = job.settings
    model, tokenizer = load_model(ModelSpec(path=job.model), seed=0)
    task = {"turns": s["turns"], "first_tokens": s["opening"], "later_tokens": s["answer"]}
    env = EnvSpec(id=ENV_ID, kwargs=task | {"delay": delay}, concurrency=concurrency)
    spec = RolloutSpec(max_new_tokens=s["reply"], parallel=s["episodes"], chat=False)
    collector = Collector.open(model, tokenizer, env, spec)

    def step() -> float:
        starts = [EpisodeSeed(seed=0, group_index=0, sample_index=i) for i in range(s["episodes"])]
        return float(sum(len(r.tokens) for r in collector.collect(starts)))

    timer.loop(step)


def time_trl_rollouts(job: Job, timer: StepTimer) -> None:
    """Time TRL's GRPO with `rollout_func`, its only interface for plain-text replies.

    As in TRL's loop over tool calls, every turn passes the whole history to ``generate``. The
    update is not measured, so it uses only four tokens of each episode.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.trl.common import trl_arguments

    s = job.settings
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model, padding_side="left")

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        timer.wait_for_start()
        opening, completions = play_episodes(trainer, tokenizer, len(prompts), s)
        num_tokens = sum(len(a) + len(b) for a, b in zip(opening, completions, strict=True))
        timer.done(float(num_tokens))
        return {
            "prompt_ids": opening,
            "completion_ids": [ids[:4] for ids in completions],
            "logprobs": [[0.0] * 4 for _ in completions],
        }

    arguments = trl_arguments(job, tuned=True, batch_size=s["episodes"])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype="float32"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(**arguments, num_generations=s["episodes"]),
        train_dataset=Dataset.from_dict({"prompt": ["Interview"] * 64}),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    trainer.train()


def play_episodes(
    trainer: Any, tokenizer: Any, count: int, settings: dict[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    """Play ``count`` episodes in a batch; all episodes have the same number of turns.

    Args:
        trainer: TRL's trainer with the model.
        tokenizer: tokenizer of the model.
        count: number of episodes.
        settings: settings of the job.

    Returns:
        Two lists with one entry for each episode: the token ids of the first question, and the
        token ids of the rest of the episode.
    """
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    tasks = [
        Interview(settings["turns"], settings["opening"], settings["answer"]) for _ in range(count)
    ]
    openings = [tokenizer(task.reset(seed=0)[0])["input_ids"] for task in tasks]
    later: list[list[int]] = [[] for _ in tasks]
    model.eval()
    for _ in range(settings["turns"]):
        rows = [a + b for a, b in zip(openings, later, strict=True)]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                max_new_tokens=settings["reply"],
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        replies = out[:, inputs["input_ids"].shape[1] :].tolist()
        for task, ids, reply in zip(tasks, later, replies, strict=True):
            text, _, over, _, _ = task.step(tokenizer.decode(reply))
            ids += reply + ([] if over else tokenizer(f"\n{text}\n")["input_ids"])
    model.train()
    return openings, later
