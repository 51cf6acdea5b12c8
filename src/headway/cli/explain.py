"""headway explain: what would be chosen for a call that is described and not made."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Annotated

import torch
import typer

from headway.attention import asked_backend
from headway.backends.registry import BACKENDS
from headway.choice.choose import choose
from headway.choice.here import here
from headway.cli.examine import all_devices
from headway.cli.models import SHORT
from headway.errors import UnknownNameError
from headway.limits.request import CONTRACTS, Request

DTYPES = ("float16", "bfloat16", "float32", "float64")
MASK_WORDS: tuple[str, ...] = tuple(
    sorted(reduce(operator.or_, (kinds for backend in BACKENDS for kinds in backend.masks.native)))
)
"""Kinds of mask terms that some backend knows by name."""


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
    mask: Annotated[str, typer.Option(help=f"Kinds of terms joined by &, of: {', '.join(MASK_WORDS)}.")] = "",
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
    bare = {"causal", "window"} & {word.strip() for word in mask.split("&")}
    if kv_len not in (None, q_len) and bare:
        word = min(bare)
        raise typer.BadParameter(
            f"got {word} on {q_len} queries and {kv_len} keys, which has two readings;"
            f" takes {word}-lower-right or {word}-upper-left"
        )
    if " and " in mask:
        raise typer.BadParameter(f"got {mask!r}, takes terms joined by &: {mask.replace(' and ', ' & ')!r}")
    try:
        request = Request(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=q_len if kv_len is None else kv_len,
            head_dim=head_dim,
            value_dim=head_dim if value_dim is None else value_dim,
            dtype=_known("dtype", SHORT.get(dtype, dtype), DTYPES),
            device=_known("device", device, all_devices(), unless=device == "cuda").partition(":")[0],
            mask=frozenset(_known("mask", word.strip(), MASK_WORDS) for word in mask.split("&") if word.strip()),
            rows_may_be_empty=empty_rows,
            mask_needs_grad=mask_gradient,
            dropout=dropout,
            softcap=softcap,
            sinks=sinks,
            returns_lse=lse,
            needs_grad=backward or mask_gradient,
            compiled=compiled,
            require=frozenset(_known("contract", word, CONTRACTS) for word in require or ()),
        )
        decision = choose(request, here(torch.device(device)), asked_backend(backend))
    except UnknownNameError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(decision))
    if decision.chosen is None:
        raise typer.Exit(1)


def _known(what: str, name: str, known: tuple[str, ...], unless: bool = False) -> str:
    if name not in known and not (unless and torch.cuda.is_available()):
        raise UnknownNameError(what, name, known)
    return name
