"""Measured times: a shipped table per kind of machine, looked up by the nearest measured case."""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import TypedDict

from headway.limits.machine import Machine
from headway.limits.request import Request


class Row(TypedDict):
    """One measured case: the median milliseconds of each backend."""

    mask: str
    dtype: str
    head_dim: int
    q_len: int
    kv_len: int
    sharing: int
    """Query heads to a key head."""
    grad: bool
    ms: dict[str, float]


@functools.cache
def table(machine_name: str) -> tuple[Row, ...]:
    """The shipped rows for that kind of machine, or none."""
    slug = machine_name.lower().replace(" ", "-")
    file = resources.files("headway.choice") / "tables" / f"{slug}.json"
    return tuple(json.loads(file.read_text())["rows"]) if file.is_file() else ()


def measured(request: Request, machine: Machine) -> dict[str, float]:
    """Milliseconds by backend in the nearest measured case, empty if none is near."""
    words = " & ".join(sorted(request.mask)) or "none"
    near = [
        (distance, row["ms"])
        for row in table(machine.name)
        if row["mask"] == words and row["dtype"] == request.dtype and row["grad"] == request.needs_grad
        if (distance := _distance(row, request)) <= 1.5
    ]
    return min(near, key=lambda pair: pair[0])[1] if near else {}


def _distance(row: Row, request: Request) -> float:
    """How many doublings of length, head size and sharing lie between a row and a request, at most."""
    pairs = (
        (row["q_len"], request.q_len),
        (row["kv_len"], request.kv_len),
        (row["head_dim"], request.head_dim),
        (row["sharing"], request.heads // max(request.kv_heads, 1)),
    )
    return max(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)
