"""A made-up but lifelike pipeline directory: what `rlhf run` leaves, without training anything.

`python tests/evaluation/fake_pipeline.py FOLDER` writes one and its report, to look at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf.stats import interval

ENV = "text/PreferenceBandit-v0"
EPISODES = 128
FIRST_SEED = 2**30
_ENVIRONMENT = {
    "python": "3.12.4",
    "platform": "Linux-6.1-x86_64",
    "processor": "Example CPU, 2 cores",
    "versions": {"rlhf-kit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
    "commit": "0123456789abcdef",
    "command": ["rlhf", "run", "configs/quickstart.yaml"],
    "date": "2026-11-23T17:40:00+0000",
}
_OPENINGS = [
    "Describe the old lighthouse to a visitor.",
    "What should I cook tonight with <three> eggs & some rice?",
    "Explain to a child why the sea is salty.",
    "Write a short note to a neighbor who plays loud music.",
]
_PLAIN = "It is a lighthouse. It is old. People visit it and then they go home."
_WARM = (
    "Built in 1871, it still lights the strait on foggy nights; climb its 96 steps and you can "
    "see three islands and, if you are lucky, the seals on the rocks below."
)
_HOSTILE = "<script>alert('not run')</script> </textarea><b onclick=x>bold?</b> "


def write_pipeline(root: Path, *, over_optimized: bool = False, seed: int = 0) -> Path:
    """The stages of `configs/quickstart.yaml` under `root`; PPO's gold score falls if asked."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    stages = ["demos", "sft", "pairs", "reward", "ppo", "dpo", "evaluate"]
    manifest = {"stages": [{"name": name} for name in stages]}
    (root / "pipeline.yaml").write_text(yaml.safe_dump(manifest))
    sft = {"model": {"path": f"{root}/sft/final"}}
    env = {"env": {"id": ENV, "kwargs": {"instructions": False}}}
    pairs = {"data": [{"path": f"{root}/pairs/pairs.jsonl"}]}
    demos = {"data": [{"path": f"{root}/demos/sft.jsonl"}]}
    _stage(root / "demos", [], {"env": ENV})
    _stage(root / "sft", _losses(rng, 120), {"model": {"scratch": {"hidden_size": 64}}, **demos})
    _stage(root / "pairs", [], {**sft, **env})
    _stage(root / "reward", _accuracies(rng, 80), {**sft, **pairs})
    online = {"rewards": [{"kind": "learned", "name": "proxy"}], "algorithm": {"kl_coef": 0.05}}
    metrics = _online(rng, 100, over_optimized=over_optimized)
    _stage(root / "ppo", metrics, {**sft, **env, **online})
    _stage(root / "dpo", _losses(rng, 90, kl=True), {**sft, **pairs})
    lifts = {"sft": 0.0, "ppo": 0.2 if over_optimized else 0.42, "dpo": 0.21}
    policies = [{"name": name} for name in ("random", "expert", *lifts)]
    _stage(root / "evaluate", [], {"policies": policies, **env})
    base = rng.normal(size=EPISODES)
    _reference(root / "evaluate", "random", 0.12, rng)
    _reference(root / "evaluate", "expert", 0.95, rng)
    for name, lift in lifts.items():
        _evaluate(root / "evaluate", name, lift, base, rng)
    _evaluate(root / "ppo", "ppo", lifts["ppo"], base, rng)
    _reward_report(root / "evaluate")
    _samples(root / "ppo", rng)
    return root


def _reward_report(folder: Path) -> None:
    """The part of a reward model's examination that a run report shows."""
    accuracy = {"value": 0.842, "low": 0.818, "high": 0.866, "n": 900, "groups": 450}
    longer = {"value": 0.556, "low": 0.523, "high": 0.589, "n": 900, "groups": 450}
    report = {
        "reward": "proxy",
        "accuracy": accuracy,
        "baselines": {"longer wins": {"accuracy": longer, "gain": accuracy}},
        "verdict": ['Better than "longer wins".'],
    }
    target = folder / "evaluation" / "pairs"
    target.mkdir(parents=True)
    (target / "summary.json").write_text(json.dumps(report))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _stage(folder: Path, metrics: list[dict[str, Any]], config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 0}))
    (folder / "environment.json").write_text(json.dumps(_ENVIRONMENT))
    write_rows(folder / "metrics.jsonl", metrics)
    (folder / "finished").touch()


def _losses(rng: np.random.Generator, steps: int, *, kl: bool = False) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        level = 0.9 + 2.4 * np.exp(-step / 22)
        row: dict[str, Any] = {"step": step, "time": 0.4 * step}
        row["train/loss"] = float(level + 0.09 * rng.normal())
        row["train/learning_rate"] = 1e-3 * (1 - step / steps)
        if step % 10 == 0:
            row["eval/loss"] = float(level + 0.06)
        if kl:
            row["policy/kl"] = float(4 * (1 - np.exp(-step / 40)) + 0.1 * rng.normal())
        rows.append(row)
    return rows


def _accuracies(rng: np.random.Generator, steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        grown = 1 - np.exp(-step / 18)
        row = {"step": step, "time": 0.3 * step, "train/loss": float(0.7 - 0.4 * grown)}
        row["train/accuracy"] = float(np.clip(0.5 + 0.38 * grown + 0.05 * rng.normal(), 0, 1))
        if step % 10 == 0:
            row["eval/accuracy"] = float(0.5 + 0.35 * grown)
            row["eval/loss"] = float(0.72 - 0.36 * grown)
        rows.append(row)
    return rows


def _online(rng: np.random.Generator, steps: int, *, over_optimized: bool) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        grown = 1 - np.exp(-step / 25)
        rows.append(
            {
                "step": step,
                "time": 1.6 * step,
                "reward/mean": float(-0.2 + 2.4 * grown + 0.12 * rng.normal()),
                "policy/kl": float(9 * grown + 0.3 * rng.normal()),
                "policy/entropy": float(2.1 - 1.1 * grown + 0.05 * rng.normal()),
                "policy/clip_fraction": float(0.08 + 0.02 * rng.random()),
                "policy/ratio_max": float(1.5 + rng.random()),
                "value/explained_variance": float(0.8 * grown + 0.05 * rng.normal()),
                "rollout/tokens": float(18 + 22 * grown + rng.normal()),
                "rollout/length_limited": float(max(0, 0.3 * grown - 0.12 + 0.02 * rng.normal())),
                "kl/coef": 0.05,
            }
        )
        if step % 5 == 0:
            fall = 0.0038 * max(0, step - 45) if over_optimized else 0.0
            rows[-1]["eval/return"] = float(0.38 + 0.45 * grown - fall + 0.015 * rng.normal())
    return rows


def _evaluate(
    folder: Path, name: str, lift: float, base: np.ndarray, rng: np.random.Generator
) -> None:
    noise = rng.normal(size=base.size)
    returns = np.clip(0.42 + lift + 0.14 * base + 0.08 * noise, 0, 1)
    proxies = 3 * returns + 0.3 * rng.normal(size=base.size)
    episodes = [
        _episode(name, "sampled", i, float(value), float(proxies[i]))
        for i, value in enumerate(returns)
    ]
    _write_evaluation(folder, name, "sampled", episodes)


def _reference(folder: Path, policy: str, level: float, rng: np.random.Generator) -> None:
    returns = np.clip(level + 0.1 * rng.normal(size=EPISODES), 0, 1)
    episodes = [_episode(policy, policy, i, float(value), 0.0) for i, value in enumerate(returns)]
    _write_evaluation(folder, policy, policy, episodes)


def _episode(policy: str, decoding: str, index: int, value: float, proxy: float) -> dict[str, Any]:
    reply = _WARM if value > 0.6 else _PLAIN
    if index == 3:
        reply = _HOSTILE + reply * 12
    return {
        "env": ENV,
        "policy": policy,
        "decoding": decoding,
        "seed": FIRST_SEED + index,
        "return": value,
        "success": value > 0.7,
        "cost": 0.0,
        "turns": 1,
        "invalid": 0,
        "tokens": len(reply.split()),
        "seconds": 0.01,
        "components": {"proxy": proxy},
        "messages": conversation(index, reply),
    }


def conversation(index: int, reply: str) -> list[dict[str, str]]:
    """One question, one reply."""
    question = _OPENINGS[index % len(_OPENINGS)]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _write_evaluation(
    folder: Path, name: str, decoding: str, episodes: list[dict[str, Any]]
) -> None:
    target = folder / "evaluation" / name
    write_rows(target / "episodes.jsonl", episodes)
    columns = {
        "return": [e["return"] for e in episodes],
        "normalized": [(e["return"] - 0.12) / (0.95 - 0.12) for e in episodes],
        "success": [float(e["success"]) for e in episodes],
        "proxy": [e["components"]["proxy"] for e in episodes],
        "tokens": [float(e["tokens"]) for e in episodes],
    }
    summary = {
        "name": name,
        "env": episodes[0]["env"],
        "policy": name,
        "decoding": decoding,
        "episodes": len(episodes),
        "random": 0.12,
        "optimal": 0.95,
        "metrics": {key: _metric(np.array(values)) for key, values in columns.items()},
    }
    (target / "summary.json").write_text(json.dumps(summary))


def _metric(values: np.ndarray) -> dict[str, Any]:
    return interval(values).as_dict()


def _samples(folder: Path, rng: np.random.Generator) -> None:
    rows = []
    for split, step in (("before", 0), ("after", 100)):
        for index in range(6):
            gain = float(rng.uniform(0.2, 0.5)) if split == "after" else 0.0
            reply = _WARM if split == "after" else _PLAIN
            rows.append(
                {
                    "step": step,
                    "split": split,
                    "seed": FIRST_SEED + index,
                    "messages": conversation(index, reply),
                    "return": 0.4 + gain,
                    "rewards": {"proxy": 1.2 + 2 * gain, "env": 0.4 + gain},
                }
            )
    rows += [_training_sample(rng, step, index) for step in (1, 50, 100) for index in range(3)]
    write_rows(folder / "samples.jsonl", rows)


def _training_sample(rng: np.random.Generator, step: int, index: int) -> dict[str, Any]:
    """A transcript of two replies with what the step knew of each token."""
    replies = [_WARM if step > 1 else _PLAIN, f"Gladly & <b>again</b> at step {step}."]
    text, turn = [], []
    for number, reply in enumerate(replies):
        found = [word + " " for word in reply.split()]
        text, turn = text + found, turn + [number] * len(found)
    last = [0.0] * (len(text) - 1)
    tokens = {
        "turn": turn,
        "text": text,
        "reward": [*last, 0.75],
        "advantage": [round(float(x), 3) for x in rng.normal(size=len(text))],
        "entropy": [round(float(x), 3) for x in rng.uniform(0, 3, len(text))],
        "kl": [round(float(x), 3) for x in rng.normal(0.1, 0.4, len(text))],
        "value": [round(float(x), 3) for x in rng.uniform(0, 1, len(text))],
    }
    messages = [
        *conversation(index, replies[0]),
        {"role": "user", "content": "And once more?"},
        {"role": "assistant", "content": replies[1]},
    ]
    shared = {"step": step, "split": "train", "seed": index, "return": 0.75}
    return {**shared, "messages": messages, "rewards": {"proxy": 0.75}, "tokens": tokens}


if __name__ == "__main__":
    from rlhf.reports import write_report

    for name, worse in (("quickstart", False), ("over-optimized", True)):
        print(write_report(write_pipeline(Path(sys.argv[1]) / name, over_optimized=worse)))
