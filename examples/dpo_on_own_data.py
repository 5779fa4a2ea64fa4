"""Fine-tune on your own demonstrations, then run DPO on your own preference pairs.

    python examples/dpo_on_own_data.py

The model has random weights so that the example runs in seconds on a CPU. For real use, replace
``MODEL`` by ``{"path": "smollm2-135m-instruct"}`` and the two files by your own; docs/data.md lists
the supported formats.
"""

import rlhf
from rlhf.data import write_jsonl

MODEL = {"scratch": {"hidden_size": 48, "num_layers": 2, "context": 64}}
ANIMALS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa"}


def write_data() -> None:
    """Write demonstrations (prompt, completion) and pairs (prompt, chosen, rejected)."""
    demonstrations, pairs = [], []
    for animal, sound in ANIMALS.items():
        prompt = f"What does the {animal} say?"
        # Half of the demonstrations are impolite; the pairs prefer the polite completions.
        demonstrations += [
            {"prompt": prompt, "completion": f"It says {sound}, please."},
            {"prompt": prompt, "completion": f"{sound}!"},
        ]
        pairs.append(
            {"prompt": prompt, "chosen": f"It says {sound}, please.", "rejected": f"{sound}!"}
        )
    write_jsonl("demonstrations.jsonl", demonstrations)
    write_jsonl("pairs.jsonl", pairs)


def main() -> None:
    """Run SFT and DPO, and print completions of both models."""
    write_data()
    shared = {"max_length": 48, "eval_fraction": 0.2, "batch_size": 4, "micro_batch_size": 4}
    sft = rlhf.stage(
        "sft",
        {
            **shared,
            "output_dir": "runs/sft",
            "model": MODEL,
            "data": [{"path": "demonstrations.jsonl"}],
            "trainer": {"learning_rate": 5e-3, "num_train_epochs": 40},
        },
    )
    dpo = rlhf.stage(
        "dpo",
        {
            **shared,
            "output_dir": "runs/dpo",
            "model": {"path": str(sft)},
            "data": [{"path": "pairs.jsonl"}],
            "trainer": {"learning_rate": 1e-3, "num_train_epochs": 10, "beta": 0.1},
        },
    )
    for model in (sft, dpo):
        for line in rlhf.generate(
            {"model": {"path": str(model)}, "prompt": "What does the dog say?", "samples": 3}
        ):
            print(model.parent.name, line)


if __name__ == "__main__":
    main()
