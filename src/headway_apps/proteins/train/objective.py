"""Objective: what a batch of proteins costs a model at one step of training."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import torch
from torch import Tensor

from headway_apps.proteins.data.packing import Batch
from headway_apps.proteins.diffusion.curriculum import Curriculum
from headway_apps.proteins.diffusion.graphs import Graph
from headway_apps.proteins.diffusion.losses import cross_entropy, dwdse
from headway_apps.proteins.diffusion.schedules import Schedule, draw_positions


@dataclasses.dataclass(frozen=True, eq=False)
class Noised:
    """A batch with the noise of one step, and all that model and loss are told of it."""

    tokens: Tensor
    """(T,) noised."""
    clean: Tensor
    free: Tensor
    level: Tensor
    """(N,) sigma_bar of each sequence."""
    weights: tuple[Tensor, ...]
    """What the loss is told of each token: `reveal`, or `sigma_bar` and `rate`."""

    @property
    def of_tokens(self) -> tuple[Tensor, ...]:
        return self.tokens, self.clean, self.free, *self.weights


@dataclasses.dataclass(frozen=True)
class Objective:
    graph: Graph
    schedule: Schedule
    curriculum: Curriculum
    loss: Literal["cross-entropy", "score-entropy"]
    seed: int

    def noised(self, batch: Batch, step: int, number: int) -> Noised:
        """The batch, which is the `number`-th of the run and so has its own noise, on every machine alike but for the
        kind of device. Dropout is seeded too."""
        device = batch.tokens.device
        torch.manual_seed(seed_of(self.seed, number, "dropout"))
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, number, "noise"))
        schedule = self.curriculum.schedule(self.schedule, step)
        times = self.curriculum.times(draw_positions(len(batch.lengths), generator=generator), step)
        level, free = schedule.sigma_bar(times), batch.free
        noised = self.graph.perturb(batch.tokens, level[batch.document], generator=generator, free=free)
        told = (schedule.reveal(times),) if self.loss == "cross-entropy" else (level, schedule.rate(times))
        weights = tuple(each[batch.document].float() for each in told)
        return Noised(noised, batch.tokens, free, level.float(), weights)

    def cost(self, log_score: Tensor, noised: Noised) -> Tensor:
        """The sum of nats over the batch, given log scores (T, V)."""
        given = self.graph, log_score, noised.tokens, noised.clean, noised.free
        if self.loss == "cross-entropy":
            (weight,) = noised.weights
            return cross_entropy(*given, weight=weight).sum()
        levels, rates = noised.weights
        return dwdse(*given, sigma_bar=levels, rate=rates).sum()


def seed_of(seed: int, number: int, what: str) -> int:
    """Of one batch of a run."""
    mixed = hashlib.blake2b(f"{seed} {number} {what}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1
