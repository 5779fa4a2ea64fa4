"""Measure the attributions of `rlhf explain` on reward models that are trained on real pairs.

    python -m benchmarks.explain pairs.jsonl --work runs/explain

The script trains a decoder and an encoder on 70% of the prompts of the file, and measures on the
shortest pair of each of the other prompts:

* the completeness gap of integrated gradients on 30 pairs of at most 100 tokens, relative to the
  larger of |margin| and the standard deviation of the margins, with the number of gradients;
* the decrease of the margin after the deletion of the tokens with the largest attributions by
  gradient x input, and of as many random tokens, on 200 pairs;
* how often the planted word of pairs that are labeled by "mentions wine" has the largest
  attribution, with a reward model that is trained on such pairs.

A reward model that is already in the folder is not trained again. The results are also written to
`explain.json` in the folder.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.config.explain import AttributionMethod, AttributionSpec
from rlhf.config.model import ScratchSpec
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.explain import RewardExplainer
from rlhf.explain.encoding import encode_with_parts
from rlhf.explain.reward.explanation import RewardExplanation
from rlhf.explain.words import word_attributions, words_of_last_message
from rlhf.models.rewards import load_rewards
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.reward_models.core import last_reply
from rlhf.reward_models.pairs import Pair, to_pair
from rlhf.runs import launch

WORD = "wine"
"""The planted word."""
ONLY_ATTRIBUTIONS: dict[str, Any] = {
    "prefix_points": 0,
    "other_prompts": 0,
    "counterfactual_words": 0,
}
"""Options that omit everything except attributions."""


def main() -> None:
    """Train the reward models, and print and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", help="preference pairs")
    parser.add_argument("--work", default="runs/explain", help="folder of the reward models")
    parser.add_argument("--decoder", help="model; by default, a small Llama with random weights")
    parser.add_argument("--encoder", help="model; by default, a small BERT with random weights")
    parser.add_argument("--train-pairs", type=int, default=1_500, help="number of training pairs")
    parser.add_argument("--draws", type=int, default=4, help="random deletions of each pair")
    options = parser.parse_args()
    launch.prepare_process()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    rows = load(DataSpec(options.pairs), "preference", seed=0).rows
    train, test = split_by_prompt(rows, fraction=0.3, seed=0)
    held_out = shortest_of_each_prompt([to_pair(row) for row in test])
    train = train[: options.train_pairs]
    texts = [last_reply(to_pair(row).chosen) for row in train]
    results = {}
    for name, model, save in (
        ("decoder", options.decoder, save_small_llama),
        ("encoder", options.encoder, save_small_bert),
    ):
        model = model or save(work / f"{name}-base", texts)
        reward = trained_reward(work / name, model, train)
        short = [pair for pair in held_out if longest(reward, pair) <= 100]
        results[name] = {
            "completeness": completeness(reward, short[:30]),
            "deletion": deletion(reward, held_out[:200], draws=options.draws),
        }
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    base = save_small_llama(work / "planted-base", [*texts, *[WORD] * 100])
    reward = trained_reward(work / "planted", base, planted_rows(texts, 1_600))
    replies = [last_reply(pair.chosen) for pair in held_out]
    results["planted"] = planted(
        reward,
        [to_pair(row) for row in planted_rows(replies, 200, seed=1)],
        ("gradient_x_input", "integrated_gradients"),
    )
    print(json.dumps({"planted": results["planted"]}, indent=1))
    (work / "explain.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def shortest_of_each_prompt(pairs: Sequence[Pair]) -> list[Pair]:
    """Return for each prompt the pair whose two replies have the fewest characters."""
    ordered = sorted(pairs, key=lambda pair: -sum(pair.lengths))
    return list({pair.prompt_json: pair for pair in ordered}.values())


def longest(reward: Any, pair: Pair) -> int:
    """Return the number of tokens of the longer text of a pair."""
    return max(len(reward.encode(pair.chosen)), len(reward.encode(pair.rejected)))


def save_small_llama(folder: Path, texts: Sequence[str]) -> str:
    """Save a small Llama with random weights and a tokenizer for the texts; return the folder."""
    tokenizer = make_tokenizer(texts, 2_000)
    spec = ScratchSpec(hidden_size=64, initializer_range=0.1)
    make_random_llama_model(spec, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_small_bert(folder: Path, texts: Sequence[str]) -> str:
    """Save a small BERT with random weights and a tokenizer for the texts; return the folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=4_000, special_tokens=special)
    core.train_from_iterator(texts, trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def trained_reward(folder: Path, model: str, rows: Sequence[dict[str, Any]]) -> Any:
    """Train a reward model for one epoch, unless the folder has one, and load it."""
    from rlhf.cli.table import run_command

    if not (folder / "final").exists():
        data = folder.with_suffix(".jsonl")
        data.parent.mkdir(parents=True, exist_ok=True)
        is_small = model.endswith("-base")
        write_jsonl(data, rows)
        tree = {
            "output_dir": str(folder),
            "overwrite": True,
            "kind": "preference",
            "model": {"path": model, "dtype": "float32"},
            "data": [{"path": str(data)}],
            "eval_fraction": 0.1,
            "max_length": 256,
            "batch_size": 16,
            "micro_batch_size": 8,
            "evaluations": 2,
            "trainer": {"learning_rate": 1e-3 if is_small else 5e-5, "num_train_epochs": 1},
        }
        run_command("reward", tree)
    return load_rewards([{"kind": "learned", "path": str(folder / "final")}])


def completeness(reward: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the completeness gaps of integrated gradients, and the numbers of gradients."""
    options = AttributionSpec(
        methods=["integrated_gradients"], max_steps=5_000, **ONLY_ATTRIBUTIONS
    )
    found: RewardExplanation = RewardExplainer(reward, options).explain_pairs(pairs)
    steps = [(pair.chosen.steps or 0) + (pair.rejected.steps or 0) for pair in found.pairs]
    return {
        "pairs": len(found.pairs),
        "margin_std": found.margin_std,
        "largest_relative_gap": found.largest_relative_completeness_gap,
        "gradients_per_pair": {"least": min(steps), "most": max(steps)},
    }


def deletion(reward: Any, pairs: Sequence[Pair], *, draws: int) -> dict[str, Any]:
    """Return the decreases of the margin after the deletion of top and of random tokens."""
    options = AttributionSpec(methods=["gradient_x_input"], **ONLY_ATTRIBUTIONS)
    explained = RewardExplainer(reward, options).explain_pairs(
        pairs, shown=0, measure_on=len(pairs), draws=draws
    )
    result = explained.faithfulness[0]
    parts = {
        "top": result.overall.top,
        "random": result.overall.random,
        "gain": result.overall.gain,
    }
    return {
        "pairs": result.pairs,
        "margin_std": explained.margin_std,
        **{name: value.as_dict() for name, value in parts.items()},
    }


def planted_rows(texts: Sequence[str], count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs of real texts in which only the chosen one mentions the planted word.

    The word is inserted at a random position. Texts that mention it already are not used, and long
    texts are shortened to 40 words.
    """
    generator = random.Random(seed)
    usable = [text.split()[:40] for text in texts if WORD not in text.lower() and text.strip()]
    rows = []
    for index in range(count):
        chosen, rejected = (list(generator.choice(usable)) for _ in range(2))
        chosen.insert(generator.randint(0, len(chosen)), WORD)
        rows.append(
            {
                "prompt": f"Write text {index}.",
                "chosen": " ".join(chosen),
                "rejected": " ".join(rejected),
            }
        )
    return rows


def planted(
    reward: Any, pairs: Sequence[Pair], methods: Sequence[AttributionMethod]
) -> dict[str, Any]:
    """Return the accuracy, and how often the planted word has the largest attribution."""
    results: dict[str, Any] = {"pairs": len(pairs)}
    for method in methods:
        options = AttributionSpec(methods=[method], **ONLY_ATTRIBUTIONS)
        explained = RewardExplainer(reward, options).explain_pairs(pairs).pairs
        results["accuracy"] = sum(pair.margin > 0 for pair in explained) / len(explained)
        first = [
            strongest_word(reward, pair, found, method) == WORD
            for pair, found in zip(pairs, explained, strict=True)
        ]
        results[f"first by {method}"] = sum(first) / len(first)
    return results


def strongest_word(reward: Any, pair: Pair, found: Any, method: str) -> str:
    """Return the word of both replies with the largest attribution to the margin."""
    ranked = []
    for conversation, explanation in ((pair.chosen, found.chosen), (pair.rejected, found.rejected)):
        words = words_of_last_message(conversation, "")
        encoded = encode_with_parts(reward, conversation, num_prompt_messages=len(pair.prompt))
        values = word_attributions(words, conversation, encoded, explanation.attributions[method])
        ranked += [(value, word.text) for value, word in zip(values, words, strict=True)]
    return max(ranked)[1]


if __name__ == "__main__":
    main()
