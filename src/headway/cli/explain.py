"""headway explain: what would be chosen for a call that is described and not made."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from headway.attention import asked_backend
from headway.choice.choose import choose
from headway.choice.here import here
from headway.cli.examine import all_devices
from headway.cli.masks import ALIGNED, PLAIN, read
from headway.cli.models import SHORT
from headway.errors import HeadwayError, UnknownNameError
from headway.limits.request import CONTRACTS, Request
from headway.masks.frame import Frame
from headway.masks.terms import rows_may_be_empty, terms

DTYPES = ("float16", "bfloat16", "float32", "float64")
MASK = (
    f"Kinds joined by &, | and ~, of: {', '.join(ALIGNED)} (each with -lower-right or -upper-left too),"
    f" {', '.join(PLAIN)}."
)


def command(
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="As many as heads, if not given.")] = None,
    q_len: Annotated[int, typer.Option(min=0)] = 1024,
    kv_len: Annotated[int | None, typer.Option(min=0, help="As many as queries, if not given.")] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    value_dim: Annotated[int | None, typer.Option(min=1, help="Head size of the values, if another.")] = None,
    batch: Annotated[int, typer.Option(min=0)] = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    device: Annotated[str, typer.Option(help="A device of this machine.")] = "cpu",
    mask: Annotated[str, typer.Option(help=MASK)] = "",
    empty_rows: Annotated[bool, typer.Option("--empty-rows", help="Some query may see nothing.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="Gradients of q, k and v are wanted.")] = False,
    mask_gradient: Annotated[bool, typer.Option("--mask-gradient", help="A gradient of the bias is wanted.")] = False,
    dropout: Annotated[bool, typer.Option("--dropout")] = False,
    softcap: Annotated[bool, typer.Option("--softcap")] = False,
    sinks: Annotated[bool, typer.Option("--sinks")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="The log of each row's softmax denominator is wanted.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="The call is inside torch.compile.")] = False,
    require: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CONTRACTS)}. Repeatable.")] = None,
    backend: Annotated[str, typer.Option(help="'auto', or a name.")] = "auto",
) -> None:
    """Explain the choice for a described call: what is chosen, why, and all that speaks against the rest.

    Exits with 1 if nothing takes the call.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise typer.BadParameter(
            f"got {heads} heads and {kv_heads} key heads; takes a whole number of the first to each"
        )
    frame = Frame(q_len, q_len if kv_len is None else kv_len, batch, heads)
    try:
        said, where = read(mask, frame), _here(device)
        request = Request(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=frame.kv_len,
            head_dim=head_dim,
            value_dim=head_dim if value_dim is None else value_dim,
            dtype=_known("dtype", SHORT.get(dtype, dtype), DTYPES),
            device=where.type,
            mask=terms(said, frame).kinds(frame),
            rows_may_be_empty=empty_rows or rows_may_be_empty(said, frame),
            mask_needs_grad=mask_gradient,
            dropout=dropout,
            softcap=softcap,
            sinks=sinks,
            returns_lse=lse,
            needs_grad=backward or mask_gradient,
            compiled=compiled,
            require=frozenset(_known("contract", word, CONTRACTS) for word in require or ()),
        )
        decision = choose(request, here(where), asked_backend(backend))
    except HeadwayError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(decision))
    if decision.chosen is None:
        raise typer.Exit(1)


def _here(device: str) -> torch.device:
    there = all_devices()
    if device not in there and f"{device}:0" not in there:
        raise typer.BadParameter(f"got the device {device!r}, which is not on this machine; takes {', '.join(there)}")
    return torch.device(device)


def _known(what: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise UnknownNameError(what, name, known)
    return name
