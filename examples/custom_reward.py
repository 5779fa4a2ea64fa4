"""Train with a custom reward: a function from conversations to scores.

    python examples/custom_reward.py

The model has random weights so that the example runs in seconds on a CPU. For real use, set the
model to ``{"path": "smollm2-135m-instruct"}`` or to the path of a fine-tuned model.
"""

import rlhf
from rlhf.data import write_jsonl

PROMPTS = ["Say hello.", "Name a color.", "Count to three.", "Describe the sea."]


def consonant_fraction(conversations: list[list[dict[str, str]]]) -> list[float | None]:
    """Score each completion by the fraction of its letters that are not vowels.

    Args:
        conversations: lists of messages ``{"role": ..., "content": ...}``; the last one is the
            policy's completion.

    Returns:
        One score for each conversation, or None if a completion cannot be scored. A completion
        without a score is counted and excluded from the update.
    """
    scores: list[float | None] = []
    for conversation in conversations:
        letters = [letter for letter in conversation[-1]["content"].lower() if letter.isalpha()]
        consonants = sum(letter not in "aeiou" for letter in letters)
        scores.append(consonants / len(letters) if letters else None)
    return scores


def main() -> None:
    """Optimize the reward with RLOO, which needs no critic."""
    write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    rlhf.stage(
        "rloo",
        {
            "output_dir": "runs/custom_reward",
            "model": {"scratch": {"hidden_size": 32, "num_layers": 2, "context": 64}},
            "env": {"prompts": [{"path": "prompts.jsonl"}]},
            # Rewards are summed. Built-in kinds of rewards are listed in
            # `rlhf.reward_models.KINDS`.
            "rewards": [
                {"kind": "function", "path": f"{__file__}:consonant_fraction", "name": "vowels"},
                {"kind": "length", "low": 5, "high": 20, "weight": 0.1},
            ],
            "rollout": {"max_new_tokens": 8},
            "episodes_per_step": 32,
            "num_steps": 10,
            # A model with random weights samples completions without letters, which have no score.
            "shaping": {"max_unscored": 1.0},
            "optimizer": {"learning_rate": 3e-3},
        },
    )
    print("report: runs/custom_reward/report.html")


if __name__ == "__main__":
    main()
