"""What a workload works on: a model, rows of word salad with known lengths, a configuration.

Every step of an offline workload sees the same rows in some order, so that each side has the same
tokens, lengths and padding in every step, however it shuffles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from benchmarks.child import Job
from reward_models.encoding import full_ids
from rlhf.models.hub import resolve
from rlhf.models.loading import load_tokenizer
from rlhf.rollout.tokens import TurnFormat, encode_example

# One token each in the usual vocabularies when they follow a space.
WORDS = """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work government
    number night point home water room mother area money story fact month lot right study book
    eye job word business issue side kind head house service friend father power hour game line
    end member law car city community name president team minute idea body information back
""".split()

# Sides are stopped from outside; no run comes to its own end.
ENDLESS = 10_000

Message = dict[str, str]


def words(count: int, rng: random.Random) -> str:
    """About ``count`` tokens of text."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def lognormal_lengths(count: int, total: int, *, sigma: float = 0.6) -> list[int]:
    """Quantiles of a lognormal distribution, scaled to a sum of about ``total``."""
    normal = NormalDist()
    shares = [2.718281828 ** (sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [max(2, round(total * share / sum(shares))) for share in shares]


def question(text: str) -> list[Message]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[Message]:
    """A completion of one reply."""
    return [{"role": "assistant", "content": text}]


def sft_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Eight documents of about 1,120 tokens with their templates; short prompts."""
    lengths = lognormal_lengths(8, 8 * 98)
    return [
        {"prompt": question(words(8, rng)), "completion": answer(words(n, rng))} for n in lengths
    ]


def reward_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Four pairs, eight texts of about 920 tokens."""
    lengths = lognormal_lengths(8, 8 * 73)
    rng.shuffle(lengths)
    return [
        {
            "prompt": question(words(8, rng)),
            "chosen": answer(words(one, rng)),
            "rejected": answer(words(other, rng)),
        }
        for one, other in zip(lengths[:4], lengths[4:], strict=True)
    ]


def dpo_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Four pairs with prompts of 128 tokens and replies of about 64, ragged."""
    lengths = lognormal_lengths(8, 8 * 63)
    rng.shuffle(lengths)
    return [
        {
            "prompt": question(words(100, rng)),
            "chosen": answer(words(one, rng)),
            "rejected": answer(words(other, rng)),
        }
        for one, other in zip(lengths[:4], lengths[4:], strict=True)
    ]


ROWS = {"sft": sft_rows, "reward": reward_rows, "dpo": dpo_rows}


def offline(job: Job, *, verb: str) -> None:
    """Rows of one batch, and our configuration for training on it."""
    rng = random.Random(0)
    rows = ROWS[verb](rng)
    data = write_rows(job.folder / "rows.jsonl", rows)
    held_out = write_rows(job.folder / "held-out.jsonl", ROWS[verb](rng)[:2])
    model = resolve(job.request["model"])
    tokenizer = load_tokenizer(model)
    write_rows(job.folder / "trl.jsonl", encode(verb, rows, tokenizer))
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
    write_job(job, model=model, work=count_tokens(rows, tokenizer), config=config)


def encode(verb: str, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The columns that TRL takes, with the token ids that our side has; DPO it encodes itself."""
    if verb == "dpo":
        return list(rows)
    if verb == "reward":
        return [
            {
                f"{name}_ids": full_ids(tokenizer, [*row["prompt"], *row[name]], append_eos=True)
                for name in ("chosen", "rejected")
            }
            for row in rows
        ]
    layout = TurnFormat(tokenizer)
    pairs = [encode_example(layout, row["prompt"], row["completion"]) for row in rows]
    return [
        {
            "input_ids": ids,
            "labels": [i if own else -100 for i, own in zip(ids, is_action, strict=True)],
        }
        for ids, is_action in pairs
    ]


def count_tokens(rows: Sequence[dict[str, Any]], tokenizer: Any) -> int:
    """Tokens of a batch that are not padding; pairs read their prompt once for each reply."""
    layout = TurnFormat(tokenizer)
    texts = [
        (row["prompt"], row[name])
        for row in rows
        for name in ("completion", "chosen", "rejected")
        if name in row
    ]
    return sum(len(encode_example(layout, prompt, reply)[0]) for prompt, reply in texts)


def grpo(job: Job) -> None:
    """One prompt of 64 tokens at a time, eight replies of exactly 32 tokens, no reference."""
    model = endless_model(job.request["model"], job.folder / "model")
    config = {
        **online_config(job, model, prompts=prompt_file(job, tokens=64)),
        "rewards": [{"kind": "length", "low": 40}],
        "rollout": {"max_new_tokens": 32, "chat": False},
        "episodes_per_step": 8,
        "algorithm": {"group_size": 8, "kl_placement": "none"},
    }
    write_job(job, model=model, work=8 * 32, algorithm="grpo", config=config)


def ppo(job: Job) -> None:
    """Eight prompts of 64 tokens, replies of exactly 32, a reward model of the policy's size."""
    model = endless_model(job.request["model"], job.folder / "model")
    reward = reward_model(model, job.folder / "reward")
    config = {
        **online_config(job, model, prompts=prompt_file(job, tokens=64)),
        "rewards": [{"kind": "learned", "path": reward}],
        "rollout": {"max_new_tokens": 32, "chat": False, "temperature": 0.7},
        "episodes_per_step": 8,
        "algorithm": {"num_epochs": 2, "num_minibatches": 2},
    }
    write_job(job, model=model, work=8 * 32, algorithm="ppo", reward=reward, config=config)


def tiny(job: Job) -> None:
    """PPO of a 2.8M-parameter Llama in the echo task: prompt 32, 16 new, 128 rollouts."""
    config = {
        "output_dir": str(job.folder / "run"),
        "model": {"path": tiny_llama(job.folder / "model")},
        "env": {"id": "text/Echo-v0"},
        "rollout": {"max_new_tokens": 16, "parallel": 128, "chat": False},
        "episodes_per_step": 128,
        "num_steps": ENDLESS,
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "algorithm": {"num_epochs": 2, "num_minibatches": 4},
    }
    write_job(job, model=config["model"]["path"], work=128 * 16, algorithm="ppo", config=config)


def online_config(job: Job, model: str, *, prompts: Path) -> dict[str, Any]:
    """What the online workloads on prompts have in common."""
    return {
        "output_dir": str(job.folder / "run"),
        "model": {"path": model},
        "env": {"prompts": [{"path": str(prompts)}]},
        "num_steps": ENDLESS,
        "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
    }


def prompt_file(job: Job, *, tokens: int, count: int = 256) -> Path:
    """Plain prompts of ``tokens`` tokens."""
    rng = random.Random(1)
    rows = [{"prompt": question(words(tokens, rng))} for _ in range(count)]
    return write_rows(job.folder / "prompts.jsonl", rows)


def endless_model(name: str, folder: Path) -> str:
    """The same weights with a stop token that they never say, so that lengths are exact.

    The stop token becomes a reserved one; padding gets a token of its own, as our loader wants it.
    """
    source = Path(resolve(name))
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = folder / file.name
        if not link.exists() and not file.name.startswith(("tokenizer", "generation", "special")):
            link.symlink_to(file.resolve())
    tokenizer: Any = load_tokenizer(str(source))
    used = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)
    reserved = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    tokenizer.eos_token = [token for token in reserved if token not in used][-1]
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    return str(folder)


def reward_model(model: str, folder: Path) -> str:
    """A reward model with the policy's weights and a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from reward_models import Sidecar
    from reward_models.encoding import template_hash
    from rlhf.models.loading import give_pad_token

    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    give_pad_token(tokenizer, classifier)
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Sidecar(
        template_hash=template_hash(tokenizer), append_eos=False, max_length=512, pooling="last"
    ).write(folder)
    return str(folder)


def tiny_llama(folder: Path) -> str:
    """2.8M random parameters and a byte-level tokenizer of 320 tokens."""
    from envs.echo import Echo
    from rlhf.models.scratch import make_model, make_tokenizer
    from rlhf.models.spec import ScratchSpec

    tokenizer = make_tokenizer(Echo.texts(), 320)
    spec = ScratchSpec(hidden_size=208, num_layers=4, num_heads=8, context=128)
    make_model(spec, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_job(job: Job, **settings: Any) -> None:
    """What the sides read."""
    (job.folder / "job.json").write_text(json.dumps(settings, indent=1))
