"""Replay: a batch's forward and backward pass recorded as one CUDA graph, which the host starts with one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train.fixed import Fixed
from headway_apps.proteins.train.objective import Noised, Objective
from headway_apps.training.gradients import Gradients

STEP = 64
"""Room for documents comes in multiples of it."""


class Replay:
    """Gradients of batches of up to `tokens` tokens, whose documents are of `longest` at most and of `mean` on average.

    Every batch adds to `gradients`.
    """

    def __init__(
        self, model: DiT, objective: Objective, autocast: Callable[[], AbstractContextManager[None]],
        *, tokens: int, longest: int, mean: float,
    ) -> None:  # fmt: skip
        self._model, self._objective, self._autocast = model, objective, autocast
        self.gradients = Gradients(model)
        self._tokens, self._longest = tokens, longest
        self._documents = _rounded(1.5 * tokens / mean)  # few batches hold more, and each room is recorded anew
        self._recorded: dict[int, _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()
        """Of memory, for all rooms: one is in use at a time."""

    def backward(self, batch: Noised, lengths: Tensor, share: Tensor) -> Tensor:
        """The batch's nats; `share` times their gradient is added to the weights'. Lengths are on the host."""
        filler = math.ceil((self._tokens - batch.tokens.numel()) / self._longest)
        documents = max(self._documents, _rounded(lengths.numel() + filler))
        found = self._recorded.get(documents)
        if found is None:
            fixed = Fixed.room(self._tokens, documents, self._longest, batch)
            fixed.fill(batch, lengths)
            found = self._recorded[documents] = _Recorded(self, fixed, share)
        found.fixed.fill(batch, lengths)
        found.share.copy_(share)
        found.graph.replay()
        return found.nats.clone()

    def pass_of(self, fixed: Fixed, share: Tensor) -> Tensor:
        """What is recorded."""
        noised = fixed.noised
        with self._autocast():
            log_score = self._model(noised.tokens, noised.level, fixed.packed())
        nats = self._objective.cost(log_score, noised)
        self.gradients.add(torch.autograd.grad(nats * share, self.gradients.weights))
        return nats.detach()


class _Recorded:
    """One room, and the pass over what is in it."""

    def __init__(self, of: Replay, fixed: Fixed, share: Tensor) -> None:
        self.fixed, self.share, self.graph = fixed, share.clone(), torch.cuda.CUDAGraph()
        device = share.device
        kept = of.gradients.flat.clone()
        with torch.random.fork_rng([device]):  # dropout of the batch to come is drawn as if nothing had been recorded
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(3):  # what compiles, tries kernels or allocates does so before
                    of.pass_of(fixed, self.share)
            torch.cuda.current_stream(device).wait_stream(aside)
            # The thread that reads batches ahead pins memory meanwhile, which a recording of all threads would forbid.
            with torch.cuda.graph(self.graph, of.pool, capture_error_mode="thread_local"):
                self.nats = of.pass_of(fixed, self.share)
        of.gradients.flat.copy_(kept)


def _rounded(documents: float) -> int:
    return STEP * math.ceil(documents / STEP)
