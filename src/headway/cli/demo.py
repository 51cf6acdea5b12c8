"""headway demo: trains one step of a built-in model and proves each layer's attention against float64."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
import torch.nn.functional as F
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from headway import Causal, Mask, Padding, __version__, attention, explain
from headway.choice.choose import Decision
from headway.cli.demo_model import Attend, Attention, Decoder, Seen, Shape
from headway.masks import Frame

SHAPE = Shape()
LENGTHS = (192, 131, 64)
"""Real tokens of each sequence; the rest is padding."""

ROUNDS = 9
"""Timed passes; their median is shown."""

ALLOWED = 4.0
"""How many times the error of PyTorch's own attention Headway's may reach before the demo calls it wrong."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to compute a layer's attention: its errors against float64, and its time."""

    forward: float
    backward: float
    ms: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: the choice, and both ways side by side."""

    decision: Decision
    headway: Side
    torch: Side

    @property
    def holds(self) -> bool:
        """Whether Headway errs no more than PyTorch may in the same dtype."""
        pairs = ((self.headway.forward, self.torch.forward), (self.headway.backward, self.torch.backward))
        return all(ours <= ALLOWED * theirs + 1e-7 for ours, theirs in pairs)


def command(
    report: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("headway-demo.html"),
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Run the built-in model forward and backward, and judge each layer's attention by float64.

    Exits with 1 if a layer's error is more than a small multiple of what PyTorch's own attention errs.
    """
    console = Console(record=True)
    layers, loss = run(device)
    show(layers, loss, console)
    report.write_text(console.export_html(clear=False), encoding="utf-8")
    Console().print(f"Written to {report}", highlight=False)
    if not all(layer.holds for layer in layers):
        raise typer.Exit(1)


# -- the run ----------------------------------------------------------------------------------------------------------


def run(device: str = "cpu") -> tuple[list[Layer], tuple[float, float]]:
    """Each layer's proof, and the loss with Headway's attention and with everything in float64."""
    torch.manual_seed(0)
    model = Decoder(SHAPE, attention).to(device)
    tokens = torch.randint(SHAPE.vocabulary, (len(LENGTHS), max(LENGTHS)), device=device)
    mask = Causal() & Padding(LENGTHS)
    loss = _loss(model, tokens, mask)
    loss.backward()
    judge = copy.deepcopy(model).double()
    for block in judge.blocks:
        cast(Attention, block.attention).attend = _reference
    with torch.no_grad():
        truth = _loss(judge, tokens, mask)
    layers = [_judged(cast(Attention, block.attention).seen, mask) for block in model.blocks]
    return layers, (loss.item(), truth.item())


def _loss(model: Decoder, tokens: Tensor, mask: Mask) -> Tensor:
    """Of the next token, over real tokens only."""
    logits = model(tokens, mask)[:, :-1]
    real = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(LENGTHS, device=tokens.device)[:, None]
    return F.cross_entropy(logits[real[:, 1:]], tokens[:, 1:][real[:, 1:]])


def _judged(seen: Seen | None, mask: Mask) -> Layer:
    """One layer's own activations and gradient through both ways and float64."""
    assert seen is not None
    assert seen.toward is not None
    wide = Seen(seen.q.double(), seen.k.double(), seen.v.double(), seen.toward.double())
    truth = _passes(_reference, wide, mask)
    decision = explain(seen.q.requires_grad_(), seen.k, seen.v, mask)
    ours, theirs = (_errors(attend, seen, mask, truth) for attend in (attention, _sdpa))
    times = _ms([lambda: _passes(attention, seen, mask), lambda: _passes(_sdpa, seen, mask)], seen.q.device)
    return Layer(decision, Side(*ours, times[0]), Side(*theirs, times[1]))


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    return attention(q, k, v, mask, backend="reference")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """What one writes without Headway: the mask as a tensor of bools."""
    keep = mask.to_bool(Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def _errors(attend: Attend, seen: Seen, mask: Mask, truth: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the result, and of the worst gradient."""
    out, *grads = _passes(attend, seen, mask)
    return _error(out, truth[0]), max(_error(one, other) for one, other in zip(grads, truth[1:], strict=True))


def _passes(attend: Attend, seen: Seen, mask: Mask) -> tuple[Tensor, ...]:
    """The result, and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (seen.q, seen.k, seen.v))
    out = attend(q, k, v, mask)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), seen.toward))


def _error(got: Tensor, truth: Tensor) -> float:
    """The worst element's error, as a share of the largest element."""
    return ((got.double() - truth).abs().max() / truth.abs().max()).item()


def _ms(works: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median milliseconds of each; they take turns, so that a machine that slows down slows all."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, seen in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seen.append((time.perf_counter() - start) * 1000)
    return [statistics.median(seen) for seen in times]


# -- the report -------------------------------------------------------------------------------------------------------


def show(layers: list[Layer], loss: tuple[float, float], console: Console) -> None:
    """Print the proof."""
    console.print(
        f"[bold]Headway {__version__}[/bold]: a decoder of {len(layers)} layers, one training step", highlight=False
    )
    console.print(
        f"tokens {', '.join(map(str, LENGTHS))}; {SHAPE.heads} query heads on {SHAPE.kv_heads} key heads of"
        f" {SHAPE.head_dim}; Causal() & Padding(lengths)",
        highlight=False,
    )
    console.print(_table(layers))
    console.print("Errors are the worst element's, against float64, as a share of the largest; ms is both passes.")
    console.print(f"Loss {loss[0]:.7f}; with everything in float64 {loss[1]:.7f}.", highlight=False)
    for decision in {layer.decision.why: layer.decision for layer in layers}.values():
        console.print(f"\n[bold]Why[/bold]\n{escape(str(decision))}", highlight=False, soft_wrap=True)
    right = all(layer.holds for layer in layers)
    verdict = "[green]Right[/green]" if right else "[red]Wrong[/red]"
    console.print(
        f"\n{verdict}: errors {'within' if right else 'beyond'} {ALLOWED:g} times PyTorch's own.", highlight=False
    )


def _table(layers: list[Layer]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("chosen")
    for head in ("forward\nheadway", "\nSDPA", "gradients\nheadway", "\nSDPA", "ms\nheadway", "\nSDPA"):
        table.add_column(head, justify="right")
    for number, layer in enumerate(layers):
        chosen = layer.decision.chosen
        ours, theirs = layer.headway, layer.torch
        errors = [f"{error:.1e}" for error in (ours.forward, theirs.forward, ours.backward, theirs.backward)]
        table.add_row(str(number), chosen.name if chosen else "none", *errors, f"{ours.ms:.2f}", f"{theirs.ms:.2f}")
    return table
