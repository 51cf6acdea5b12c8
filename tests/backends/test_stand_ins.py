"""Backends whose kernels need a GPU, on stand-ins that take what those take: all they say is checked here."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import stand_ins
from accepts import ACCEPTS
from agreement import Call, answered, judge
from deck import DECK, Case
from torch import Tensor

from headway.backends import torch_varlen
from headway.backends.kernel import Extras

CUDA_ONLY = ("flash2", "flash3", "flash4", "xformers", "sage", "torch-varlen", "sdpa-cudnn", "sdpa-efficient")
MODULES = {
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
    "sage": "sageattention",
    "xformers": "xformers.ops.fmha",
}


@pytest.fixture
def kernel(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend's file, with its package's stand-in where it will look."""
    if backend in MODULES:
        made = getattr(stand_ins, backend)()
        hang(monkeypatch, made)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_ins.varlen_attn)
    monkeypatch.setattr("torch._scaled_dot_product_cudnn_attention", stand_ins.cudnn)
    monkeypatch.setattr("torch._scaled_dot_product_efficient_attention", stand_ins.efficient)
    torch_varlen._parameters.cache_clear()
    yield importlib.import_module(f"headway.backends.{backend.replace('-', '_')}")
    torch_varlen._parameters.cache_clear()  # it asked the stand-in


def hang(monkeypatch: pytest.MonkeyPatch, made: types.ModuleType) -> None:
    """Where `import` looks, with the packages above it and the modules in it."""
    monkeypatch.setitem(sys.modules, made.__name__, made)
    for name, part in vars(made).items():
        if isinstance(part, types.ModuleType):
            monkeypatch.setitem(sys.modules, f"{made.__name__}.{name}", part)
    above, _, last = made.__name__.rpartition(".")
    if above:
        package = stand_ins.module(above)
        setattr(package, last, made)
        hang(monkeypatch, package)


def cases() -> list[object]:
    """All that the backend accepts on an H200; its layout is made plain before a kernel sees it."""
    return [
        pytest.param(backend, case, learns, id=f"{backend}-{case.name}{', learns' if learns else ''}")
        for backend in CUDA_ONLY
        for case in DECK.values()
        for learns in sorted({False, case.name in ACCEPTS["h200"][backend].learns})
        if case.name in ACCEPTS["h200"][backend].learns | ACCEPTS["h200"][backend].infers and not case.dropout
    ]


@pytest.mark.parametrize(("backend", "case", "learns"), cases())
def test_says_to_its_kernel_what_was_asked(case: Case, learns: bool, kernel: Any) -> None:
    says(kernel, case.draw("float32", "cpu", learns=learns), learns=learns)


@pytest.mark.parametrize("backend", ["xformers", "sdpa-efficient"])
def test_a_bias_that_learns_alone_gets_its_gradient(kernel: Any) -> None:
    """xformers looks at q, k and v alone to see whether anything learns."""
    call = DECK["mask bias-learnt"].draw("float32", "cpu", learns=False)
    assert [name for name in call.learnt() if name in "qkv"] == []
    assert call.learnt()
    says(kernel, call, learns=True)


@pytest.mark.parametrize("backend", ["xformers", "sdpa-efficient"])
def test_one_head_cut_from_many_that_share_keys(kernel: Any) -> None:
    """It is contiguous as torch counts, and its stride is 0."""
    call = DECK["length 65x100, causal-upper-left, layout one-for-all"].draw("float32", "cpu", learns=False)
    q, k, v = (x[:1, :1] for x in (call.q, call.k, call.v))
    assert k.contiguous().stride(1) == 0
    says(kernel, dataclasses.replace(call, q=q, k=k, v=v), learns=False)


def says(kernel: Any, call: Call, *, learns: bool) -> None:
    asked = call.learnt() if learns else {}
    judge(call, answered(lambda: attend(kernel, call, learns=learns), asked, call.q.dtype), learns=learns)


def attend(kernel: Any, call: Call, *, learns: bool) -> tuple[Tensor, Tensor | None]:
    """As the plan of a call would."""
    scale = 1 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale
    extras = Extras(scale, 0.0, call.softcap, call.sinks, call.return_lse, needs_grad=learns)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    out, lse = kernel.attend(q, k, v, kernel.lower(call.mask, call.frame(), q.dtype), extras)
    return out, lse if call.return_lse else None


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4", "sdpa-cudnn", "sdpa-efficient", "torch-varlen"])
def test_an_lse_that_nobody_asked_for_is_not_promised(backend: str, kernel: Any) -> None:
    call = DECK["mask documents"].draw("float32", "cpu", learns=False)
    extras = Extras(0.125)
    out, _ = kernel.attend(call.q, call.k, call.v, kernel.lower(call.mask, call.frame(), call.q.dtype), extras)
    assert out.shape == call.q.shape
