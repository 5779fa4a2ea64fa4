"""Compare learning curves of GRPO and RLOO between TRL and the toolkit, seed by seed.

    python -m benchmarks.parity FOLDER [--seeds 8] [--steps 40]

The task is to repeat a word in one turn. The reward is 1 for the correct word, otherwise 0. For
each seed, both implementations start from the same SFT model and use the same prompts. They take
one optimizer step for each batch of 64 replies in groups of 8, with AdamW and the same constant
learning rate, and without a KL penalty. Gradients are not clipped: the effect of clipping would
depend on the scale of the loss, although the steps of Adam do not depend on this scale. A curve is
the mean reward of each batch. The table lists the mean and the end of the curves, with paired
differences over seeds. Finished runs in FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import rlhf
from benchmarks.curves import curve_comparison_table, plot_curves, read_reward_curve
from rlhf.config.load import read_yaml
from rlhf.runs import launch

ALGORITHMS = ("grpo", "rloo")
SIDES = ("ours", "TRL")
START_CONFIG = Path(__file__).parents[1] / "configs/learning/echo.yaml"
REPLIES, GROUP, TOKENS, LEARNING_RATE = 64, 8, 4, 5e-4


def echo_last_word_reward(conversations: list[list[dict[str, str]]]) -> list[float]:
    """Return 1.0 for each reply that equals the last word of its prompt, otherwise 0.0.

    An example of a prompt is "Repeat: apple".
    """
    return [
        float(talk[-1]["content"].strip() == talk[-2]["content"].split()[-1])
        for talk in conversations
    ]


def train_initial_model(folder: Path, seed: int) -> Path:
    """Train the common initial model by SFT if necessary, and write prompts.jsonl into ``folder``.

    Returns:
        The folder of the initial model.
    """
    root = folder / f"start-{seed}"
    if not (root / "sft/finished").exists():
        tree = read_yaml(START_CONFIG)
        stages = [stage for stage in tree["stages"] if stage["name"] in ("demos", "sft")]
        pipeline = tree | {"stages": stages, "output_dir": str(root), "seed": seed}
        (folder / "start.json").write_text(json.dumps(pipeline))
        rlhf.run(folder / "start.json", overwrite=True)
    rows = [json.loads(line) for line in (root / "demos/train.jsonl").read_text().splitlines()]
    prompts = sorted({json.dumps({"prompt": row["messages"][:-1]}) for row in rows})
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    return root / "sft/final"


def toolkit_config(
    algorithm: str, model: Path, folder: Path, *, seed: int, steps: int
) -> dict[str, Any]:
    """Return the configuration of a training run with the toolkit."""
    return {
        "output_dir": str(folder / f"ours-{algorithm}-{seed}"),
        "seed": seed,
        "model": {"path": str(model)},
        "env": {"prompts": [{"path": str(folder / "prompts.jsonl")}]},
        "rewards": [{"kind": "function", "path": "benchmarks.parity:echo_last_word_reward"}],
        "rollout": {"max_new_tokens": TOKENS},
        "algorithm": {"group_size": GROUP, "kl_placement": "none"},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "eps": 1e-8,
            "max_grad_norm": 1e9,
        },
        "episodes_per_step": REPLIES,
        "num_steps": steps,
        "save_every": steps,
        "evaluation": {"prompts_fraction": 0.01},
    }


def train_toolkit_curve(tree: dict[str, Any], algorithm: str) -> list[float]:
    """Train with the toolkit; return the mean reward of each batch."""
    rlhf.stage(algorithm, tree, overwrite=True)
    return read_reward_curve(Path(tree["output_dir"]))


def train_trl_curve(tree: dict[str, Any], algorithm: str) -> list[float]:
    """Train with TRL on the toolkit's training prompts; return the mean reward of each batch."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.cli.table import configure
    from rlhf.training.online_setup import load_split_prompts

    prompts, _ = load_split_prompts(configure(algorithm, tree))
    own: dict[str, Any] = {"grpo": {"loss_type": "grpo"}, "rloo": {}}[algorithm]
    kind = {"grpo": "GRPO", "rloo": "RLOO"}[algorithm]
    args = getattr(trl, f"{kind}Config")(
        output_dir=tree["output_dir"].replace("ours-", "trl-"),
        seed=tree["seed"],
        beta=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=REPLIES,
        max_completion_length=TOKENS,
        max_steps=tree["num_steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        temperature=1.0,
        top_k=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        **own,
    )

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        return echo_last_word_reward([[*p, *c] for p, c in zip(prompts, completions, strict=True)])

    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(tree["model"]["path"], dtype="float32"),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(tree["model"]["path"]),
    )
    trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


def train_curves(folder: Path, *, seeds: int, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Train the runs that are not finished; return algorithm -> "ours" or "TRL" -> curves.

    The curves have the shape [seeds, steps].
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for algorithm in ALGORITHMS:
        table: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for seed in range(seeds):
            model = train_initial_model(folder, seed)
            tree = toolkit_config(algorithm, model, folder, seed=seed, steps=steps)
            for side, learn in zip(SIDES, (train_toolkit_curve, train_trl_curve), strict=True):
                kept = folder / f"{algorithm}-{side}-{seed}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(learn(tree, algorithm)))
                table[side].append(json.loads(kept.read_text()))
        found[algorithm] = {side: np.array(rows) for side, rows in table.items()}
    return found


def main() -> None:
    """Train the runs that are not finished, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    launch.prepare_process()
    found = train_curves(chosen.folder, seeds=chosen.seeds, steps=chosen.steps)
    print(curve_comparison_table(found))
    plot_curves(found, chosen.folder / "parity.png")


if __name__ == "__main__":
    main()
