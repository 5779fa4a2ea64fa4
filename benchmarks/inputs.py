"""Write the inputs of a workload into its folder: rows, models, and the toolkit's configuration."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import (
    copy_without_stop_token,
    download_gguf,
    make_reward_model,
    make_tiny_llama,
)
from benchmarks.peak_flops import training_flops
from benchmarks.texts import (
    ROWS_BY_COMMAND,
    count_tokens,
    decreasing_density_lengths,
    encode_for_trl,
    random_sft_rows,
    random_words,
    user_message,
)
from benchmarks.worker import Job
from rlhf.models.hub import fetch_model_folder
from rlhf.models.loading import load_tokenizer

# Number of steps in the configuration. The harness stops a run before it reaches this number.
ENDLESS = 10_000


def write_offline_inputs(job: Job, *, command: str) -> None:
    """Write the inputs of SFT, reward training or DPO: the rows of one batch and the settings.

    ``command`` is "sft", "reward" or "dpo".
    """
    rng = random.Random(0)
    rows = ROWS_BY_COMMAND[command](rng)
    data = write_rows(job.folder / "rows.jsonl", rows)
    held_out = write_rows(job.folder / "held-out.jsonl", ROWS_BY_COMMAND[command](rng)[:2])
    model = fetch_model_folder(job.request["model"])
    tokenizer = load_tokenizer(model)
    write_rows(job.folder / "trl.jsonl", encode_for_trl(command, rows, tokenizer))
    config = {
        "output_dir": str(job.folder / "run"),
        "model": {"path": model},
        "data": [{"path": str(data)}],
        "eval_data": [{"path": str(held_out)}],
        "max_length": 1024,
        "batch_size": len(rows),
        "micro_batch_size": len(rows),
        "evaluations": 1,
        "trainer": {
            "learning_rate": 1e-6,
            "max_steps": ENDLESS,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
    }
    write_job_settings(job, model=model, work=count_tokens(rows, tokenizer), config=config)


def write_first_step_inputs(job: Job) -> None:
    """Write the inputs of SFT on eight short documents, with a tiny model that loads quickly."""
    write_offline_inputs(job, command="sft")
    settings = job.settings
    model = make_tiny_llama(job.folder / "model")
    rows = random_sft_rows(random.Random(0), mean_words=8)
    write_rows(job.folder / "rows.jsonl", rows)
    write_rows(job.folder / "held-out.jsonl", random_sft_rows(random.Random(1), mean_words=8)[:2])
    write_rows(job.folder / "trl.jsonl", encode_for_trl("sft", rows, load_tokenizer(model)))
    config = {**settings["config"], "model": {"path": model}}
    write_job_settings(job, **{**settings, "model": model, "config": config})


def write_grpo_inputs(job: Job) -> None:
    """Write the inputs of GRPO with 8 replies of 32 tokens to a prompt of 64 tokens, without KL."""
    model = copy_without_stop_token(job.request["model"], job.folder / "model")
    config = {
        **_shared_online_settings(job, model, prompts=write_random_prompts(job, tokens=64)),
        "rewards": [{"kind": "length", "low": 40}],
        "rollout": {"max_new_tokens": 32, "chat": False},
        "episodes_per_step": 8,
        "algorithm": {"group_size": 8, "kl_placement": "none"},
    }
    write_job_settings(job, model=model, work=8 * 32, algorithm="grpo", config=config)


def write_ppo_inputs(job: Job) -> None:
    """Write the inputs of PPO with replies of 32 tokens to 8 prompts of 64 tokens.

    The reward model has the size of the policy.
    """
    model = copy_without_stop_token(job.request["model"], job.folder / "model")
    # TRL passes the token ids of prompt and reply to the reward model. The toolkit applies a chat
    # template, which would add 32 tokens without this limit.
    reward = make_reward_model(model, job.folder / "reward", max_tokens=64 + 32)
    config = {
        **_shared_online_settings(job, model, prompts=write_random_prompts(job, tokens=64)),
        # The reward model is in bfloat16, like the policy and like the tuned TRL side.
        "rewards": [{"kind": "learned", "path": reward, "dtype": "bfloat16"}],
        "rollout": {"max_new_tokens": 32, "chat": False, "temperature": 0.7},
        "episodes_per_step": 8,
        "algorithm": {"num_epochs": 2, "num_minibatches": 2},
    }
    write_job_settings(job, model=model, work=8 * 32, algorithm="ppo", reward=reward, config=config)


def write_mfu_inputs(job: Job) -> None:
    """Write the inputs of SFT on 2,048 tokens; the unit of work is a floating-point operation."""
    write_offline_inputs(job, command="sft")
    rows = random_sft_rows(random.Random(0), mean_words=214)
    write_rows(job.folder / "rows.jsonl", rows)
    settings = job.settings
    encoded = encode_for_trl("sft", rows, load_tokenizer(settings["model"]))
    texts = [(len(row["input_ids"]), sum(i >= 0 for i in row["labels"])) for row in encoded]
    tokens = sum(length for length, _ in texts)
    flops = training_flops(settings["model"], texts)
    write_job_settings(job, **{**settings, "work": flops, "tokens": tokens})


def write_shared_prefix_inputs(job: Job) -> None:
    """Write the inputs of a GRPO update on 8 replies of 32 tokens to a prompt of 512 tokens."""
    model = fetch_model_folder(job.request["model"])
    config = {
        **_shared_online_settings(
            job, model, prompts=write_random_prompts(job, tokens=512, count=8)
        ),
        "rewards": [{"kind": "length", "low": 40}],
        "rollout": {"max_new_tokens": 32, "chat": False},
        "episodes_per_step": 8,
        "algorithm": {"group_size": 8, "kl_placement": "none"},
    }
    write_job_settings(job, model=model, work=8 * (512 + 32), algorithm="grpo", config=config)


def write_decoding_inputs(job: Job, *, requests: int, reply_lengths: str) -> None:
    """Write the inputs of decoding: prompts of 64 tokens, with the lengths of their replies.

    Args:
        job: job of the workload.
        requests: number of requests.
        reply_lengths: "fixed" for replies of 64 tokens, "mixed" for the lengths that
            `decreasing_density_lengths` returns for a maximum of 96 tokens.
    """
    rng = random.Random(2)
    model = copy_without_stop_token(job.request["model"], job.folder / "model")
    tokenizer: Any = load_tokenizer(model)
    lengths = (
        [64] * requests
        if reply_lengths == "fixed"
        else decreasing_density_lengths(requests, most=96)
    )
    rng.shuffle(lengths)
    rows = [
        {"ids": tokenizer(random_words(64, rng))["input_ids"][:64], "limit": n} for n in lengths
    ]
    write_rows(job.folder / "requests.jsonl", rows)
    write_job_settings(
        job, model=model, work=sum(lengths), gguf=download_gguf(job.request["model"])
    )


def write_multiturn_inputs(job: Job, *, episodes: int = 8, turns: int = 10) -> None:
    """Write the inputs of episodes with several turns.

    The first question has 64 tokens, a reply 16 tokens, and a later question 24 tokens.
    """
    model = copy_without_stop_token(job.request["model"], job.folder / "model")
    settings = {"turns": turns, "episodes": episodes, "opening": 64, "reply": 16, "answer": 24}
    write_job_settings(job, model=model, **settings)


def write_tiny_ppo_inputs(job: Job) -> None:
    """Write the inputs of PPO in the echo task: 2.8M parameters and 128 rollouts of 16 tokens."""
    config = {
        "output_dir": str(job.folder / "run"),
        "model": {"path": make_tiny_llama(job.folder / "model")},
        "env": {"id": "text/Echo-v0"},
        # Releases differ in the position of the separator. Without it, all have the same tokens.
        "rollout": {"max_new_tokens": 16, "parallel": 128, "chat": False, "separator": ""},
        "episodes_per_step": 128,
        "num_steps": ENDLESS,
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "algorithm": {"num_epochs": 2, "num_minibatches": 4},
    }
    write_job_settings(
        job, model=config["model"]["path"], work=128 * 16, algorithm="ppo", config=config
    )


def _shared_online_settings(job: Job, model: str, *, prompts: Path) -> dict[str, Any]:
    """Return the configuration keys that all online workloads with prompts have."""
    return {
        "output_dir": str(job.folder / "run"),
        "model": {"path": model},
        "env": {"prompts": [{"path": str(prompts)}]},
        "num_steps": ENDLESS,
        "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
    }


def write_random_prompts(job: Job, *, tokens: int, count: int = 256) -> Path:
    """Write ``count`` prompts of about ``tokens`` tokens to prompts.jsonl; return the path."""
    rng = random.Random(1)
    rows = [{"prompt": user_message(random_words(tokens, rng))} for _ in range(count)]
    return write_rows(job.folder / "prompts.jsonl", rows)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON Lines; return ``path``."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_job_settings(job: Job, **settings: Any) -> None:
    """Write job.json with the settings that the sides read."""
    (job.folder / "job.json").write_text(json.dumps(settings, indent=1))
