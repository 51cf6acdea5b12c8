"""Batches of whole sequences laid end to end, without padding, in an order that any run can take up again."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.alphabet import Alphabet
from headway_apps.proteins.data.shards import Part
from headway_apps.proteins.errors import DataError

Ints = NDArray[np.int64]
BOUNDARIES = 2
"""Tokens of a sequence that are no residues."""


@dataclass(frozen=True)
class Batch:
    """N sequences, T tokens in all; a sequence's tokens begin and end with those of the alphabet."""

    tokens: Tensor
    """(T,) ids."""
    lengths: Tensor
    """(N,) tokens of each sequence."""
    positions: Tensor
    """(T,) places that begin with 0 in each sequence."""
    document: Tensor
    """(T,) the number of the sequence, 0 to N - 1."""
    index: Tensor
    """(N,) places of the sequences in their part."""

    @property
    def residues(self) -> int:
        return self.tokens.numel() - BOUNDARIES * self.lengths.numel()

    @property
    def free(self) -> Tensor:
        """(T,) where a residue stands: all but the tokens that begin and end a sequence."""
        return (self.positions > 0) & (self.positions < (self.lengths - 1)[self.document])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(*(each.to(device, non_blocking=non_blocking) for each in self._tensors()))

    def pin_memory(self) -> Batch:
        return Batch(*(each.pin_memory() for each in self._tensors()))

    def padded(self, pad: int) -> tuple[Tensor, Tensor]:
        """The same as rows (N, L) filled up with `pad`, and where they are real: for models that take no packing."""
        rows = self.tokens.new_full((self.lengths.numel(), int(self.lengths.max())), pad)
        real = torch.zeros_like(rows, dtype=torch.bool)
        rows[self.document, self.positions] = self.tokens
        real[self.document, self.positions] = True
        return rows, real

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.lengths, self.positions, self.document, self.index


def pack(letters: Sequence[NDArray[np.uint8]], index: Sequence[int] | Ints, alphabet: Alphabet) -> Batch:
    """One batch of these sequences, given as bytes of ASCII."""
    if not letters:
        raise RequestError("got no sequence to pack, takes at least one")
    lengths = np.array([len(each) + BOUNDARIES for each in letters], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    document = np.repeat(np.arange(len(letters)), lengths)
    inside = np.ones(len(document), dtype=np.bool_)
    inside[starts] = inside[ends - 1] = False
    text = np.concatenate(letters)
    tokens = np.empty(len(document), dtype=np.int64)
    tokens[inside] = _table(alphabet)[text]
    if tokens[inside].min(initial=0) < 0:
        alphabet.check(text.tobytes().decode("latin-1"))
    tokens[starts], tokens[ends - 1] = alphabet.begin, alphabet.end
    arrays = tokens, lengths, np.arange(len(document)) - starts[document], document, np.asarray(index, dtype=np.int64)
    return Batch(*map(torch.from_numpy, arrays))


@lru_cache
def _table(alphabet: Alphabet) -> Ints:
    table = np.full(256, -1, dtype=np.int64)
    for letter in alphabet.letters:
        table[ord(letter)] = alphabet.id_of(letter)
    return table


def bins(lengths: Sequence[int] | Ints, budget: int) -> list[list[int]]:
    """Places of the lengths, put together so that each bin sums to at most `budget`: each goes where it fits best.

    They are taken as they come, not the longest first, or some bins would hold long sequences only.
    """
    found: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for at, length in enumerate(map(int, lengths)):
        best = bisect_left(room, (length, -1))
        left, bin_ = room.pop(best) if best < len(room) else (budget, len(found))
        if left < length:
            raise RequestError(f"got a length of {length}, takes at most {budget}")
        if bin_ == len(found):
            found.append([])
        found[bin_].append(at)
        insort(room, (left - length, bin_))
    return found


def shuffled(count: int, seed: int, draw: int) -> Ints:
    """The numbers below `count` in a random order (by splitmix64), the same in every version of every package."""
    start = _splitmix(np.array([seed % 2**64], dtype=np.uint64), 1) + np.array([draw], dtype=np.uint64)
    return np.argsort(_splitmix(_splitmix(start, 1), count), kind="stable")


def _splitmix(state: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """So many numbers of the generator that begins with this state."""
    return _mix(state + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64))


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Batches(Iterator[Batch]):
    """Packed batches of at most `tokens` tokens: an iterator that knows its place (`state_dict`).

    The stream is that of all ranks together: rank r of R takes each R-th batch, from the r-th on. It depends not on
    ranks but on `per_step`, how many batches all ranks together take in one step of the optimizer; so a run can go on
    with another number of ranks. Every sequence comes once in each epoch, none is cut. With no end (`epochs=None`) no
    step falls short of batches; with one, the last may, and some ranks then have a batch less than others. With
    `buckets`, a batch holds sequences between two of these lengths only.
    """

    def __init__(
        self,
        part: Part,
        alphabet: Alphabet,
        tokens: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        buckets: Sequence[int] = (),
        per_step: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not 0 <= rank < ranks or per_step < 1 or per_step % ranks:
            raise RequestError(
                f"got rank {rank} of {ranks} with {per_step} batches a step, takes a rank below ranks, and a number of "
                "batches that ranks divide"
            )
        if epochs is not None and epochs < 1:
            raise RequestError(f"got {epochs} epochs, takes 1 epoch or more, or None for no end")
        if list(buckets) != sorted(set(buckets)):
            raise RequestError(f"got the buckets {list(buckets)}, takes lengths that rise")
        if not len(part):
            raise DataError(f"got no sequences in {part.name}, takes at least one")
        part.fits(alphabet)
        self._lengths = part.lengths() + BOUNDARIES
        if (longest := int(self._lengths.max())) > tokens:
            raise RequestError(
                f"got a batch of {tokens} tokens, takes at least {longest}, the longest of {part.name} with its "
                f"{BOUNDARIES} boundary tokens; give larger batches, or prepare shorter sequences"
            )
        self._part, self._alphabet, self._tokens, self._buckets = part, alphabet, tokens, tuple(buckets)
        self._seed, self._shuffle, self._per_step = seed, shuffle, per_step
        self._rank, self._ranks = rank, ranks
        self._total = None if epochs is None else epochs * len(part)
        self._size = self._sequences_at_once()
        self._window = self._taken = 0
        self._plan: list[list[int]] | None = None
        self._orders: dict[int, Ints] = {}

    def __next__(self) -> Batch:
        if self._plan is None:
            self._plan = self._planned(self._window)
        while self._taken >= len(self._plan):
            if not self._plan:
                raise StopIteration
            self._window, self._taken = self._window + 1, 0
            self._plan = self._planned(self._window)
        mine, self._taken = self._taken + self._rank, self._taken + self._ranks
        if mine >= len(self._plan):  # the last step of all, which has no batch for this rank
            return next(self)
        chosen = self._plan[mine]
        return pack([self._part.letters_of(at) for at in chosen], chosen, self._alphabet)

    @property
    def epoch(self) -> float:
        """How often all sequences were given out."""
        part = self._taken / len(self._plan) if self._plan else 0
        return (self._window + part) * self._size / len(self._part)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream. All ranks that gave out the same number of batches have the same."""
        return {"window": self._window, "taken": self._taken, "stream": self._stream()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; refused where it would be another stream."""
        ours = self._stream()
        if differ := [name for name in ours if state["stream"].get(name) != ours[name]]:
            told = "; ".join(f"{name} was {state['stream'].get(name)!r}, is {ours[name]!r}" for name in differ)
            raise RequestError(f"got the place in another stream of batches ({told}), takes one of this")
        if state["taken"] % self._ranks:
            raise RequestError(
                f"got a place after {state['taken']} batches, takes a multiple of the {self._ranks} ranks; go on with "
                "as many ranks as before, or save at the end of a step"
            )
        self._window, self._taken, self._plan = state["window"], state["taken"], None

    def _stream(self) -> dict[str, Any]:
        return {
            "data": self._part.fingerprint, "alphabet": self._alphabet.name, "tokens": self._tokens,
            "seed": self._seed, "shuffle": self._shuffle, "total": self._total, "buckets": list(self._buckets),
            "per_step": self._per_step,
        }  # fmt: skip

    def _sequences_at_once(self) -> int:
        """So many that all bins but a few are full; a multiple of a step's batches, so that each can have one."""
        wanted = max(1024, 32 * self._per_step * self._tokens // int(self._lengths.mean()))
        return -(-min(wanted, len(self._part)) // self._per_step) * self._per_step

    def _planned(self, window: int) -> list[list[int]]:
        """Batches of one window of the stream, those of a step alike in tokens; none after the end."""
        first, last = window * self._size, (window + 1) * self._size
        last = last if self._total is None else min(last, self._total)
        if first >= last:
            return []
        chosen = np.concatenate([self._order(epoch)[a:b] for epoch, a, b in self._spans(first, last)])
        lengths = self._lengths[chosen]
        bucket = np.searchsorted(self._buckets, lengths - BOUNDARIES, side="right")
        found: list[list[int]] = []
        for each in np.unique(bucket):
            members = np.flatnonzero(bucket == each)
            found += [members[bin_].tolist() for bin_ in bins(lengths[members], self._tokens)]
        _split(found, self._per_step)
        if self._shuffle:
            found.sort(key=lambda bin_: -int(lengths[bin_].sum()))
            steps = [found[at : at + self._per_step] for at in range(0, len(found), self._per_step)]
            found = [bin_ for at in shuffled(len(steps), ~self._seed, window) for bin_ in steps[at]]
        return [chosen[bin_].tolist() for bin_ in found]

    def _spans(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        count = len(self._part)
        for epoch in range(first // count, (last - 1) // count + 1):
            yield epoch, max(0, first - epoch * count), min(count, last - epoch * count)

    def _order(self, epoch: int) -> Ints:
        if not self._shuffle:
            return np.arange(len(self._part))
        if epoch not in self._orders:
            self._orders = {each: self._orders[each] for each in self._orders if each == epoch - 1}
            self._orders[epoch] = shuffled(len(self._part), self._seed, epoch)
        return self._orders[epoch]


def _split(found: list[list[int]], multiple: int) -> None:
    """Halve those with the most sequences until their number is such a multiple, or all have one sequence."""
    while len(found) % multiple:
        most = max(found, key=len)
        if len(most) == 1:
            return
        found.append(most[len(most) // 2 :])
        del most[len(most) // 2 :]
