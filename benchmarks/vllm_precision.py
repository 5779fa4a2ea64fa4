"""Compare log-probabilities of a vLLM server in bfloat16 with those of the trainer.

    rlhf engine start --config configs/vllm/guess.yaml --model.dtype bfloat16 --model.lora null
    python -m benchmarks.vllm_precision http://localhost:8000 FOLDER [--model MODEL]

The server samples completions of prompts of random words. The script prints two mean
absolute differences, in nats per token: between the server and the trainer, which both compute in
bfloat16, and between Transformers in bfloat16 and in float32, for the same tokens. The second
difference is the error of the data type, without another implementation. FOLDER receives the
published weights.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.texts import random_words
from rlhf.config.engine import EngineSpec
from rlhf.config.model import ModelSpec
from rlhf.models.loading import load_model
from rlhf.models.policy import Policy
from rlhf.rollout.sampling.base import Completion, Request, SamplingParams
from rlhf.rollout.vllm.engine import VLLMEngine
from rlhf.runs import launch

COMPLETIONS = 64
NEW_TOKENS = 64


def sample_completions(model: Any, tokenizer: Any, *, url: str, folder: Path) -> list[Completion]:
    """Return completions that the server samples at temperature 1 with the weights of the model."""
    engine = VLLMEngine(
        model,
        EngineSpec(kind="vllm", urls=[url]),
        folder=folder,
        context=model.config.max_position_embeddings,
        temperature=1.0,
        max_requests=8,
    )
    rng = random.Random(0)
    prompts = [tokenizer.encode(random_words(40, rng)) for _ in range(COMPLETIONS)]
    requests = [
        Request(index, prompt, NEW_TOKENS, (index,), SamplingParams())
        for index, prompt in enumerate(prompts)
    ]
    try:
        engine.update_policy(0)
        engine.submit(requests)
        completions: list[Completion] = []
        while len(completions) < len(requests):
            completions += engine.poll()
        return completions
    finally:
        engine.close()


@torch.no_grad()
def trainer_logprobs(policy: Policy, completion: Completion) -> np.ndarray:
    """Return the trainer's log-probabilities of the tokens of a completion, [T]."""
    prompt = list(completion.request.prompt_ids)
    tokens = torch.tensor([prompt + completion.tokens])
    sampled = torch.arange(tokens.shape[1])[None] >= len(prompt)
    output = policy.score(tokens, torch.ones_like(tokens, dtype=torch.bool), sampled)
    return output.logprobs[sampled].double().numpy()


@torch.no_grad()
def transformers_logprobs(model: Any, completion: Completion) -> np.ndarray:
    """Return the log-probabilities that a plain model of Transformers computes, [T]."""
    prompt = list(completion.request.prompt_ids)
    logits = model(input_ids=torch.tensor([prompt + completion.tokens])).logits[0].float()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0].double().numpy()


def mean_abs_difference(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Return the mean absolute difference of all tokens."""
    return float(np.abs(np.concatenate(first) - np.concatenate(second)).mean())


def main() -> None:
    """Print both differences and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    launch.prepare_process()
    model, tokenizer = load_model(ModelSpec(path=arguments.model, dtype="bfloat16"), seed=0)
    completions = sample_completions(model, tokenizer, url=arguments.url, folder=arguments.folder)
    policy = Policy(model, tokenizer)
    server = [np.array(completion.logprobs) for completion in completions]
    trainer = [trainer_logprobs(policy, completion) for completion in completions]
    plain = {}
    for dtype in ("bfloat16", "float32"):
        other, _ = load_model(ModelSpec(path=arguments.model, dtype=dtype), seed=0)
        plain[dtype] = [transformers_logprobs(other, completion) for completion in completions]
    gap = mean_abs_difference(server, trainer)
    dtype_error = mean_abs_difference(plain["bfloat16"], plain["float32"])
    print(
        f"{sum(map(len, server))} tokens: server - trainer in bfloat16 {gap:.5f} nats, "
        f"Transformers in bfloat16 - float32 {dtype_error:.5f} nats, ratio {gap / dtype_error:.2f}"
    )


if __name__ == "__main__":
    main()
