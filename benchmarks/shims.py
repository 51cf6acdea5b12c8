"""Times flash_attn's packed function on the shim, beside a loop over sequences and beside each backend by name.

    python benchmarks/shims.py --out benchmarks/results/shims.jsonl [--commit abc1234]

On CPU 32 sequences of 512 tokens and 12 heads, of one length and ragged, against one sequence at a time. On CUDA the 37
documents in 16,384 tokens of benchmarks/attention.py against every backend that takes them; that the shim waits for
nothing is asserted by torch itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import Case, about, document_lengths, measure, ways
from torch import Tensor

from headway.shims.flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func

ROUNDS = 7


def starts(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


# -- CPU --------------------------------------------------------------------------------------------------------------


def one_at_a_time(qkv: Tensor, at: Tensor, fused: bool) -> Tensor:
    """A loop over sequences, as replacements of flash_attn are written: in full, or by PyTorch's fused attention."""
    parts = []
    for i in range(len(at) - 1):
        q, k, v = (x.transpose(0, 1) for x in qkv[at[i].item() : at[i + 1].item()].unbind(1))
        if fused:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        else:
            out = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def on_cpu(common: dict[str, Any], only: str | None) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ragged = torch.randint(30, 513, (32,), generator=generator).tolist()
    for lengths, what in (([512] * 32, "one length"), (ragged, "ragged")):
        if only not in (None, what):
            continue
        at, longest = starts(lengths, "cpu"), max(lengths)
        for grad in (False, True):
            qkv = torch.randn(sum(lengths), 3, 12, 64, requires_grad=grad)
            runs: dict[str, Callable[[], Tensor]] = {
                "shim": partial(flash_attn_varlen_qkvpacked_func, qkv, at, longest),
                "one at a time": partial(one_at_a_time, qkv, at, False),
                "one at a time, fused": partial(one_at_a_time, qkv, at, True),
            }
            torch.testing.assert_close(runs["shim"](), runs["one at a time"](), rtol=1e-4, atol=1e-5)
            for name, ms in _by_turns(runs, grad).items():
                yield {
                    "group": "shim", "device": "cpu", "threads": torch.get_num_threads(), "sequences": 32,
                    "tokens": sum(lengths), "longest": longest, "heads": 12, "head_dim": 64, "lengths": what,
                    "pass": "forward+backward" if grad else "forward", "backend": name,
                    "ms_p20": round(ms[1], 2), "ms_p50": round(ms[ROUNDS // 2], 2), "ms_p80": round(ms[-2], 2),
                    **common,
                }  # fmt: skip


def _by_turns(runs: dict[str, Callable[[], Tensor]], grad: bool) -> dict[str, list[float]]:
    """Sorted milliseconds by name."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(ROUNDS), runs.items()):
        start = time.perf_counter()
        out = run()
        if grad:
            out.sum().backward()
        times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(ms) for name, ms in times.items()}


# -- CUDA -------------------------------------------------------------------------------------------------------------


def on_cuda(common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lengths = document_lengths(16384)
    at, longest = starts(lengths, "cuda"), max(lengths)
    for heads, head_dim in ((16, 128), (32, 64)):
        case = Case("packed", "documents", 1, heads, heads, 16384, 16384, head_dim)
        for grad in (False, True):
            found = {name: run for name, run in ways(case, grad).items() if name != "auto"}
            found |= {name: _shim(name, heads, head_dim, at, longest, grad) for name in ("shim", "shim, qkvpacked")}
            _without_waiting(found["shim"])
            for name, (ms, _, error) in measure(found).items():
                row = {**case.__dict__, "pass": "forward+backward" if grad else "forward", "backend": name, **common}
                low, middle, high = (statistics.quantiles(ms, n=10)[i] for i in (1, 4, 7)) if ms else (0.0, 0.0, 0.0)
                times = {"ms_p20": round(low, 5), "ms_p50": round(middle, 5), "ms_p80": round(high, 5)}
                yield {**row, **({"error": error} if error else times), "group": "shim"}


def _shim(name: str, heads: int, head_dim: int, at: Tensor, longest: int, grad: bool) -> Callable[[int], None]:
    """On operands of their own, as the backends have them, or on one tensor, whose gradient is put together last."""
    tokens = int(at[-1])
    shapes = [(tokens, 3, heads, head_dim)] if "packed" in name else [(tokens, heads, head_dim)] * 3
    made = partial(torch.randn, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
    inputs = [[made(*shape) for shape in shapes] for _ in range(3)]
    upstream = torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)

    def run(turn: int) -> None:
        operands = inputs[turn % 3]
        if len(operands) == 1:
            out = flash_attn_varlen_qkvpacked_func(operands[0], at, longest)
        else:
            q, k, v = operands
            out = flash_attn_varlen_func(q, k, v, at, at, longest, longest)
        if grad:
            torch.autograd.grad(out, operands, upstream)

    return run


def _without_waiting(run: Callable[[int], None]) -> None:
    """An error for any call that makes the host wait for the device, once kernels are compiled and plans are made."""
    run(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    parser.add_argument("--lengths", choices=["one length", "ragged"], help="of sequences on CPU; both by default")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    common = about() | ({"commit": options.commit} if options.commit else {})
    with options.out.open("a") as file:
        for row in on_cuda(common) if on_gpu else on_cpu(common, options.lengths):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                *(row.get(name, "") for name in ("lengths", "head_dim", "pass", "backend", "ms_p50", "error")),
                flush=True,
            )


if __name__ == "__main__":
    main()
