"""Every family of ``families`` through every stage, compared with its own plain forward pass.

A stage is a function of a family's folder that returns its largest relative error against an
oracle that uses nothing of this toolkit: transformers' forward pass over one unpadded row at a
time, and autograd through it. ``python -m tests.models.sweep`` runs all of them and writes
``docs/models.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.cli.table import configure, run_command
from rlhf.config.model import ModelSpec
from rlhf.errors import UserError
from rlhf.models.architecture import context_length_of
from rlhf.models.loading import load_model, load_tokenizer
from rlhf.reward_models import LearnedReward
from rlhf.rollout.sampling.verification import check_sampler_or_disable_cache
from rlhf.training import offline
from rlhf.training.examples import Example, ExampleEncoder
from tests.helpers.models import tiny_tokenizer
from tests.helpers.rollouts import TurnSampler
from tests.helpers.training import metrics_of, online_tree, pair_rows, sft_rows, write_rows
from tests.models.families import FAMILIES, VOCABULARY, model_of

BAR = 1e-5
BETA = 0.1


@dataclass(frozen=True)
class Outcome:
    """What a stage gave: a figure, or one line that refuses."""

    error: float | None = None
    refused: str | None = None
    traceback: str | None = None

    @property
    def right(self) -> bool:
        """Whether the stage ran and agrees with the oracle."""
        return self.error is not None and self.error <= BAR

    @property
    def silent(self) -> bool:
        """Whether the stage ran and does not agree."""
        return self.error is not None and not self.error <= BAR


@dataclass(frozen=True)
class Place:
    """Where a family's model lies and its runs are written."""

    name: str
    folder: Path

    @property
    def model(self) -> Path:
        """Folder of the saved model."""
        return self.folder / "model"

    def plain(self) -> Any:
        """The model as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def tree(self, command: str, rows: Sequence[Any], **keys: Any) -> dict[str, Any]:
        """An offline run of one step over all rows but the held-out ones."""
        data = write_rows(self.folder / f"{command}.jsonl", rows)
        return {
            "output_dir": str(self.folder / command),
            "model": {"path": str(self.model), "dtype": "float32"},
            "data": [{"path": str(data)}],
            "max_length": 100,
            "batch_size": 8,
            "micro_batch_size": 4,
            "eval_fraction": 0.2,
            "evaluations": 1,
            "trainer": {"learning_rate": 1e-3, "max_steps": 1, "warmup_steps": 0},
        } | keys


def relative(found: float, expected: float) -> float:
    """Difference relative to the larger of 1 and the expected size."""
    return abs(found - expected) / max(1.0, abs(expected))


def row_logprobs(model: Any, ids: Sequence[int], labels: Sequence[int]) -> Tensor:
    """Log-probabilities of the labeled tokens of one row, in a plain pass."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    wanted = torch.tensor(labels[1:])
    places = (wanted != -100).nonzero()[:, 0]
    return logits.log_softmax(-1)[places, wanted[places]]


def gradient_norm(model: Any) -> float:
    """Norm of the gradient that lies in a model's parameters."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in _trained(model)))


def _trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.grad is not None]


def encoded(command: str, tree: dict[str, Any]) -> list[Example]:
    """The training rows of a run as token ids."""
    config = configure(command, tree)
    rows, _ = offline.load_train_and_eval_rows(config, offline.method_of(command, config))
    tokenizer = load_tokenizer(str(config.model.path))
    return ExampleEncoder(tokenizer, max_length=config.max_length)(rows, pairs=command == "dpo")


def first_step(folder: Path) -> dict[str, float]:
    """What a run logged of its first step."""
    (row,) = [row for row in metrics_of(folder) if row["step"] == 1 and "train/loss" in row]
    return row


def load(place: Place) -> float:
    """Logits of the loaded model against those of the model that was saved."""
    ids = torch.arange(5, 65)[None]
    with torch.no_grad():
        expected = model_of(place.name)(input_ids=ids, use_cache=False).logits
        model, _ = load_model(ModelSpec(path=str(place.model), dtype="float32"), seed=0)
        found = model(input_ids=ids, use_cache=False).logits
    return relative(float((found - expected).abs().max()), 0.0) / max(
        1, float(expected.abs().max())
    )


def sft(place: Place) -> float:
    """Loss and gradient norm of the first step."""
    tree = place.tree("sft", sft_rows(10))
    run_command("sft", tree)
    rows = encoded("sft", tree)
    model = place.plain()
    logprobs = torch.cat([row_logprobs(model, row.ids[0], row.labels[0]) for row in rows])
    loss = -logprobs.mean()
    loss.backward()
    step = first_step(place.folder / "sft")
    return max(
        relative(step["train/loss"], loss.item()),
        relative(step["train/grad_norm"], gradient_norm(model)),
    )


def dpo(place: Place) -> float:
    """Loss, which is ln 2, and gradient norm of the first step."""
    tree = place.tree("dpo", pair_rows(10))
    run_command("dpo", tree)
    rows = encoded("dpo", tree)
    model = place.plain()
    for row in rows:  # the gradient of -log sigmoid at 0 is -1/2
        sides = [row_logprobs(model, *side) for side in zip(row.ids, row.labels, strict=True)]
        (-0.5 * BETA * (sides[0].sum() - sides[1].sum()) / len(rows)).backward()
    step = first_step(place.folder / "dpo")
    return max(
        relative(step["train/loss"], math.log(2)),
        relative(step["train/grad_norm"], gradient_norm(model)),
    )


SIDES = ("chosen", "rejected")


def reward(place: Place) -> float:
    """Scores and held-out loss of the saved model against plain passes over one text at a time."""
    tree = place.tree("reward", pair_rows(10))
    final = Path(run_command("reward", tree))
    config = configure("reward", tree)
    _, rows = offline.load_train_and_eval_rows(config, offline.method_of("reward", config))
    scorer = LearnedReward.load(final)
    texts = [[*row["prompt"], *row[side]] for row in rows for side in SIDES]
    scores = scorer(texts)
    ids = [scorer.encode(text) for text in texts]
    with torch.no_grad():
        plain = [float(scorer.model(torch.tensor([row])).logits[0, 0]) for row in ids]
    gaps = [relative(float(a), b) for a, b in zip(scores, plain, strict=True)]
    pairs = torch.tensor(plain).view(-1, 2)
    loss = torch.nn.functional.softplus(pairs[:, 1] - pairs[:, 0]).mean().item()
    logged = [row["eval/loss"] for row in metrics_of(place.folder / "reward") if "eval/loss" in row]
    return max(*gaps, relative(logged[-1], loss))


def sample(place: Place) -> float:
    """Log-probabilities of the sampler over two turns of three episodes, by plain passes."""
    model, _ = load_model(ModelSpec(path=str(place.model), dtype="float32"), seed=0)
    check_sampler_or_disable_cache(model)
    plain = place.plain()
    room = min(60, context_length_of(model)) // 2 - 6
    random = np.random.default_rng(0)
    counts = [(room, room), (3, room), (room // 2, 2)]
    sampler = TurnSampler(model, rows=2)
    tokens: dict[int, list[int]] = {}
    said: dict[tuple[int, int], float] = {}
    turn = dict.fromkeys(range(len(counts)), 0)
    queue = list(turn)

    def submit(name: int) -> None:
        new = random.integers(5, 300, size=counts[name][turn[name]]).tolist()
        tokens.setdefault(name, []).extend(new)
        sampler.submit(name, new, seed=10 * name + turn[name], limit=4 + name % 2)

    for _ in range(2):
        submit(queue.pop(0))
    while min(turn.values()) < 2:
        for name, reply in sampler.step().items():
            said |= {(name, len(tokens[name]) + i): p for i, p in enumerate(reply.logprobs)}
            tokens[name] += reply.tokens
            turn[name] += 1
            if turn[name] < 2:
                submit(name)
                continue
            sampler.release(name)
            if queue:
                submit(queue.pop(0))
    with torch.no_grad():
        expected = {name: row_logprobs(plain, row, row) for name, row in tokens.items()}
    gaps = [relative(p, float(expected[name][at - 1])) for (name, at), p in said.items()]
    return max(gaps)


def _online(place: Place, command: str, **keys: Any) -> float:
    """Ratios of the trainer's to the sampler's probabilities, and of the first update's: 1.

    Their logarithms, relative to that of a token's mean probability.
    """
    tree = online_tree(
        place.folder / command,
        place.model,
        model={"path": str(place.model), "dtype": "float32"},
        num_steps=1,
        episodes_per_step=4,
        evaluation={"episodes": 1},
        samples_per_step=0,
        **keys,
    )
    run_command(command, tree)
    (row,) = [row for row in metrics_of(place.folder / command) if row["step"] == 1]
    ratios = (row["sampler/ratio_max"], row["policy/ratio_max"])
    return max(abs(math.log(ratio)) for ratio in ratios) / math.log(VOCABULARY)


def ppo(place: Place) -> float:
    """One batch of PPO with one update."""
    return _online(place, "ppo", algorithm={"num_epochs": 1, "num_minibatches": 1})


def grpo(place: Place) -> float:
    """One batch of GRPO with one update."""
    return _online(place, "grpo", algorithm={"num_epochs": 1, "group_size": 2})


STAGES: dict[str, Callable[[Place], float]] = {
    "load": load,
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    "sample": sample,
    "ppo": ppo,
    "grpo": grpo,
}


@contextlib.contextmanager
def saved(name: str) -> Iterator[Place]:
    """A family's model and a tokenizer in a folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    place = Place(name, folder)
    try:
        model_of(name).save_pretrained(place.model)
        tiny_tokenizer().save_pretrained(place.model)
        yield place
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_family(name: str, stages: Sequence[str] = tuple(STAGES)) -> dict[str, Outcome]:
    """The outcome of each stage; one that cannot be loaded has no others."""
    found: dict[str, Outcome] = {}
    with saved(name) as place, contextlib.redirect_stderr(io.StringIO()):
        for stage in stages:
            found[stage] = _outcome(STAGES[stage], place)
            if stage == "load" and not found[stage].right:
                break
    return found


def _outcome(stage: Callable[[Place], float], place: Place) -> Outcome:
    try:
        return Outcome(error=stage(place))
    except UserError as error:
        line = str(error).replace(str(place.model), "the folder")
        return Outcome(refused=line)
    except Exception:
        return Outcome(traceback=traceback.format_exc())


PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.models.sweep -->", "<!-- end of table -->"


def cell(outcome: Outcome | None) -> str:
    """A stage's outcome in the table."""
    if outcome is None:
        return "–"
    return "refused" if outcome.refused else f"{outcome.error:.0e}"


def table(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """Families by stages, and below it the reasons of what is refused."""
    lines = [
        f"| family | {' | '.join(STAGES)} |",
        f"| --- | {' | '.join('---' for _ in STAGES)} |",
    ]
    trained = {n: f for n, f in outcomes.items() if f["load"].right}
    for name, found in trained.items():
        lines.append(f"| {name} | {' | '.join(cell(found.get(stage)) for stage in STAGES)} |")
    reasons: dict[str, list[str]] = {}
    for name, found in outcomes.items():
        for stage, outcome in found.items():
            if outcome.refused:
                line = re.sub(r"\b\w+(?=For[A-Z]\w+|LMHead\w*|ModelWith\w+)", "*", outcome.refused)
                reasons.setdefault(f"{stage}: {line}", []).append(name)
    lines += ["", "| stage that fails | error message | families |", "| --- | --- | --- |"]
    for reason, names in reasons.items():
        stage, _, line = reason.partition(": ")
        lines.append(f"| {stage} | {line} | {', '.join(names)} |")
    whole = sum(all(outcome.right for outcome in found.values()) for found in outcomes.values())
    head = (
        f"With Transformers {transformers.__version__}, {len(trained)} of {len(outcomes)} families "
        f"can be a policy, and {whole} pass the comparison in every stage."
    )
    return "\n".join([head, "", *lines])


def write_page(outcomes: dict[str, dict[str, Outcome]]) -> None:
    """Put the table into ``docs/models.md``."""
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}")


def main() -> None:
    """Run the sweep, or some families of it; print what is not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; none: all, and docs/models.md")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="also write every outcome here")
    given = parser.parse_args()
    names = given.names or list(FAMILIES)
    outcomes: dict[str, dict[str, Outcome]] = {}
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for name, (found, seconds) in zip(names, pool.imap(_timed, names), strict=True):
            outcomes[name] = found
            print(_line(name, found), f"{seconds:.1f} s", flush=True)
    if not given.names:
        write_page(outcomes)
    if given.json:
        plain = {n: {s: vars(o) for s, o in f.items()} for n, f in outcomes.items()}
        given.json.write_text(json.dumps(plain, indent=1))


def _timed(name: str) -> tuple[dict[str, Outcome], float]:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    began = time.perf_counter()
    return run_family(name), time.perf_counter() - began


def _line(name: str, found: dict[str, Outcome]) -> str:
    cells = []
    for stage, outcome in found.items():
        if outcome.traceback:
            cells.append(f"{stage} TRACEBACK {outcome.traceback.strip().splitlines()[-1]}")
        elif outcome.refused:
            cells.append(f"{stage} refused: {outcome.refused}")
        else:
            cells.append(f"{stage} {outcome.error:.0e}{' WRONG' if outcome.silent else ''}")
    return f"{name}: " + ", ".join(cells)


if __name__ == "__main__":
    main()
