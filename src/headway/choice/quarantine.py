"""Kernels known to be wrong: each entry says where and when it strikes, and a probe can acquit a machine of it.

What was looked into and cannot strike a call of Headway's is in NOT_OURS, so that nobody looks twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from headway.limits.limit import ANOTHER, Refusal, pad_heads, within
from headway.limits.machine import Machine, release
from headway.limits.request import Request

PYTORCH = "https://github.com/pytorch/pytorch"

DOCTOR = "run `headway doctor --acquit` to look for the defect here"


@dataclasses.dataclass(frozen=True)
class Versions:
    """A range of versions of one piece of software: torch, cudnn or a kernel package."""

    of: str
    at_least: str | None = None
    below: str | None = None

    def include(self, machine: Machine) -> bool:
        """Whether the machine's version lies in the range; one that is not known counts as if it did."""
        version = machine.version(self.of)
        if version is None:
            return True
        found = release(version)
        return (self.at_least is None or release(self.at_least) <= found) and (
            self.below is None or found < release(self.below)
        )

    def __str__(self) -> str:
        bounds = [f"from {self.at_least}"] if self.at_least else []
        bounds += [f"before {self.below}"] if self.below else []
        return " ".join([self.of, *bounds])


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """One known defect. A function of the same name in headway.choice.probes looks for it."""

    name: str
    backends: tuple[str, ...]
    thread: str
    defect: str
    strikes: Callable[[Request], bool]
    """Lengths and batch of the request may be those of its class; see Request.rounded."""
    device: str = "cuda"
    capability: tuple[tuple[int, int], tuple[int, int] | None] | None = None
    """NVIDIA GPUs that have it, from the first up to before the second; None for all."""
    versions: tuple[Versions, ...] = ()
    remedy: Callable[[Request], str] | None = None
    """A change of the call that leads around it, where there is one."""

    def on(self, machine: Machine) -> bool:
        """Whether this machine is one of those known to have the defect."""
        if machine.device != self.device:
            return False
        if self.capability is not None and not within(machine.capability or (0, 0), *self.capability):
            return False
        return all(range_.include(machine) for range_ in self.versions)

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if self.name not in machine.acquitted and self.on(machine) and self.strikes(request):
            got = f"a call that may meet {self.defect} ({self.thread})"
            remedy = self.remedy(request) if self.remedy else ANOTHER
            yield Refusal(got, f"calls outside the quarantine {self.name}", f"{remedy}, or {DOCTOR}")


def quarantined(backend: str) -> tuple[Quarantined, ...]:
    return tuple(entry for entry in QUARANTINE if backend in entry.backends)


# -- which requests each defect strikes -----------------------------------------------------------------------------


def _has_dense_mask(request: Request) -> bool:
    """True if cuDNN and the memory-efficient kernel get a mask as a tensor; causal alone is a flag to them."""
    return bool(request.mask - {"causal", "causal-upper-left"})


def _half_tile(request: Request) -> bool:
    lengths = (request.q_len, request.kv_len)
    return request.needs_grad and _has_dense_mask(request) and any(n % 128 == 64 for n in lengths)


def _few_kv_heads(request: Request) -> bool:
    return request.kv_heads < 8


def _more_kv_heads(request: Request) -> str:
    ratio = request.heads // max(request.kv_heads, 1)
    times = next((n for n in range(2, ratio + 1) if request.kv_heads * n >= 8 and ratio % n == 0), None)
    return f"repeat k and v: k.repeat_interleave({times}, dim=1)" if times else ANOTHER


def _one_query(request: Request) -> bool:
    return request.needs_grad and request.q_len == 1


def _dropout(request: Request) -> bool:
    return request.dropout


def _any(request: Request) -> bool:
    return True


def _long_mask(request: Request) -> bool:
    # The kernel counts rows times their stride in 32 bits; the stride is the number of keys, padded to 16.
    return _has_dense_mask(request) and request.q_len * _padded_to_16(request.kv_len) > 1 << 32


def _padded_to_16(length: int) -> int:
    return -(-length // 16) * 16


def _split_queries(request: Request) -> str:
    parts = -(-request.q_len * _padded_to_16(request.kv_len) // (1 << 32))
    return f"split the queries in {parts}, each with its rows of the mask"


def _long_gradient(request: Request) -> bool:
    rows = request.batch * request.heads * -(-request.q_len // 128) * 128
    return request.needs_grad and rows * max(request.head_dim, 32) > 1 << 31


def _odd_heads(request: Request) -> bool:
    return request.needs_grad and request.head_dim % 16 != 0


def _documents_without_keys(request: Request) -> bool:
    return request.needs_grad and request.rows_may_be_empty and "documents-cross" in request.mask


def _heads_of_32(request: Request) -> bool:
    return request.needs_grad and request.head_dim % 32 != 0


def _pad_heads_to_32(request: Request) -> str:
    wanted = -(-request.head_dim // 32) * 32
    return pad_heads(request, (wanted, wanted))


def _scores(request: Request) -> int:
    return request.batch * request.heads * request.q_len * request.kv_len


def _large_scores(request: Request) -> bool:
    return _scores(request) > 1 << 32


def _split_scores(request: Request) -> str:
    return f"split the queries in {-(-_scores(request) // (1 << 32))}, each with its rows of the mask"


QUARANTINE: tuple[Quarantined, ...] = (
    Quarantined(
        "cudnn-backward-half-tile",
        ("sdpa-cudnn",),
        f"{PYTORCH}/issues/196678",
        "NaN in the gradient of q, with a mask at lengths of 64 modulo 128",
        _half_tile,
        # No upper bound: the fix announced for cuDNN 9.26 was still missed by a test on a later one.
        capability=((9, 0), (10, 0)),
    ),
    Quarantined(
        "cudnn-backward-one-query",
        ("sdpa-cudnn",),
        "https://github.com/NVIDIA/cudnn-frontend/issues/1072",
        "NaN in the gradients of k and v, with one query",
        _one_query,
        capability=((9, 0), (10, 0)),
        versions=(Versions("cudnn", at_least="9.25"),),
    ),
    Quarantined(
        "cudnn-ragged-lengths",
        ("sdpa-cudnn",),
        f"{PYTORCH}/issues/169849",
        "reads beyond its inputs at lengths that are no multiple of 128",
        # Every call: a request's class does not tell 127 from 128.
        _any,
        versions=(Versions("cudnn", below="9.15.1"),),
    ),
    Quarantined(
        "cudnn-dropout",
        ("sdpa-cudnn",),
        # The thread tells of the rounding; that rows share their draws, 4 by 4, was seen on an H200 with cuDNN 9.19.
        f"{PYTORCH}/pull/174245",
        "a share of dropout rounded to sixteenths, and draws that repeat in other rows",
        _dropout,
    ),
    Quarantined(
        "cudnn-few-kv-heads",
        ("sdpa-cudnn",),
        f"{PYTORCH}/issues/193893",
        "wrong results with fewer than 8 key heads",
        _few_kv_heads,
        capability=((10, 0), (11, 0)),
        remedy=_more_kv_heads,
    ),
    Quarantined(
        "efficient-long-mask",
        ("sdpa-efficient",),
        f"{PYTORCH}/issues/162588",
        "wrong rows, with a mask of more than 2**32 elements per head",
        _long_mask,
        remedy=_split_queries,
    ),
    Quarantined(
        "flash-long-gradient",
        ("sdpa-flash",),
        "https://github.com/PriorLabs/TabPFN/pull/1184",
        "a crash in the backward pass, with more than 2**31 elements in q",
        _long_gradient,
    ),
    Quarantined(
        "flash4-hopper-odd-heads",
        ("flash4",),
        "https://github.com/Dao-AILab/flash-attention/pull/2896",
        "a wrong gradient of q, with head_dim no multiple of 16",
        _odd_heads,
        capability=((9, 0), (10, 0)),
        remedy=_pad_heads_to_32,
    ),
    Quarantined(
        "flash4-documents-without-keys",
        ("flash4",),
        # The thread mends the same for whole calls; of packed documents it was seen on an H200 with 4.0.0b36.
        "https://github.com/Dao-AILab/flash-attention/pull/2776",
        "a wrong gradient of q, with documents that have queries and no keys",
        _documents_without_keys,
    ),
    Quarantined(
        "flash4-blackwell-odd-heads",
        ("flash4",),
        "https://github.com/Dao-AILab/flash-attention/pull/2698",
        "wrong gradients of k and v, with head_dim no multiple of 32",
        _heads_of_32,
        capability=((10, 0), (11, 0)),
        versions=(Versions("flash-attn-4", below="4.0.0b36"),),
        remedy=_pad_heads_to_32,
    ),
    Quarantined(
        "mps-large-scores",
        ("sdpa-math", "reference"),
        f"{PYTORCH}/issues/197636",
        "wrong results of bmm with more than 2**32 scores",
        _large_scores,
        device="mps",
        remedy=_split_scores,
    ),
)

NOT_OURS: tuple[tuple[str, str], ...] = (
    (
        ", ".join(f"{PYTORCH}/issues/{n}" for n in (195910, 181133, 174861, 163597)),
        "wrong results of the fused kernels for MPS; sdpa-math calls the operator made of matmuls and a softmax",
    ),
    (
        f"{PYTORCH}/pull/179760",
        "NaN of split-KV varlen attention with a paged cache; torch-varlen never passes a block table",
    ),
    (
        f"{PYTORCH}/pull/197771",
        "CK's memory-efficient backward on ROCm ignores determinism; sdpa-efficient takes cuda only",
    ),
    (
        f"{PYTORCH}/issues/112577",
        "strided inputs with a mask in torch 2.1; Headway needs 2.6, and pads and copies masks for that kernel",
    ),
    (
        "https://github.com/Dao-AILab/flash-attention/issues/2552",
        "wrong gradient of v where values have another head size; flash4 refuses those",
    ),
    (
        "https://github.com/Dao-AILab/flash-attention/issues/2623",
        "wrong gradients of block-sparse calls; flash4 is never given block-sparse tensors",
    ),
)
"""Threads about wrong attention kernels that no call of Headway's can meet, and why."""
