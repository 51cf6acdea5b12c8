"""Times whole training steps of the protein model: packed documents beside padded rows and one sequence at a time.

    python benchmarks/proteins.py --data FOLDER --out benchmarks/results/proteins.jsonl [--presets seed-24m,...]

FOLDER is made by `headway proteins prepare`. A step is noise, forward, backward, clipping, AdamW and the moving
average of weights, on 16,384 tokens unless told: 32 rows of 512 for what pads. Residues a second are real ones alone;
MFU is over the device's dense bfloat16 peak, counted twice: `mfu` is of the multiplications that those residues need,
where a weight that only a sequence meets counts once for it; `mfu_usual` is of 6 for each weight and residue, and 12
for each block, its width and the residues attended to (Chowdhery et al. 2022). `matmul_tflops` is what 8192³ reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import about
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.data.packing import BOUNDARIES, Batch, Batches, pack, shuffled
from headway_apps.proteins.data.shards import Part, Prepared
from headway_apps.proteins.diffusion.curriculum import Steady
from headway_apps.proteins.diffusion.graphs import Absorbing
from headway_apps.proteins.diffusion.schedules import LogLinear
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.model.packed import Packed
from headway_apps.proteins.model.presets import PRESETS, preset
from headway_apps.proteins.train.objective import Noised, Objective
from headway_apps.proteins.train.replay import Replay
from headway_apps.training.average import Average

LENGTH = 512
PEAK = {"NVIDIA H200": 989e12}
"""Dense bfloat16 operations a second."""


@dataclasses.dataclass(frozen=True, eq=False)
class OneByOne(Packed):
    """Attention of one sequence after the other, as the protein model for V100 computed it."""

    counts: tuple[int, ...] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(self.counts, 2) for x in (q, k, v)), strict=True)
        # Not by cuDNN, which makes a plan for each length that it meets: minutes in which no batch is like another.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.cat([F.scaled_dot_product_attention(*each) for each in parts], 2)


def packed(model: DiT, noised: Noised, batch: Batch, host: Batch) -> Tensor:
    scores: Tensor = model(noised.tokens, noised.level, model.pack(host.tokens, host.lengths))
    return scores


def one_by_one(model: DiT, noised: Noised, batch: Batch, host: Batch) -> Tensor:
    there = model.pack(host.tokens, host.lengths)
    fields = {each.name: getattr(there, each.name) for each in dataclasses.fields(there)}
    counts = tuple(host.lengths.tolist())
    scores: Tensor = model(noised.tokens, noised.level, OneByOne(**fields, counts=counts))
    return scores


def padded(model: DiT, noised: Noised, batch: Batch, host: Batch) -> Tensor:
    """Rows filled up to one length, attention over all of them, filler too."""
    rows = noised.tokens.new_full((host.lengths.numel(), LENGTH), ESM.pad)
    rows[batch.document, batch.positions] = noised.tokens
    scores: Tensor = model(rows, noised.level)
    return scores[batch.document, batch.positions]


WAYS: dict[str, Callable[[DiT, Noised, Batch, Batch], Tensor]] = {
    "packed": packed, "padded": padded, "one by one": one_by_one
}  # fmt: skip
"""How scores come about. With ', compiled' what stands between calls of attention is; with ', replayed' passes are."""
COMPARED = ("packed", "packed, compiled", "packed, replayed", "packed, compiled, replayed", "padded",
            "padded, compiled", "one by one")  # fmt: skip


def batches(part: Part, way: str, tokens: int) -> Iterator[Batch]:
    if not way.startswith("padded"):
        yield from Batches(part, ESM, tokens)
    rows = tokens // LENGTH
    for epoch in range(1000):
        order = shuffled(len(part), 0, epoch)
        for first in range(0, len(order) - rows, rows):
            places = order[first : first + rows]
            yield pack([part.letters_of(int(at)) for at in places], places, ESM)


def operations(config: DiTConfig, batch: Batch) -> float:
    """Forward and backward: two and four for each weight that a token meets, and attention's products."""
    d, c = config.width, config.cond
    lengths = batch.lengths.double()
    weights = config.blocks * (4 + 2 * config.mlp_ratio) * d * d + d * config.scored
    told = config.blocks * 6 * c * d
    return 6 * (weights * float(lengths.sum()) + told * len(lengths) + attention(config, batch))


def usual(config: DiTConfig, parameters: int, batch: Batch) -> float:
    return 6 * (parameters * batch.residues + attention(config, batch))


def attention(config: DiTConfig, batch: Batch) -> float:
    lengths = batch.lengths.double()
    return 2 * config.blocks * config.width * float((lengths * lengths).sum())


def ceiling(device: torch.device, size: int = 8192) -> float | None:
    """Operations a second of one product of matrices, the median of 20."""
    if device.type != "cuda":
        return None
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    took: list[float] = []
    for _ in range(23):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        one @ other
        ended.record()
        ended.synchronize()
        took.append(begun.elapsed_time(ended) / 1e3)
    return float(2 * size**3 / statistics.median(took[3:]))


def timed(name: str, way: str, part: Part, device: torch.device, steps: int, tokens: int) -> dict[str, Any]:
    config = preset(name, embedded=ESM.size, scored=ESM.size, mask=ESM.mask)
    torch.manual_seed(0)
    model = DiT(config).to(device).train()
    first, *more = way.split(", ")
    scores = WAYS[first]
    if "compiled" in more:
        model.compile_parts(one_shape="replayed" in more)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=device.type == "cuda")
    average = Average(model, 0.9999)
    graph = Absorbing(ESM.size, mask=ESM.mask, ids=ESM.residues)
    objective = Objective(graph, LogLinear(), Steady(), "cross-entropy", 0)
    stream = batches(part, way, tokens)
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    lengths = part.lengths() + BOUNDARIES
    replay = None
    if "replayed" in more:
        replay = Replay(
            model, objective, autocast, tokens=tokens, longest=int(lengths.max()), mean=float(lengths.mean())
        )

    def step(number: int) -> Batch:
        host = next(stream)
        if device.type == "cuda":
            host = host.pin_memory()
        batch = host.to(device, non_blocking=True)
        noised = objective.noised(batch, number, number)
        if replay is None:
            with autocast():
                nats = objective.cost(scores(model, noised, batch, host), noised)
            (nats / host.residues).backward()
        else:
            replay.backward(noised, host.lengths, torch.full((), 1 / host.residues, device=device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad() if replay is None else replay.gradients.zero()
        average.update(model)
        return host

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for number in range(8):
        step(number)
    wait(device)
    warm = time.perf_counter() - begun
    begun = time.perf_counter()
    done = [step(8 + number) for number in range(steps)]
    asked = time.perf_counter() - begun
    wait(device)
    seconds = time.perf_counter() - begun
    residues, work = sum(each.residues for each in done), sum(operations(config, each) for each in done)
    counted = sum(usual(config, PRESETS[name].parameters, each) for each in done)
    peak = PEAK.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "group": "proteins", "preset": name, "tokens": tokens, "parameters": PRESETS[name].parameters, "way": way,
        "ms_a_step": round(seconds / steps * 1e3, 2), "host_ms_a_step": round(asked / steps * 1e3, 2),
        "residues_per_second": round(residues / seconds), "residues_a_step": round(residues / steps),
        "mfu": None if peak is None else round(work / seconds / peak, 4),
        "mfu_usual": None if peak is None else round(counted / seconds / peak, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "warm_seconds": round(warm, 1), "steps": steps,
    }  # fmt: skip


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", default="seed-24m,seed-66m,seed-316m")
    parser.add_argument("--ways", default=";".join(COMPARED))
    parser.add_argument("--tokens", type=int, default=16_384, help="in a batch; rows of 512 for what pads")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    options = parser.parse_args()
    part = Prepared(options.data)["train"]
    reached = ceiling(torch.device(options.device))
    common: dict[str, Any] = {"matmul_tflops": None if reached is None else round(reached / 1e12)}
    common |= about() | ({"commit": options.commit} if options.commit else {}) | {"data": part.fingerprint[:12]}
    with options.out.open("a") as file:
        for name in options.presets.split(","):
            for way in options.ways.split(";"):
                row = timed(name, way, part, torch.device(options.device), options.steps, options.tokens) | common
                file.write(json.dumps(row) + "\n")
                file.flush()
                shown = ("preset", "way", "ms_a_step", "host_ms_a_step", "residues_per_second", "mfu", "mfu_usual",
                         "peak_gib")  # fmt: skip
                print(*(row[key] for key in shown), flush=True)
                torch.compiler.reset()


if __name__ == "__main__":
    main()
