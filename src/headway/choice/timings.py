"""Measured times: a shipped table per kind of machine, looked up by the nearest measured case."""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import NamedTuple, TypedDict

from headway.limits.machine import Machine
from headway.limits.request import Request

TILE = 128
"""Queries that a kernel's block computes."""
FULL = 128
"""Tiles that a GPU computes at once: fewer take as long."""
SHORT = 64
"""Lengths up to here cost the same."""


class Row(TypedDict):
    """One measured case: the median milliseconds of each backend, on the device."""

    mask: str
    dtype: str
    head_dim: int
    q_len: int
    kv_len: int
    sharing: int
    """Query heads to a key head."""
    grad: bool
    tiles: int
    ms: dict[str, float]


class Table(TypedDict):
    """What was measured on one kind of machine."""

    host_ms: dict[str, dict[str, float]]
    """What a call takes the host by each backend: 'plain', and with gradients, 'grad'."""
    rows: list[Row]


class Time(NamedTuple):
    """What one backend takes for a call, by what was measured."""

    ms: float
    host: bool
    """The device is done sooner than the host has asked for it."""


@functools.cache
def table(machine_name: str) -> Table:
    """The shipped measurements for that kind of machine, or none."""
    slug = machine_name.lower().replace(" ", "-")
    file = resources.files("headway.choice") / "tables" / f"{slug}.json"
    found: Table = json.loads(file.read_text()) if file.is_file() else {"host_ms": {}, "rows": []}
    return found


def measured(request: Request, machine: Machine) -> dict[str, Time]:
    """Time by backend, from the nearest measured case; empty if none is near."""
    words = " & ".join(sorted(request.mask)) or "none"
    known = table(machine.name)
    near = [
        (away, row)
        for row in known["rows"]
        if row["mask"] == words and row["dtype"] == request.dtype and row["grad"] == request.needs_grad
        if (away := _distance(row, request))[0] <= 1.5
    ]
    if not near:
        return {}
    row = min(near, key=lambda pair: pair[0])[1]
    share = max(_tiles(request), FULL) / max(row["tiles"], FULL)
    # A compiled program says no batch, and may be run as a CUDA graph, where the host is out of the way.
    host = {} if request.compiled else known["host_ms"]["grad" if request.needs_grad else "plain"]
    slowest = max(host.values(), default=0.0)
    return {name: _time(ms * share, host.get(name, slowest)) for name, ms in row["ms"].items()}


def _time(device: float, host: float) -> Time:
    return Time(max(device, host), host > device)


def _tiles(request: Request) -> int:
    return request.batch * request.heads * math.ceil(request.q_len / TILE)


def _distance(row: Row, request: Request) -> tuple[float, float]:
    """How many doublings of length, head size and sharing lie between a row and a request, at most; and of tiles."""
    pairs = (
        (_length(row["q_len"]), _length(request.q_len)),
        (_length(row["kv_len"]), _length(request.kv_len)),
        (row["head_dim"], request.head_dim),
        (row["sharing"], request.heads // max(request.kv_heads, 1)),
    )
    return max(_doublings(a, b) for a, b in pairs), _doublings(row["tiles"], _tiles(request))


def _length(length: int) -> int:
    """One query is a kind of its own: kernels for it split the keys."""
    return length if length == 1 else max(length, SHORT)


def _doublings(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))
