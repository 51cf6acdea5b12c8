"""Times whole models before and after a swap on this GPU, and the swap with its proof itself.

    python benchmarks/swap.py --out benchmarks/results/swap.jsonl [--cases "encoder;decoder"]

Both sides share their weights and take turns in one run. A train step is forward, backward and AdamW, in training mode.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from attention import about
from torch import Tensor, nn

import headway
from headway.report.times import twin

WARM_UP, ROUNDS = 3, 11
Loss = Callable[[Any], Tensor]


def dinov2(attention: str) -> tuple[nn.Module, Any, Any, Loss]:
    """24 layers of 1,024 and 16 heads, on 16 images of 518²: 1,370 tokens each."""
    config = transformers.Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    config._attn_implementation = attention
    model: nn.Module = transformers.Dinov2Model(config)
    model.to("cuda", torch.bfloat16)

    def images(count: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(count, 3, 518, 518, device="cuda", dtype=torch.bfloat16)}

    return model, images(1), images(16), lambda out: out.last_hidden_state.float().square().mean()


def torch_encoder() -> tuple[nn.Module, Any, Any, Loss]:
    """The same shape by torch's own layers, on padded texts: a third of all tokens is padding."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(1024, 16, 4096, 0.0, "gelu", batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            out: Tensor = self.layers(x, src_key_padding_mask=padding)
            return out.masked_fill(padding[..., None], 0.0)

    def texts(count: int, length: int) -> tuple[Tensor, Tensor]:
        lengths = torch.linspace(length // 3, length, count, device="cuda").long()
        padding = torch.arange(length, device="cuda") >= lengths[:, None]
        return torch.randn(count, length, 1024, device="cuda", dtype=torch.bfloat16), padding

    model = Encoder().to("cuda", torch.bfloat16)
    return model, texts(2, 256), texts(16, 1376), lambda out: out.float().square().mean()


def llama(attention: str, padded: bool) -> tuple[nn.Module, Any, Any, Loss]:
    """Llama-3.2-3B's shape: 28 layers of 3,072, 24 query heads to 8 key heads, on 4 texts of 2,048 tokens.

    Eager attention, whose weights fill the memory, on 2.
    """
    config = transformers.LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = attention
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)

    def texts(count: int, length: int) -> dict[str, Tensor]:
        tokens = torch.randint(128256, (count, length), device="cuda")
        inputs = {"input_ids": tokens}
        if padded:
            lengths = torch.linspace(length // 3, length, count, device="cuda").long()
            inputs["attention_mask"] = (torch.arange(length, device="cuda") >= length - lengths[:, None]).long()
        return inputs

    batch = texts(2 if attention == "eager" else 4, 2048)
    # The mean of all logits would be 4 GiB of float32; the hidden path is what attention is in.
    return model, texts(2, 256), batch, lambda out: out.logits[:, ::16].float().square().mean()


CASES: dict[str, Callable[[], tuple[nn.Module, Any, Any, Loss]]] = {
    "encoder, transformers' sdpa": lambda: dinov2("sdpa"),
    "encoder, transformers' eager": lambda: dinov2("eager"),
    "encoder, torch's own layers, padded": torch_encoder,
    "decoder, transformers' sdpa": lambda: llama("sdpa", padded=False),
    "decoder, transformers' sdpa, padded": lambda: llama("sdpa", padded=True),
    "decoder, transformers' eager": lambda: llama("eager", padded=False),
}


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def inference(model: nn.Module, batch: Any) -> Callable[[], None]:
    def step() -> None:
        model.eval()
        with torch.no_grad():
            call(model, batch)

    return step


def training(model: nn.Module, batch: Any, loss: Loss) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        model.train()
        loss(call(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: the other model's turn needs the room

    return step


def in_turns(steps: tuple[Callable[[], None], Callable[[], None]]) -> tuple[list[list[float]], list[float]]:
    """Milliseconds of each round, and the peak MiB, of both."""
    times: list[list[float]] = [[], []]
    peaks = [0.0, 0.0]
    for round_ in range(WARM_UP + ROUNDS):
        for side in (0, 1) if round_ % 2 else (1, 0):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            steps[side]()
            torch.cuda.synchronize()
            if round_ >= WARM_UP:
                times[side].append((time.perf_counter() - start) * 1e3)
                peaks[side] = torch.cuda.max_memory_allocated() / 2**20
    return times, peaks


def rows(name: str, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model, example, batch, loss = CASES[name]()
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    before = twin(model)
    torch.cuda.synchronize()
    start = time.perf_counter()
    swapped = headway.swap(model, example)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    certificate = swapped.certificate
    assert certificate is not None
    row = {"group": "swap", "case": name, "parameters": parameters, **common}
    yield {
        **row, "pass": "swap and prove", "seconds": round(seconds, 2), "passed": certificate.passed,
        "sites": len(swapped.census.swapped), "left_alone": len(swapped.census.tickets) - len(swapped.census.swapped),
    }  # fmt: skip
    for kind, make in (("inference", inference), ("train step", lambda m, b: training(m, b, loss))):
        steps = make(before, batch), make(model, batch)
        times, peaks = in_turns(steps)
        was, now = (statistics.median(each) for each in times)
        yield {
            **row, "pass": kind, "ms_before": [round(t, 3) for t in times[0]],
            "ms_now": [round(t, 3) for t in times[1]],
            "ms_p50_before": round(was, 3), "ms_p50_now": round(now, 3), "gain": round(was / now, 3),
            "peak_mib_before": round(peaks[0]), "peak_mib_now": round(peaks[1]),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="encoder;decoder")
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    options = parser.parse_args()
    common = about()
    common["versions"]["transformers"] = transformers.__version__
    if options.commit:
        common["commit"] = options.commit
    with options.out.open("w") as out:
        for name in CASES:
            if not any(part in name for part in options.cases.split(";")):
                continue
            for row in rows(name, common):
                out.write(json.dumps(row) + "\n")
                out.flush()
                shown = row["seconds"] if "seconds" in row else (row["ms_p50_before"], row["ms_p50_now"], row["gain"])
                print(name, "|", row["pass"], shown, flush=True)
            gc.collect()  # optimizers are in cycles, which hold on to the model before
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
