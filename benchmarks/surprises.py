"""How each CUDA kernel treats the calls that surprise people, through PyTorch's own door and through headway's.

    python benchmarks/surprises.py --out benchmarks/results/surprises.jsonl --commit COMMIT

Rows that see nothing, causal masks on unequal lengths, memory of grouped heads under a dense mask, the NaN gradients
of pytorch#196678, and what waits for the device.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import headway
from headway import Bias, Causal, Dense, Documents, Mask, NoBackendError, Padding, Window
from headway.backends import sdpa_cudnn
from headway.backends.kernel import Extras
from headway.masks import Frame

Row = dict[str, Any]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
TORCH = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
HEADWAY = (*TORCH, "flex", "flash4", "auto")
DTYPE = torch.bfloat16


def through_torch(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, **options)


def doors(mask: Mask, **options: Any) -> Iterator[tuple[str, Call]]:
    """The same call by every kernel: PyTorch's with `options`, headway's with `mask`."""
    for name, backend in TORCH.items():
        yield f"torch {name}", partial(through_torch, backend, **options)
    for name in HEADWAY:
        yield f"headway {name}", partial(headway.attention, mask=mask, backend=name)


def draw(*shapes: tuple[int, int, int], factor: float = 1.0) -> list[Tensor]:
    """q, k and v of batch 2, from (heads, length, head size) each."""
    made = [torch.randn(2, *shape, device="cuda") for shape in shapes]
    return [(x * (factor if i == 0 else 1)).to(DTYPE).requires_grad_() for i, x in enumerate(made)]


def state(x: Tensor) -> str:
    return "nan" if x.isnan().any() else "inf" if x.isinf().any() else "finite"


def ran(call: Call, inputs: list[Tensor]) -> tuple[Tensor, Row]:
    out = call(*inputs)
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    return out, {"out": state(out), "gradients": [state(g) for g in gradients]}


def refusal(error: Exception) -> Row:
    return {"refused": str(error).splitlines()[0][:160]}


def empty_rows() -> Iterator[Row]:
    length, empty = 128, 3
    keep = torch.ones(2, 1, length, length, dtype=torch.bool, device="cuda")
    keep[:, :, empty] = False
    for filler in (None, float("-inf"), torch.finfo(DTYPE).min):
        bias = (
            None if filler is None else torch.zeros(keep.shape, device="cuda", dtype=DTYPE).masked_fill(~keep, filler)
        )
        mask, tensor = (Dense(keep), keep) if bias is None else (Bias(bias), bias)
        for who, call in doors(mask, attn_mask=tensor):
            row: Row = {"case": "a row that sees nothing", "mask": str(filler or "bool"), "who": who}
            try:
                out, states = ran(call, draw(*3 * [(4, length, 64)]))
                row |= {"largest_in_row": out[0, 0, empty].float().abs().max().item(), **states}
            except (RuntimeError, NoBackendError) as error:
                row |= refusal(error)
            yield row


def unequal_causal() -> Iterator[Row]:
    for (q_len, kv_len), align in itertools.product(((4, 8), (8, 4)), ("upper-left", "lower-right")):
        mask = Causal(align=align)  # type: ignore[arg-type]  # one of the two
        for who, call in doors(mask, is_causal=True):
            inputs = draw((2, q_len, 64), (2, kv_len, 64), (2, kv_len, 64))
            q, k, v = (x.detach().double() for x in inputs)
            truth = headway.attention(q, k, v, mask, backend="reference")
            row: Row = {"case": f"causal {q_len}x{kv_len}, error against {align}", "who": who}
            try:
                out, states = ran(call, inputs)
                row |= {"error": round((out.double() - truth).abs().max().item(), 4), **states}
            except (RuntimeError, NoBackendError) as error:
                row |= refusal(error)
            yield row


def grouped_heads() -> Iterator[Row]:
    length = 4096
    keep = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    for who, call in doors(Dense(keep), attn_mask=keep, enable_gqa=True):
        inputs = [x.detach() for x in draw((24, length, 64), (8, length, 64), (8, length, 64))]
        row: Row = {"case": "24:8 heads, dense mask 4096x4096: memory", "who": who}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            call(*inputs)
            row["mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        except (RuntimeError, NoBackendError) as error:
            row |= refusal(error)
        yield row


def nan_gradients() -> Iterator[Row]:
    """pytorch#196678, and headway's way into the same kernel with the quarantine left out."""
    kinds, extras = ("causal", "padding", "random"), Extras(scale=0.125, needs_grad=True)
    for length, kind, factor in itertools.product((64, 128, 192, 320, 704), kinds, (1.0, 30.0)):
        column, square = torch.arange(length, device="cuda"), torch.ones(length, length, device="cuda").bool()
        keep = {
            "causal": square.tril(),
            "padding": (column < length // 2).expand(length, length),
            "random": (torch.rand(length, length, device="cuda") > 0.5) | torch.eye(length, device="cuda").bool(),
        }[kind].expand(2, 1, length, length)
        frame = Frame(length, length, 2, 8, keep.device)
        lowered = sdpa_cudnn.lower(Dense(keep), frame, DTYPE)

        def unguarded(q: Tensor, k: Tensor, v: Tensor, lowered: Any = lowered) -> Tensor:
            return sdpa_cudnn.attend(q, k, v, lowered, extras)[0]

        calls: dict[str, Call] = {
            f"torch {name}": partial(through_torch, TORCH[name], attn_mask=keep)
            for name in ("sdpa-efficient", "sdpa-cudnn")
        }
        for who, call in (calls | {"headway sdpa-cudnn, unguarded": unguarded}).items():
            case = f"pytorch#196678: {kind} mask, length {length}, logits x{factor:g}"
            yield {"case": case, "who": who, **ran(call, draw(*3 * [(8, length, 64)], factor=factor))[1]}


def waits() -> Iterator[Row]:
    masks: dict[str, Mask | None] = {
        "none": None,
        "causal": Causal(),
        "window": Window(64, 0),
        "documents": Causal() & Documents([100, 156]),
        "padding on the device": Padding(torch.tensor([256, 100], device="cuda")),
        "padding on the host": Padding([256, 100]),
    }
    for (name, mask), backend in itertools.product(masks.items(), (*HEADWAY, "torch-varlen")):
        inputs = draw((8, 256, 64), (2, 256, 64), (2, 256, 64))
        call = partial(headway.attention, mask=mask, backend=backend)
        row: Row = {"case": "waits for the device once warm", "mask": name, "who": f"headway {backend}"}
        try:
            call(*inputs).sum().backward()
        except NoBackendError:
            continue
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(*inputs).sum().backward()
            row["waits"] = False
        except RuntimeError as error:
            row |= {"waits": True, "where": str(error).splitlines()[0][:160]}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    where = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "headway": headway.__version__,
        },
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
    }
    with options.out.open("a") as out:
        for group in (empty_rows, unequal_causal, grouped_heads, nan_gradients, waits):
            for row in group():
                out.write(json.dumps({"group": group.__name__, **row, **where}) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
