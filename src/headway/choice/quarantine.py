"""Kernels known to be wrong: each entry names the thread, when it strikes, and a probe that can acquit a machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from headway.limits.limit import Refusal
from headway.limits.machine import Machine
from headway.limits.request import Request


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """One known defect of one backend."""

    name: str
    backend: str
    thread: str
    defect: str
    strikes: Callable[[Request, Machine], bool]
    remedy: str = "choose another backend, or run `headway doctor --acquit` to look for the defect here"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if self.name in machine.acquitted or not self.strikes(request, machine):
            return None
        return Refusal(f"a call that meets {self.thread}: {self.defect}", "calls outside that quarantine", self.remedy)


def _cudnn_backward_half_tile(request: Request, machine: Machine) -> bool:
    lengths = (request.q_len, request.kv_len)
    masked = bool(request.mask - {"causal", "causal-upper-left"})
    since = machine.version("torch") >= (2, 11)
    return request.needs_grad and masked and since and any(n % 128 == 64 for n in lengths)


def _cudnn_few_kv_heads(request: Request, machine: Machine) -> bool:
    return (machine.capability or (0, 0)) >= (10, 0) and request.kv_heads < 8


def _flash4_partial_vector(request: Request, machine: Machine) -> bool:
    return request.needs_grad and request.head_dim % 16 != 0 and machine.capability == (9, 0)


def _mps_long_or_strided(request: Request, machine: Machine) -> bool:
    return machine.device == "mps" and ("causal" in request.mask or not request.aligned)


def _efficient_long_mask(request: Request, machine: Machine) -> bool:
    # 32-bit offsets into the bias: batch * heads * queries * keys elements.
    elements = request.batch * request.heads * request.q_len * request.kv_len
    return bool(request.mask - {"causal", "causal-upper-left"}) and elements >= 2**31


QUARANTINE: tuple[Quarantined, ...] = (
    Quarantined(
        "cudnn-backward-half-tile",
        "sdpa-cudnn",
        "pytorch#196678",
        "NaN in the gradient of q with a mask at lengths of 64 modulo 128",
        _cudnn_backward_half_tile,
    ),
    Quarantined(
        "cudnn-few-kv-heads",
        "sdpa-cudnn",
        "pytorch#193893",
        "wrong results on Blackwell with fewer than 8 key heads",
        _cudnn_few_kv_heads,
    ),
    Quarantined(
        "flash4-partial-vector",
        "flash4",
        "flash-attn-4 4.0.0b36 on Hopper",
        "wrong gradient of q where head_dim is no multiple of 16",
        _flash4_partial_vector,
    ),
    Quarantined(
        "efficient-long-mask",
        "sdpa-efficient",
        "pytorch#162588",
        "wrong results with masks of 2**31 elements and more",
        _efficient_long_mask,
    ),
    Quarantined(
        "mps-causal-or-strided",
        "sdpa-math",
        "pytorch#195910, pytorch#181133",
        "causal leak and wrong results on views on MPS",
        _mps_long_or_strided,
    ),
)


def quarantined(backend: str) -> tuple[Quarantined, ...]:
    return tuple(entry for entry in QUARANTINE if entry.backend == backend)
