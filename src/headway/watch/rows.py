"""The records a recording is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from headway.watch.statistics import Statistics

MODULE, OP = "output", "op"
MODULE_GRADIENT, OP_BACKWARD, PARAMETER_GRADIENT = "output gradient", "backward op", "parameter gradient"

FIELDS = (
    "kind", "path", "name", "order", "shape", "dtype", "calls", "count", "mean", "std", "min", "max", "zero_share",
    "nans", "infs", "norm", "parameters", "entropy", "entropy_share", "max_logit",
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class Row:
    """One tensor of the run, over all calls that made it."""

    kind: str
    path: str
    """Of the module, or of the parameter for its gradient; '' is the model itself."""
    name: str
    """What of it: the module's class and which output, or the operator and which of its calls."""
    order: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    calls: int = 0
    values: Statistics = dataclasses.field(default_factory=Statistics)
    norm: float = 0.0
    """Of the last call."""
    parameters: tuple[str, ...] = ()
    """Those an operator took: how projections are seen that have no forward of their own."""

    def add(self, values: Statistics, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype, self.norm = shape, dtype, values.norm
        self.calls += 1
        self.values.add(values)

    def flat(self) -> dict[str, Any]:
        """As one line of a table; what no finite number speaks for is empty."""
        values, some = self.values, self.values.finite > 0
        return {
            "kind": self.kind,
            "path": self.path,
            "name": self.name,
            "order": self.order,
            "shape": "x".join(map(str, self.shape)),
            "dtype": self.dtype,
            "calls": self.calls,
            "count": values.count,
            "mean": values.mean if some else None,
            "std": values.std if some else None,
            "min": values.least if some else None,
            "max": values.most if some else None,
            "zero_share": values.zero_share,
            "nans": values.nans,
            "infs": values.infs,
            "norm": self.norm,
            "parameters": " ".join(self.parameters),
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Row:
        values = dict(held["values"])
        values["least"] = math.inf if values["least"] is None else values["least"]
        values["most"] = -math.inf if values["most"] is None else values["most"]
        return cls(
            **{
                **held,
                "shape": tuple(held["shape"]),
                "parameters": tuple(held["parameters"]),
                "values": Statistics(**values),
            }
        )


@dataclasses.dataclass(slots=True)
class Parameter:
    """One parameter, and what became of it in the run."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    """All of them, where modules share it."""
    trainable: bool
    zeros_only: bool
    """It held nothing but zeros when the block began, as a fresh bias does."""
    used: bool = False
    """An operator of a forward pass took it."""
    reached: int = 0
    """Backward passes that brought it a gradient."""
    nonzero: bool = False
    """One of those gradients was not zero everywhere."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(slots=True)
class Calls:
    """A module and how often it ran."""

    kind: str
    calls: int = 0
    unseen: str = ""
    """Why it cannot be watched, if it cannot."""


@dataclasses.dataclass(slots=True)
class Origin:
    """An operator that made NaN or Inf of inputs that had none, or the first to be handed one that nobody here made."""

    what: str
    """'NaN' or 'Inf'."""
    op: str
    path: str
    phase: str
    """'forward', 'backward', or 'outside' for operators between the model's own."""
    order: int
    inputs: str
    """What it was given: 'finite', 'Inf', or the name of what held the NaN already."""


@dataclasses.dataclass(slots=True)
class Facts:
    """About the run as a whole."""

    model: str = ""
    torch: str = ""
    forwards: int = 0
    backwards: int = 0
    training: bool = False
    grad_enabled: bool = False
    """In one forward pass at least."""
    unread: int = 0
    """Tensors whose numbers cannot be read as they lie: subclasses, nested, quantised, meta."""
    error: str = ""
    """What ended the block, if an exception did."""
