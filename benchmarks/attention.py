"""Times every backend that takes each case, side by side in one run, and appends a row each to a JSON-lines file.

    python benchmarks/attention.py --out benchmarks/results/attention.jsonl [--only dense,short,host]

Medians of CUDA-event times over rotating inputs. In each case the backends take turns, so that a clock that drifts
drifts for all. `torch` is F.scaled_dot_product_attention with its own choice; `auto` is headway's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

import headway
from headway import Causal, Documents, Mask, Padding
from headway.backends.registry import BACKENDS
from headway.masks import Frame

WARMUPS, ROUNDS, PER_ROUND, COPIES = 3, 4, 6, 3
HEAD_START = 20_000_000
"""Cycles, some 10 ms."""
SLOW = ("reference", "sdpa-math")
"""Backends that write all scores out; they are left out where those would not fit."""


@dataclass(frozen=True)
class Case:
    """One shape to time."""

    group: str
    mask: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str = "bfloat16"

    def make_mask(self) -> Mask | None:
        if self.mask == "none":
            return None
        if self.mask == "causal":
            return Causal()
        if self.mask == "padding":
            lengths = torch.linspace(self.kv_len // 2, self.kv_len, self.batch).long()
            return Padding(lengths)
        documents = Documents(document_lengths(self.q_len), kv_lengths=None)
        return documents if self.mask == "documents" else Causal() & documents

    def pairs(self) -> float:
        """Scores that a kernel has to compute, per head."""
        all_pairs = float(self.batch * self.q_len * self.kv_len)
        if "documents" in self.mask:
            all_pairs = float(self.batch * sum(n * n for n in document_lengths(self.q_len)))
        return all_pairs / 2 if "causal" in self.mask else all_pairs


def document_lengths(total: int) -> list[int]:
    """37 documents of 64 to 960 tokens in all `total`, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 961, (37,), generator=generator).double()
    lengths = (lengths * total / lengths.sum()).round().long()
    lengths[0] += total - lengths.sum()
    return [int(n) for n in lengths]


def cases(only: set[str]) -> Iterator[Case]:
    for length, head_dim in ((512, 128), (2048, 128), (8192, 128), (16384, 128), (2048, 64), (8192, 64)):
        for mask in ("causal", "none"):
            yield Case("dense", mask, 16384 // length, 2048 // head_dim, 2048 // head_dim, length, length, head_dim)
    for length in (64, 192):
        for head_dim in (128, 64):
            for mask in ("causal", "none"):
                yield Case("short", mask, 16384 // length, 2048 // head_dim, 2048 // head_dim, length, length, head_dim)
    for head_dim in (128, 64):
        for mask in ("documents", "causal & documents"):
            heads = 2048 // head_dim
            yield Case("packed", mask, 1, heads, heads, 16384, 16384, head_dim)
    for length in (512, 4096):
        yield Case("padded", "padding", 16384 // length, 16, 16, length, length, 128)
    for kv_len in (512, 4096):
        for batch in (1, 16):
            yield Case("decode", "none", batch, 24, 8, 1, kv_len, 128)
    for length in (512, 4096):
        yield Case("gqa", "causal", 16384 // length, 24, 8, length, length, 128)
    yield Case("float32", "causal", 8, 16, 16, 2048, 2048, 64, "float32")
    yield Case("float32", "none", 8, 16, 16, 2048, 2048, 64, "float32")


Run = Callable[[int], None]


def ways(case: Case, grad: bool) -> dict[str, Run]:
    """What to time, by name; backends that refuse the case are absent."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    shapes = (
        (case.batch, case.heads, case.q_len, case.head_dim),
        (case.batch, case.kv_heads, case.kv_len, case.head_dim),
        (case.batch, case.kv_heads, case.kv_len, case.head_dim),
    )
    inputs = [[torch.randn(s, device="cuda", dtype=dtype, requires_grad=grad) for s in shapes] for _ in range(COPIES)]
    upstream = torch.randn(shapes[0], device="cuda", dtype=dtype)
    mask = case.make_mask()

    def timed(attend: Callable[..., Any]) -> Run:
        def run(turn: int) -> None:
            q, k, v = inputs[turn % COPIES]
            if grad:
                for x in (q, k, v):
                    x.grad = None
                attend(q, k, v).backward(upstream)
            else:
                attend(q, k, v)

        return run

    found: dict[str, Run] = {}
    if case.mask in ("none", "causal"):
        found["torch"] = timed(
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=case.mask == "causal", enable_gqa=case.heads != case.kv_heads
            )
        )
    elif case.mask == "padding":
        dense = mask.to_bool(Frame(case.q_len, case.kv_len, case.batch, case.heads, upstream.device))  # type: ignore[union-attr]
        found["torch"] = timed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense))
    q, k, v = inputs[0]
    names = ["auto", *dict.fromkeys(one.name for one in BACKENDS if one.exact)]
    for name in names:
        if name in SLOW and case.batch * case.heads * case.q_len * case.kv_len > 2**29:
            continue
        try:
            headway.explain(q, k, v, mask, backend=name).backend()
        except headway.NoBackendError:
            continue
        found[name] = timed(lambda q, k, v, name=name: headway.attention(q, k, v, mask, backend=name))
    return found


def measure(found: dict[str, Run]) -> dict[str, tuple[list[float], float, str]]:
    """Milliseconds, peak MiB and error by name; all take turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    peaks, errors = dict.fromkeys(found, 0.0), dict.fromkeys(found, "")
    for name, run in found.items():
        try:
            for turn in range(WARMUPS):
                run(turn)
            torch.cuda.synchronize()
        except (RuntimeError, headway.HeadwayError) as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for _ in range(ROUNDS):
        for name, run in found.items():
            if errors[name]:
                continue
            torch.cuda.reset_peak_memory_stats()
            # The device waits until the host is ahead of it: what is timed is the kernels. Host time has its own rows.
            torch.cuda._sleep(HEAD_START)
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(PER_ROUND)
            ]
            for turn, (start, end) in enumerate(events):
                start.record()
                run(turn)
                end.record()
            torch.cuda.synchronize()
            times[name] += [start.elapsed_time(end) for start, end in events]
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    return {name: (times[name], peaks[name], errors[name]) for name in found}


def rows(case: Case, grad: bool, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    work = 4 * case.pairs() * case.heads * case.head_dim * (3.5 if grad else 1)
    for name, (ms, peak, error) in measure(ways(case, grad)).items():
        row = {**case.__dict__, "pass": "forward+backward" if grad else "forward", "backend": name, **common}
        if error:
            yield {**row, "error": error}
            continue
        low, middle, high = (statistics.quantiles(ms, n=10)[i] for i in (1, 4, 7))
        yield {
            **row,
            "ms_p20": round(low, 5), "ms_p50": round(middle, 5), "ms_p80": round(high, 5),
            "tflops": round(work / middle / 1e9, 1), "peak_mib": round(peak, 1),
        }  # fmt: skip


def host_rows(common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Microseconds of host time a call, with a kernel so small that the host is all there is."""
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    causal = Causal()
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "auto": lambda: headway.attention(q, k, v),
        "auto causal": lambda: headway.attention(q, k, v, causal),
    }
    for grad in (False, True):
        for x in (q, k, v):
            x.requires_grad_(grad)
        by_name = {
            name: partial(headway.attention, q, k, v, backend=name)
            for name in headway.explain(q, k, v).accepted
            if name not in (*SLOW, "flex")
        }
        for name, us in _host_times(ways | by_name).items():
            yield {"group": "host", "backend": name, "grad": grad, "host_us": round(us, 2), **common}
    # Programs of few and of many calls: their difference is what calls take, the rest what a program takes once.
    few, many = 8, 40

    def chain(attend: Callable[[Any], Any], calls: int) -> Callable[[Any], Any]:
        def run(q: Any) -> Any:
            for _ in range(calls):
                q = attend(q)
            return q

        return torch.compile(run, fullgraph=True)

    q.requires_grad_(False)
    attends: dict[str, Callable[[Any], Any]] = {
        "torch": lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "auto": lambda q: headway.attention(q, q, q, causal),
    }
    times = _host_times(
        {(name, n): partial(chain(attend, n), q) for name, attend in attends.items() for n in (few, many)}
    )
    for name in attends:
        a_call = (times[name, many] - times[name, few]) / (many - few)
        for what, us in (("compiled call", a_call), ("compiled program, once", times[name, few] - few * a_call)):
            yield {"group": "host", "backend": f"{name} {what}", "grad": False, "host_us": round(us, 2), **common}


Name = TypeVar("Name")


def _host_times(ways: dict[Name, Callable[[], Any]]) -> dict[Name, float]:
    """The least microseconds of host time a call: many short turns, as a host is seldom quiet for long."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(60):
        for name, call in ways.items():
            for _ in range(50 if turn == 0 else 5):
                call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / 100 * 1e6)
            torch.cuda.synchronize()
    return best


def block_rows(common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Milliseconds to build a flex BlockMask at 16,384 x 16,384, from structure and by torch's evaluation."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = 16384
    frame = Frame(length, length, 1, 1, torch.device("cuda"))
    masks: dict[str, Mask] = {
        "causal": Causal(),
        "window": headway.Window(1024, 0),
        "documents": Documents(document_lengths(length)),
        "causal & documents": Causal() & Documents(document_lengths(length)),
        "padding": Padding(torch.tensor([12000], device="cuda")),
        "prefix": Causal() | headway.Prefix(1000),
    }
    for name, mask in masks.items():
        ways = {
            "headway": partial(mask.to_block_mask, frame),
            "create_block_mask": partial(create_block_mask, mask.rule(frame), 1, 1, length, length, device="cuda"),
        }
        for way, build in ways.items():
            for _ in range(5):
                build()
            times = []
            for _ in range(30):
                torch.cuda.synchronize()
                start = time.perf_counter()
                build()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e3)
            yield {
                "group": "blocks",
                "mask": name,
                "backend": way,
                "ms_p50": round(statistics.median(times), 4),
                **common,
            }


def about() -> dict[str, Any]:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "torch": str(torch.__version__),
            "cudnn": torch.backends.cudnn.version(),
            "headway": headway.__version__,
        },
        "commit": done.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="dense,short,packed,padded,decode,gqa,float32,host,blocks")
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    options = parser.parse_args()
    only = set(options.only.split(","))
    common = about() | ({"commit": options.commit} if options.commit else {})
    with options.out.open("a") as file:

        def keep(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            words = [
                str(row.get(name, "")) for name in ("group", "mask", "q_len", "kv_len", "head_dim", "pass", "backend")
            ]
            shown = row.get("ms_p50", row.get("host_us", row.get("error")))
            print(*words, shown, row.get("tflops", ""), flush=True)

        if "host" in only:
            for row in host_rows(common):
                keep(row)
        if "blocks" in only:
            for row in block_rows(common):
                keep(row)
        for case in cases(only):
            if case.group in only:
                for grad in (False, True) if case.group != "decode" else (False,):
                    for row in rows(case, grad, common):
                        keep(row)


if __name__ == "__main__":
    main()
