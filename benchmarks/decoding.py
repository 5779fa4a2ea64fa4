"""Benchmark of decoding: the toolkit's sampler, ``generate`` of Transformers, and llama.cpp.

All three implementations process the same requests. A request consists of a prompt and the number
of tokens of its reply. The models never sample a stop token. The unit of work is a requested token.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.worker import Job, StepTimer

Request = tuple[list[int], int]
"""(token ids of the prompt, number of tokens of the reply)."""


def read_requests(job: Job) -> list[Request]:
    """Read the requests of a job."""
    lines = (job.folder / "requests.jsonl").read_text().splitlines()
    return [(row["ids"], row["limit"]) for row in map(json.loads, lines)]


def time_toolkit_sampler(job: Job, timer: StepTimer, *, rows: int) -> None:
    """Time the toolkit's sampler with up to ``rows`` requests in a batch.

    When a request is finished, its row is used for the next request.
    """
    from rlhf.config.model import ModelSpec
    from rlhf.models.loading import load_model
    from rlhf.rollout.sampling.base import Request, SamplingParams
    from rlhf.rollout.sampling.continuous import Sampler

    model, tokenizer = load_model(ModelSpec(path=job.model), seed=0)
    stop: Any = tokenizer.eos_token_id
    sampling = SamplingParams(stop_ids=frozenset({stop}))
    requests = read_requests(job)

    def step() -> float:
        sampler = Sampler(model, rows=rows)
        waiting = iter(enumerate(requests))

        def submit_next_request() -> None:
            for name, (ids, limit) in waiting:
                sampler.start_request(Request(name, ids, limit, (name,), sampling))
                return

        for _ in range(rows):
            submit_next_request()
        done = 0
        while done < len(requests):
            for completion in sampler.step():
                sampler.release(completion.request.episode_id)
                done += 1
                submit_next_request()
        return job.work_per_step

    timer.loop(step)


def time_transformers(job: Job, timer: StepTimer, *, rows: int) -> None:
    """Time ``model.generate`` of Transformers in bf16, in batches of ``rows`` requests.

    The next batch starts after the longest reply of a batch. The temperature is 1, as in the
    toolkit's sampler.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype="bfloat16").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    requests = read_requests(job)

    def step() -> float:
        for first in range(0, len(requests), rows):
            batch = requests[first : first + rows]
            ids = torch.tensor([ids for ids, _ in batch])
            limits = torch.tensor([limit for _, limit in batch])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(limits.max()),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList([length_criterion(ids.shape[1], limits)]),
            )
        return job.work_per_step

    timer.loop(step)


def length_criterion(prompt_length: int, reply_lengths: Any) -> Any:
    """Return a stopping criterion that stops each row at its requested number of tokens.

    Args:
        prompt_length: number of tokens of the prompts.
        reply_lengths: [rows] numbers of tokens of the replies.
    """

    def has_reached_length(input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - prompt_length >= reply_lengths

    return has_reached_length


def time_llama_cpp(job: Job, timer: StepTimer) -> None:
    """Time llama.cpp with 4-bit weights, one request at a time, with greedy decoding.

    ``use_extra_bufts=False`` disables the repacking of weights for AMX, which crashes in the
    released build.
    """
    import os

    from llama_cpp import Llama
    from llama_cpp import llama_cpp as library

    # The constructor has no argument for this parameter and reads it from this function's result.
    parameters = library.llama_model_default_params()
    parameters.use_extra_bufts = False
    library.llama_model_default_params = lambda: parameters
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    model = Llama(
        job.settings["gguf"],
        n_ctx=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    requests = read_requests(job)

    def step() -> float:
        for ids, limit in requests:
            model.reset()
            tokens = model.generate(ids, temp=0.0)
            for _ in range(limit):
                next(tokens)
        return job.work_per_step

    timer.loop(step)
