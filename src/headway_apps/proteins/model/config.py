"""DiTConfig: all that the network's shape and arithmetic depend on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from headway import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A diffusion transformer over symbols; `heads` must divide `width` into even sizes, for rotary positions.

    Symbols are read by their embedding and scored by the head. The absorbing state `mask` is read; it has a score only
    if it is among the first `scored` symbols, and that score means nothing.

    >>> DiTConfig(width=64, blocks=2, heads=4, cond=32, embedded=33, scored=33, mask=32).head_dim
    16
    """

    width: int
    blocks: int
    heads: int
    cond: int
    """Size of what is told of the noise."""
    embedded: int
    """Rows of the embedding: how many symbols can be read."""
    scored: int
    """Columns of the head: how many symbols get a score."""
    mask: int | None
    """The absorbing state; None where noise is uniform."""
    mlp_ratio: int = 4
    dropout: float = 0.1
    """Share dropped of what attention and MLP add, in training; attention's own weights are not dropped."""
    scale_by_sigma: bool = True
    """Scores are measured from r / (symbols - 1), with r = 1 / (exp(sigma_bar) - 1): what a guess would give."""
    head_bias: bool = True
    gelu: Literal["tanh", "erf"] = "tanh"
    silu_after_time: bool = True
    final: Literal["shift and scale", "scale"] = "shift and scale"
    """How the noise modulates the last norm."""

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "cond", "embedded", "scored", "mlp_ratio"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RequestError(f"got {name}={value!r}, takes a whole number of 1 or more")
        if self.width % self.heads or self.head_dim % 2:
            good = [str(n) for n in range(1, self.width // 2 + 1) if self.width % (2 * n) == 0]
            raise RequestError(
                f"got width {self.width} for {self.heads} heads, takes heads of one even size: "
                + (f"heads={', '.join(good)}" if good else f"a width that is a multiple of {2 * self.heads}")
            )
        if self.scored > self.embedded:
            raise RequestError(f"got {self.scored} scored symbols of {self.embedded} that are read, takes no more")
        if self.mask is not None and not (type(self.mask) is int and 0 <= self.mask < self.embedded):
            raise RequestError(f"got mask={self.mask!r}, takes one of the {self.embedded} symbols read, or None")
        if self.mask is None and self.scale_by_sigma:
            raise RequestError(
                "got scale_by_sigma without an absorbing state, takes it with mask alone; scale_by_sigma=False"
            )
        if self.scored - self.scores_mask < 1:
            raise RequestError("got no scored symbol but the mask, takes one more")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise RequestError(f"got dropout={self.dropout!r}, takes a share from 0 to below 1")
        for name, known in (("gelu", ("tanh", "erf")), ("final", ("shift and scale", "scale"))):
            if getattr(self, name) not in known:
                raise RequestError(f"got {name}={getattr(self, name)!r}, takes {' or '.join(map(repr, known))}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def scores_mask(self) -> bool:
        """Whether the absorbing state has a column among the scores."""
        return self.mask is not None and self.mask < self.scored

    def check_alphabet(self, size: int, mask: int | None) -> None:
        """Refuse symbols that this network does not know: `size` of them, of which `mask` is the absorbing state."""
        if mask != self.mask:
            raise RequestError(
                f"got an alphabet whose mask is {mask} for a network whose mask is {self.mask}, takes one for both:"
                f" mask={mask} in the network's config, with weights trained so"
            )
        if not {self.mask, *range(size)} == {self.mask, *range(self.scored)} or size > self.embedded:
            raise RequestError(
                f"got an alphabet of {size} symbols for a network that reads {self.embedded} and scores {self.scored},"
                f" takes as many, so that none is dead or without a score: embedded={size}, scored={size}"
            )
