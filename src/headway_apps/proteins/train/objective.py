"""Objective: what a batch of proteins costs a model at one step of training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from headway_apps.proteins.data.packing import Batch
from headway_apps.proteins.diffusion.curriculum import Curriculum
from headway_apps.proteins.diffusion.graphs import Graph
from headway_apps.proteins.diffusion.losses import cross_entropy, dwdse
from headway_apps.proteins.diffusion.schedules import Schedule, draw_positions

Scores = Callable[[Tensor, Tensor], Tensor]
"""scores(noised (T,), sigma_bar (N,)) -> log scores (T, V) of the batch's packed sequences."""


@dataclasses.dataclass(frozen=True)
class Objective:
    graph: Graph
    schedule: Schedule
    curriculum: Curriculum
    loss: Literal["cross-entropy", "score-entropy"]
    seed: int

    def nats(self, scores: Scores, batch: Batch, step: int, number: int) -> Tensor:
        """The sum over the batch, which is the `number`-th of the run and so has its own noise, on every machine alike
        but for the kind of device. Dropout is seeded too."""
        device = batch.tokens.device
        torch.manual_seed(seed_of(self.seed, number, "dropout"))
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, number, "noise"))
        schedule = self.curriculum.schedule(self.schedule, step)
        times = self.curriculum.times(draw_positions(len(batch.lengths), generator=generator), step)
        level, free = schedule.sigma_bar(times), batch.free
        noised = self.graph.perturb(batch.tokens, level[batch.document], generator=generator, free=free)
        log_score = scores(noised, level.float())
        given = self.graph, log_score, noised, batch.tokens, free
        if self.loss == "cross-entropy":
            each = cross_entropy(*given, weight=schedule.reveal(times)[batch.document].float())
        else:
            levels, rates = (each[batch.document].float() for each in (level, schedule.rate(times)))
            each = dwdse(*given, sigma_bar=levels, rate=rates)
        return each.sum()


def seed_of(seed: int, number: int, what: str) -> int:
    """Of one batch of a run."""
    mixed = hashlib.blake2b(f"{seed} {number} {what}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1
