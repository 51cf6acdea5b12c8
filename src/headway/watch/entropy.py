"""How attention spreads: entropy and largest logit of each head, on evenly picked query rows, block by block of keys.

Scores are worked out anew in float64 for those rows alone, so nothing of size queries × keys is ever made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from headway.masks import Frame, Mask
from headway.watch.statistics import wide

BLOCK = 1 << 19
"""Scores looked at together, and numbers of keys widened for them: 4 MiB."""
_EXAMPLES = 8
"""Of a large batch so many are looked at, with more rows of each: keys are read anew for each example."""

Scores: TypeAlias = Callable[[int, Tensor, int, int], Tensor]
"""(batch entry, query rows, first key, end) -> (heads, rows, keys): as softmax takes them, -inf where blocked."""
Added: TypeAlias = Callable[[int, Tensor, int, int], Tensor]
"""The same for what is added to scores; any axis may be 1."""


@dataclasses.dataclass(slots=True)
class Heads:
    """One attention's heads, over all calls. Sums a head; read them with the methods."""

    count: int
    rows: list[int]
    """Query rows that were looked at and see a key."""
    entropies: list[float]
    rooms: list[float]
    """Sum of log(keys that the row may see): the most that its entropy can be."""
    logits: list[float]
    calls: int = 0
    empty: int = 0
    """Rows of a head that see no key."""
    nonfinite: int = 0
    """Rows of a head whose scores hold NaN or +Inf."""
    of_rows: int = 0
    """Query rows there were, looked at or not."""

    @classmethod
    def blank(cls, count: int) -> Heads:
        return cls(count, [0] * count, [0.0] * count, [0.0] * count, [-math.inf] * count)

    def entropy(self, head: int) -> float | None:
        """Mean over rows, in nats."""
        return self.entropies[head] / self.rows[head] if self.rows[head] else None

    def share(self, head: int) -> float | None:
        """Entropy as a share of what it could be: 1 is even, 0 is one key. None where rows see one key."""
        return self.entropies[head] / self.rooms[head] if self.rooms[head] > 0 else None

    def highest(self, head: int) -> float | None:
        """The largest logit: scaled, capped and biased as it enters softmax."""
        return self.logits[head] if math.isfinite(self.logits[head]) else None

    def add(self, entropy: Tensor, room: Tensor, highest: Tensor) -> None:
        """Rows more, (heads, rows) each; those that see nothing have a room of -inf."""
        sees = room > -math.inf
        sound = sees & entropy.isfinite() & highest.isfinite()
        self.empty += int((~sees).sum())
        self.nonfinite += int((sees & ~sound).sum())
        table = torch.stack(
            (
                sound.sum(1).to(entropy.dtype),
                torch.where(sound, entropy, 0.0).sum(1),
                torch.where(sound, room, 0.0).sum(1),
                torch.where(sound, highest, -math.inf).amax(1),
            ),
            dim=1,
        ).tolist()
        for head, (rows, entropies, rooms, logit) in enumerate(table):
            self.rows[head] += round(rows)
            self.entropies[head] += entropies
            self.rooms[head] += rooms
            self.logits[head] = max(self.logits[head], logit)

    def join(self, other: Heads) -> None:
        """All that another saw of the same heads."""
        for head in range(self.count):
            self.rows[head] += other.rows[head]
            self.entropies[head] += other.entropies[head]
            self.rooms[head] += other.rooms[head]
            self.logits[head] = max(self.logits[head], other.logits[head])
        self.calls += other.calls
        self.empty += other.empty
        self.nonfinite += other.nonfinite
        self.of_rows += other.of_rows

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Heads:
        return cls(**{**held, "logits": [-math.inf if one is None else one for one in held["logits"]]})


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """An attention call, as far as its entropy depends on it."""

    frame: Frame
    scores: Scores
    sinks: Tensor | None = None
    """One logit a head, that takes weight: one more thing to look at."""


def look(seen: Seen, heads: Heads, at_most: int) -> None:
    """Add one call to `heads`, by at most so many (example, query) rows, evenly picked."""
    frame = seen.frame
    heads.calls += 1
    heads.of_rows += (total := frame.batch * frame.q_len)
    if total == 0 or frame.kv_len == 0:
        heads.empty += total * frame.heads
        return
    examples = min(frame.batch, at_most, max(_EXAMPLES, at_most // frame.q_len))
    rows = _evenly(frame.q_len, min(frame.q_len, at_most // examples)).to(frame.device)
    for batch in _evenly(frame.batch, examples).tolist():
        heads.add(*_entropy(seen, batch, rows))


def _evenly(count: int, at_most: int) -> Tensor:
    """So many of the first `count` numbers, the last among them."""
    return torch.linspace(count - 1, 0, at_most, dtype=torch.float64).round().long().flip(0)


def _entropy(seen: Seen, batch: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, log of how many keys are seen, and largest logit, (heads, rows) each, block by block."""
    frame = seen.frame
    step = max(1, BLOCK // (frame.heads * max(len(rows), 128)))
    zero = wide(torch.zeros(frame.heads, len(rows), device=frame.device))
    highest, total, weighted, count = zero - math.inf, zero, zero, zero

    def join(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        above = torch.maximum(highest, scores.amax(-1))
        base = torch.where(above == -math.inf, 0.0, above)
        fade = (highest - base).exp()
        parts = (scores - base[..., None]).exp()
        told = torch.where(scores == -math.inf, 0.0, parts * scores)
        return above, total * fade + parts.sum(-1), weighted * fade + told.sum(-1)

    for first in range(0, frame.kv_len, step):
        scores = seen.scores(batch, rows, first, min(first + step, frame.kv_len))
        count = count + (scores != -math.inf).sum(-1)
        highest, total, weighted = join(scores)
    logit = highest
    if seen.sinks is not None:
        highest, total, weighted = join(wide(seen.sinks.detach())[:, None, None].expand(-1, len(rows), 1))
        count = torch.where(count > 0, count + 1, count)
    sees = count > 0
    entropy = torch.where(sees, total.log() + highest - weighted / total, 0.0)
    return entropy.clamp(min=0.0), torch.where(sees, count.log(), -math.inf), logit


def scores_of(q: Tensor, k: Tensor, scale: float | None, added: list[Added], softcap: float | None = None) -> Scores:
    """Scores from (B, H, L, D) queries and keys; several query heads may share one key head."""
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale

    def scores(batch: int, rows: Tensor, first: int, end: int) -> Tensor:
        queries, keys = wide(q[batch][:, rows]), wide(k[batch][:, first:end])
        grouped = queries.reshape(keys.shape[0], -1, queries.shape[-1])
        product = ((grouped * scale) @ keys.transpose(-1, -2)).view(*queries.shape[:2], end - first)
        if softcap is not None:
            product = softcap * torch.tanh(product / softcap)
        for one in added:
            product = product + one(batch, rows, first, end)
        return product

    return scores


def causal(batch: int, rows: Tensor, first: int, end: int) -> Tensor:
    """As F.scaled_dot_product_attention has it: the first query meets the first key."""
    keys = torch.arange(first, end, device=rows.device)
    return _blocked(keys <= rows[:, None])


def dense(mask: Tensor, frame: Frame) -> Added:
    """A tensor as F.scaled_dot_product_attention takes it: bool, True where it may; or what is added."""
    whole = mask.expand(frame.batch, frame.heads, frame.q_len, frame.kv_len)

    def added(batch: int, rows: Tensor, first: int, end: int) -> Tensor:
        part = whole[batch, :, :, first:end][:, rows]
        return _blocked(part) if part.dtype == torch.bool else unblurred(part)

    return added


def typed(mask: Mask, frame: Frame) -> Added:
    """A mask of ours, asked for these elements alone."""
    rule, score = mask.rule(frame), mask.score(frame)
    heads = torch.arange(frame.heads, device=frame.device, dtype=torch.int32).view(-1, 1, 1)

    def added(batch: int, rows: Tensor, first: int, end: int) -> Tensor:
        b = torch.full((1, 1, 1, 1), batch, device=frame.device, dtype=torch.int32)
        keys = torch.arange(first, end, device=frame.device, dtype=torch.int32)
        at = (b, heads, rows.to(torch.int32)[:, None], keys)
        part = _blocked(rule(*at))
        if score is not None:
            part = part + score(wide(torch.zeros(1, 1, 1, 1, device=frame.device)), *at)
        return part.squeeze(0) if part.dim() == 4 else part

    return added


def unblurred(scores: Tensor) -> Tensor:
    """Wide, and -inf where a dtype's lowest numbers stand for it, as many models write their masks."""
    return torch.where(scores > torch.finfo(scores.dtype).min / 2, wide(scores), -math.inf)


def _blocked(may: Tensor) -> Tensor:
    return torch.where(may, wide(torch.zeros((), device=may.device)), -math.inf)
