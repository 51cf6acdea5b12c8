"""Looks for quarantined defects on this machine, a function each: `python -m headway.choice.probes NAME cuda:0`.

Each runs the repro of its thread, or what comes nearest, on the very kernel that Headway calls, and answers with the
place where it went wrong, or None. Meant for a child process, as some of these defects take the process down.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from headway.backends import reference
from headway.backends.kernel import Extras, Kernel
from headway.backends.registry import named
from headway.backends.trial import in_a_line
from headway.masks import Causal, Dense, Documents, Frame, Mask

PROBES: dict[str, Callable[[str], str | None]] = {}
"""By the name of the quarantined defect."""

ALLOWED = 4.0
"""How much more than plain attention in the same dtype a kernel may err."""


Probe = TypeVar("Probe", bound=Callable[..., "str | None"])


def probe(name: str) -> Callable[[Probe], Probe]:
    def add(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return add


# -- one call, judged -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call to try."""

    heads: int = 2
    kv_heads: int | None = None
    q_len: int = 128
    kv_len: int = 128
    head_dim: int = 64
    batch: int = 1
    mask: str = "none"
    logits: float = 0.0
    """What every score is near: far below 0 is where sums of exponentials overflow. Then only NaN and inf are wrong."""
    learns: bool = True

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the result, laid out as a model's projections leave them."""
        random = torch.Generator().manual_seed(0)

        def draw(heads: int, length: int) -> Tensor:
            made = torch.randn(self.batch, length, heads, self.head_dim, generator=random)
            return made.to(device, torch.bfloat16).transpose(1, 2)

        q, k, v, toward = (
            draw(heads, length)
            for heads, length in (
                (self.heads, self.q_len),
                (self.kv_heads or self.heads, self.kv_len),
                (self.kv_heads or self.heads, self.kv_len),
                (self.heads, self.q_len),
            )
        )
        if self.logits:
            q, k = q * 0.1, k * 0.1
            q[..., 0], k[..., 0] = 1.0, self.logits * math.sqrt(self.head_dim)
        return q, k, v, toward

    def made_mask(self, device: str) -> Mask | None:
        if self.mask == "none":
            return None
        if self.mask == "documents":
            return Documents([self.q_len // 3, self.q_len - self.q_len // 3])
        causal = Causal(align="lower-right")
        return causal if self.mask == "causal" else Dense(causal.to_bool(self.frame(device)))

    def frame(self, device: str) -> Frame:
        return Frame(self.q_len, self.kv_len, self.batch, self.heads, torch.device(device))


def wrong(backend: str, device: str, calls: Iterable[Call]) -> str | None:
    """The first call that the backend answers wrongly, or None."""
    kernel = load(backend, device)
    for call in calls:
        got = run(kernel, call, device, torch.bfloat16)
        plain = run(reference, call, device, torch.bfloat16)
        truth = run(reference, call, device, torch.float64)
        for what, one, other, right in zip(("result", "dq", "dk", "dv"), got, plain, truth, strict=False):
            error = _error(one, right)
            # Far from 0 gradients are what is left of large numbers that cancel, and half precision leaves little.
            allowed = math.inf if call.logits else ALLOWED * _error(other, right) + 1e-3 * right.abs().max().item()
            if not (math.isfinite(error) and error <= allowed):
                return f"{backend} errs by {error:.3g} in the {what} of {call}"
    return None


def load(backend: str, device: str) -> Kernel:
    return named(backend, torch.device(device).type).load()


def run(kernel: Kernel, call: Call, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    *inputs, toward = (x.to(dtype) for x in call.tensors(device))
    q, k, v = (x.detach().requires_grad_(call.learns) for x in inputs)
    extras = Extras(needs_grad=call.learns)
    lowered = kernel.lower(call.made_mask(device), call.frame(device), dtype)
    out = kernel.attend(q, k, v, lowered, extras)[0]
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), toward)) if call.learns else (out,)


def _error(got: Tensor, right: Tensor) -> float:
    return (got.double() - right).abs().max().item()  # NaN, where there is one, is no number at most any other


# -- the defects ------------------------------------------------------------------------------------------------------


@probe("cudnn-backward-half-tile")
def cudnn_backward_half_tile(device: str) -> str | None:
    lengths = ((64, 64), (192, 192), (704, 704), (128, 192), (192, 128))
    calls = (
        Call(q_len=q_len, kv_len=kv_len, head_dim=head_dim, mask="dense", logits=-120.0)
        for q_len, kv_len in lengths
        for head_dim in (64, 128)
    )
    return wrong("sdpa-cudnn", device, calls)


@probe("cudnn-backward-one-query")
def cudnn_backward_one_query(device: str) -> str | None:
    calls = (
        Call(q_len=1, kv_len=kv_len, mask=mask, logits=-120.0)
        for kv_len in (64, 97, 128, 192, 256)
        for mask in ("none", "dense")
    )
    return wrong("sdpa-cudnn", device, calls)


@probe("cudnn-ragged-lengths")
def cudnn_ragged_lengths(device: str) -> str | None:
    lengths = (5, 77, 127, 129, 261, 500)
    calls = (Call(heads=24, q_len=n, kv_len=n, mask=mask) for n in lengths for mask in ("none", "dense"))
    return wrong("sdpa-cudnn", device, calls)


@probe("cudnn-dropout")
def cudnn_dropout(device: str, shares: Iterable[float] = (0.03, 0.1, 0.3)) -> str | None:
    """With equal scores and the identity as values the result is the weights, and a 0 is one dropped."""
    size, heads, spreads = 64, 64, 5.0
    kernel, frame = load("sdpa-cudnn", device), Frame(size, size, 1, heads, torch.device(device))
    scores = torch.zeros(1, heads, size, size, device=device, dtype=torch.bfloat16)
    identity = torch.eye(size, device=device, dtype=torch.bfloat16).expand_as(scores).contiguous()
    for share in shares:
        weights, _ = kernel.attend(
            scores, scores, identity, kernel.lower(None, frame, scores.dtype), Extras(dropout=share)
        )
        dropped = (weights == 0).reshape(-1, size)
        found = dropped.double().mean().item()
        if abs(found - share) > spreads * math.sqrt(share * (1 - share) / dropped.numel()):
            return f"sdpa-cudnn drops a share of {found:.4f} for {share}"
    distinct = torch.unique(dropped, dim=0).shape[0]
    if distinct < 0.99 * dropped.shape[0]:
        return f"sdpa-cudnn drops in {dropped.shape[0]} rows in {distinct} ways"
    return None


@probe("cudnn-few-kv-heads")
def cudnn_few_kv_heads(device: str) -> str | None:
    heads = ((28, 4), (12, 2), (8, 1), (4, 4))
    lengths = ((1, 33), (1, 129), (1, 300), (1, 1000), (1, 2048), (64, 64), (300, 300))
    calls = (
        Call(heads=h, kv_heads=g, q_len=q_len, kv_len=kv_len, head_dim=128, batch=batch, mask=mask, learns=False)
        for h, g in heads
        for q_len, kv_len in lengths
        for batch in (1, 64)
        for mask in ("none", "dense")
    )
    return wrong("sdpa-cudnn", device, calls)


@probe("efficient-long-mask")
def efficient_long_mask(device: str, length: int = 66_000) -> str | None:
    """Only the last rows are judged: those are where the offsets overflow, and all scores would not fit."""
    call = Call(heads=1, q_len=length, kv_len=length, mask="dense", learns=False)
    out = run(load("sdpa-efficient", device), call, device, torch.bfloat16)[0]
    tail = dataclasses.replace(call, q_len=64)
    q, k, v, _ = (x.double() for x in call.tensors(device))
    extras = Extras()
    lowered = reference.lower(tail.made_mask(device), tail.frame(device), torch.float64)
    right = reference.attend(q[:, :, -64:], k, v, lowered, extras)[0]
    error = _error(out[:, :, -64:], right)
    return None if error <= 0.02 else f"sdpa-efficient errs by {error:.3g} in the last rows of {call}"


@probe("flash-long-gradient")
def flash_long_gradient(device: str, batch: int = 400, q_len: int = 10_496) -> str | None:
    """A batch whose q has more than 2**31 elements; its last entry is judged."""
    call = Call(batch=batch, heads=4, q_len=q_len, kv_len=128, head_dim=128)
    got = run(load("sdpa-flash", device), call, device, torch.bfloat16)
    last = dataclasses.replace(call, batch=1)
    *inputs, toward = (x[-1:].double() for x in call.tensors(device))
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    lowered = reference.lower(None, last.frame(device), torch.float64)
    out = reference.attend(q, k, v, lowered, Extras(needs_grad=True))[0]
    right = (out.detach(), *torch.autograd.grad(out, (q, k, v), toward))
    for what, one, other in zip(("result", "dq", "dk", "dv"), got, right, strict=True):
        error = _error(one[-1:], other) / other.abs().max().item()
        if not error <= 0.02:
            return f"sdpa-flash errs by {error:.3g} in the {what} of {call}"
    return None


def _odd_heads(sizes: Iterable[int]) -> Iterable[Call]:
    return (
        Call(heads=8, q_len=512, kv_len=512, head_dim=size, mask=mask)
        for size in sizes
        for mask in ("none", "causal", "documents")
    )


@probe("flash4-documents-without-keys")
def flash4_documents_without_keys(device: str) -> str | None:
    """What is wrong there is what was in memory before: numbers are left there first."""
    mask, frame = Documents([6, 6, 20, 9], [9, 0, 30, 0]), Frame(41, 39, 1, 2, torch.device(device))
    kernel = load("flash4", device)
    for head_dim in (16, 64, 128):
        q, k, v, toward = Call(q_len=41, kv_len=39, head_dim=head_dim).tensors(device)
        torch.full((1 << 20,), 3.0, device=device)
        answers = []
        for judge, dtype in ((kernel, torch.bfloat16), (reference, torch.float64)):
            asked = q.to(dtype).requires_grad_()
            out, _ = judge.attend(
                asked, k.to(dtype), v.to(dtype), judge.lower(mask, frame, dtype), Extras(needs_grad=True)
            )
            answers.append(torch.autograd.grad(out, asked, toward.to(dtype))[0])
        error = _error(*answers)
        if not error <= 0.1:
            return f"flash4 errs by {error:.3g} in the dq of {mask} with head_dim {head_dim}"
    return None


@probe("flash4-hopper-odd-heads")
def flash4_hopper_odd_heads(device: str) -> str | None:
    return wrong("flash4", device, _odd_heads((8, 24, 40, 56, 72, 88, 104, 120)))


@probe("flash4-blackwell-odd-heads")
def flash4_blackwell_odd_heads(device: str) -> str | None:
    return wrong("flash4", device, _odd_heads((8, 16, 24, 40, 48, 72, 80, 104, 112)))


@probe("mps-large-scores")
def mps_large_scores(device: str, batch: int = 65_552) -> str | None:
    """A batch whose scores are more than 2**32; its last entry is judged, by the CPU."""
    call = Call(batch=batch, heads=1, q_len=256, kv_len=256, learns=False)
    q, k, v, _ = call.tensors(device)
    extras = Extras()
    q, k, v = (x[-1:].cpu().double() for x in (q, k, v))
    right = reference.attend(q, k, v, (None, None), extras)[0]
    for backend in ("sdpa-math", "reference"):
        out = run(load(backend, device), call, device, torch.bfloat16)[0]
        error = _error(out[-1:].cpu(), right)
        if not error <= 0.02:
            return f"{backend} errs by {error:.3g} in the last entry of {call}"
    return None


if __name__ == "__main__":
    sys.exit(in_a_line(PROBES[sys.argv[1]], *sys.argv[2:]))
