"""Continuous batched decoding over many turns: token ids in, token ids out.

Each row keeps its keys and values from turn to turn, so an episode's tokens pass through the model
once. Rows come and go while others decode: a row that stops is handed back at once, and its next
turn, or another episode in its place, joins the rows that still decode. The noise of each row comes
from its own numbers, so what a row samples does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf.models.logprobs import bare
from rlhf.rollout.sampling.decoder import decoder_for
from rlhf.rollout.sampling.reading import read

# Rows that wait to read their new tokens are taken in together, once they are this share of all:
# reading a few tokens takes as long as a step of the rows that decode.
WAITING_SHARE = 1 / 8

# Columns whose probabilities are summed before the cumulative sum, which is slow, is taken.
BLOCK = 256

Restrict = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reply:
    """One sampled turn: ids and their log-probabilities, the stop token included if it came."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class Sampler:
    """Decodes turns for up to ``rows`` episodes at once.

    An episode holds a row from its first ``submit`` to its ``release``. At every pass the rows lie
    at the front of the cache without gaps.

    Args:
        model: causal model (a PEFT model's adapters are in place); its weights must not change
            while the sampler is used.
        stop_ids: tokens that end a turn.
        rows: episodes held at once.
        temperature: logits are divided by it; 0 takes the likeliest token.
        restrict: takes logits [n, V] at that temperature, and puts -inf where a token is left out.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: set[int],
        rows: int,
        temperature: float = 1.0,
        restrict: Restrict | None = None,
    ) -> None:
        self.restrict = restrict
        self.decoder, self.device, self.temperature = decoder_for(model), model.device, temperature
        config = bare(model).config.get_text_config()
        self.stops = np.isin(np.arange(config.vocab_size), list(stop_ids))
        self.cache: Any = self.decoder.new_cache(rows)
        self.row_of: dict[int, int] = {}
        self.names: list[int] = []  # by row
        self.holes: set[int] = set()  # rows that were released; filled before the next pass
        self.waiting: dict[int, list[int]] = {}  # by name: tokens to read before the next reply
        self.prefilled = 0
        # By row; columns are steps of the present reply.
        self.noise = np.zeros((rows, 0))
        self.tokens = np.zeros((rows, 0), dtype=np.int64)
        self.logprobs = np.zeros((rows, 0))
        self.count = np.zeros(rows, dtype=np.int64)
        self.limit = np.zeros(rows, dtype=np.int64)
        self.last = np.zeros(rows, dtype=np.int64)  # sampled, and not yet through the model
        self.decoding = np.zeros(rows, dtype=bool)

    def submit(self, name: int, new_tokens: Sequence[int], noise: np.ndarray) -> None:
        """Ask for a reply.

        Args:
            name: of the episode.
            new_tokens: its ids since its last reply (all of the prompt on its first turn).
            noise: uniform numbers in [0, 1), one for each token it may sample; their count is the
                limit of the reply.
        """
        if name in self.row_of:
            row = self.row_of[name]
            self.waiting[name] = [int(self.last[row]), *new_tokens]
        else:
            row = min(self.holes, default=len(self.names))
            self.holes.discard(row)
            self.names[row : row + 1] = [name]
            self.row_of[name] = row
            self.cache.clear(row)
            self.waiting[name] = list(new_tokens)
        if (short := len(noise) - self.noise.shape[1]) > 0:
            wider = ((0, 0), (0, short))
            self.noise, self.tokens = np.pad(self.noise, wider), np.pad(self.tokens, wider)
            self.logprobs = np.pad(self.logprobs, wider)
        self.noise[row, : len(noise)] = noise
        self.count[row], self.limit[row] = 0, len(noise)

    def release(self, name: int) -> None:
        """Forget an episode; another may take its row."""
        row = self.row_of.pop(name)
        self.holes.add(row)
        self.decoding[row] = False

    def _close_holes(self) -> None:
        """Move rows from the end into the holes in front of them."""
        while self.holes:
            last = len(self.names) - 1
            moved = self.names.pop()
            if last in self.holes:
                self.holes.discard(last)
                continue
            row = self.holes.pop()
            self.names[row], self.row_of[moved] = moved, row
            self.cache.copy(last, row)
            for store in (self.noise, self.tokens, self.logprobs, self.count, self.limit):
                store[row] = store[last]
            self.last[row], self.decoding[row] = self.last[last], self.decoding[last]
            self.decoding[last] = False

    @torch.no_grad()
    def step(self) -> dict[int, Reply]:
        """One pass of the model: waiting rows read their tokens, or decoding rows their last one.

        Returns:
            The replies that ended with it, by name.
        """
        self._close_holes()
        decoding = np.flatnonzero(self.decoding)
        if self.waiting and len(self.waiting) >= WAITING_SHARE * len(decoding):
            rows, logits = self._read()
        else:
            rows, logits = decoding, self._decode(decoding)
        numbers = torch.from_numpy(self.noise[rows, self.count[rows]]).to(self.device)
        tokens, logprobs = draw(
            logits, numbers, temperature=self.temperature, restrict=self.restrict
        )
        chosen = tokens.cpu().numpy()
        self.tokens[rows, self.count[rows]] = self.last[rows] = chosen
        self.logprobs[rows, self.count[rows]] = logprobs.double().cpu().numpy()
        self.count[rows] += 1
        stopped = self.stops[chosen]
        over = stopped | (self.count[rows] == self.limit[rows])
        self.decoding[rows] = ~over
        return {
            self.names[row]: Reply(
                self.tokens[row, : self.count[row]].tolist(),
                self.logprobs[row, : self.count[row]].tolist(),
                stop,
            )
            for row, stop in zip(rows[over].tolist(), stopped[over].tolist(), strict=True)
        }

    def _read(self) -> tuple[np.ndarray, torch.Tensor]:
        """Pass waiting tokens through the model; (rows, logits [rows, V] after the last of each).

        Episodes of a group start alike: the first of them reads for all.
        """
        rows = np.array(sorted(self.row_of[name] for name in self.waiting))
        inputs = [self.waiting.pop(self.names[row]) for row in rows]
        self.cache.reserve(
            int((self.cache.lengths[rows] + [len(ids) for ids in inputs] + self.limit[rows]).max())
        )
        first: dict[Any, int] = {}
        reads_for = [
            first.setdefault(row if self.cache.lengths[row] else tuple(ids), index)
            for index, (row, ids) in enumerate(zip(rows.tolist(), inputs, strict=True))
        ]
        readers = list(first.values())
        logits = self._forward(rows[readers], [inputs[index] for index in readers])
        for index, reader in enumerate(reads_for):
            if reader != index:
                self.cache.copy(int(rows[reader]), int(rows[index]))
        if len(readers) < len(rows):
            logits = logits[torch.from_numpy(np.searchsorted(readers, reads_for)).to(self.device)]
        return rows, logits

    def _forward(self, rows: np.ndarray, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        self.prefilled += sum(len(ids) for ids in inputs)
        return read(self.decoder, self.cache, rows, inputs, self.device)

    def _decode(self, decoding: np.ndarray) -> torch.Tensor:
        """Logits [rows, V] after the last token of each decoding row.

        Rows in between that wait take part where the cache is read in place; what is computed for
        them is dropped.
        """
        if not self.cache.in_place:
            ids = self.last[decoding, None].tolist()
            return read(self.decoder, self.cache, decoding, ids, self.device)
        front = np.arange(decoding[-1] + 1)
        self.cache.prepare(front, np.ones_like(front))
        logits = self.decoder(torch.from_numpy(self.last[front]).to(self.device), self.cache)
        self.cache.advance(decoding, np.ones_like(decoding))
        return logits if len(decoding) == len(front) else logits[decoding]


def draw(
    logits: torch.Tensor,
    numbers: torch.Tensor,
    *,
    temperature: float,
    restrict: Restrict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample by inverting the cumulative distribution, first over blocks, then inside of one.

    Args:
        logits: [n, V].
        numbers: [n] uniform in [0, 1); not used at temperature 0.
        temperature: logits are divided by it; 0 takes the likeliest token.
        restrict: leaves tokens out of the distribution, which is then normalised anew.

    Returns:
        (tokens [n], their log-probabilities [n]); those of temperature 0 are at temperature 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        logits = logits / temperature
    if restrict is not None:
        logits = restrict(logits)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    blocks = nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).cumsum(-1)
    total = sums[:, -1:].contiguous()
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        target = numbers[:, None].to(sums.dtype) * total
        block = _interval(sums, target)
        before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
        inner = blocks[torch.arange(len(block), device=block.device), block[:, 0]].cumsum(-1)
        tokens = block * BLOCK + _interval(inner, target - before)
    chosen = logits.gather(-1, tokens) - top - total.log()
    return tokens[:, 0], chosen[:, 0]


def _interval(cumulative: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Index [n, 1] of the interval that each number falls into.

    A number that rounding put at or beyond the end belongs to the last interval that is not empty.
    """
    end = cumulative[:, -1:].contiguous()
    return torch.minimum(
        torch.searchsorted(cumulative, number, right=True), torch.searchsorted(cumulative, end)
    )
