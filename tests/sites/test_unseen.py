"""Attention that no mode sees: never missing from the census, and left as it is."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import callback
from torch.nn.attention.flex_attention import flex_attention

from headway.sites.seen import see
from headway.sites.site import site_of
from headway.swap import inspect, swap

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

real = F.scaled_dot_product_attention


class Attends(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.function = nn.Linear(8, 24), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*(y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)))


def helped(*qkv: Tensor) -> Tensor:
    return flex_attention(*qkv)


def made(function: Callable[..., Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Attends(function)), torch.randn(2, 3, 8)


@pytest.fixture(autouse=True)
def _no_profiler() -> Iterator[None]:
    yield
    assert sys.getprofile() is None


@pytest.mark.parametrize(
    "function", (flex_attention, helped, torch.compile(flex_attention, backend="eager")), ids=("", "helped", "compiled")
)
def test_flex_attention_is_in_the_census(function: Callable[..., Tensor]) -> None:
    """Nothing was said of it: a model all of flex attention had 0 sites."""
    model, x = made(function)
    with torch.no_grad():  # it has no backward on CPU
        truth = model(x)
        for _ in range(2):  # compiled at the first, run at the second
            (ticket,) = swap(model, x).census.tickets
        assert (ticket.name, ticket.kind, ticket.swapped) == ("1", "flex_attention", False)
        assert "it calls flex_attention; no kind of site redirects that" in ticket.because
        assert torch.equal(model(x), truth)


@pytest.mark.parametrize("met", ["before", "by flex_attention"])
def test_the_compiler_is_not_listened_to(met: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled itself in a swap, as flex_attention does, took ten times as long: the hook heard all of it."""
    torch._dynamo.reset()
    hooks: list[Any] = []
    note = callback.on_compile_end(lambda *_: hooks.append(sys.getprofile()))
    if met != "before":  # as in a process that has not imported it
        monkeypatch.delitem(sys.modules, callback.__name__)
        real = importlib.import_module
        there = {callback.__name__: lambda: sys.modules.setdefault(callback.__name__, callback)}
        monkeypatch.setattr(
            importlib, "import_module", lambda name, *more: there.get(name, lambda: real(name, *more))()
        )
    try:
        model, x = made(flex_attention)
        with torch.no_grad():
            (ticket,) = swap(model, x).census.tickets
    finally:
        callback.callback_handler.remove_end_callback(note)
    assert (ticket.kind, set(hooks)) == ("flex_attention", {None})


def test_a_model_may_reset_the_compiler() -> None:
    def resets(*qkv: Tensor) -> Tensor:
        torch._dynamo.reset()
        return flex_attention(*qkv)

    model, x = made(resets)
    with torch.no_grad():
        (ticket,) = swap(model, x).census.tickets
    assert ticket.kind == "flex_attention"


def test_a_package_s_kernel_is_in_the_census(monkeypatch: pytest.MonkeyPatch) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", **kwargs: Any) -> Tensor:
        return v * 2

    package = types.ModuleType("sageattention")
    package.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", package)
    (ticket,) = inspect(*made(sageattn)).tickets
    assert (ticket.name, ticket.kind) == ("1", "sageattn")


# -- F.scaled_dot_product_attention replaced by another tool, for the whole process ---------------------------------


def call(*qkv: Tensor, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, **kwargs)


def kernel_of_its_own(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", **kwargs: Any) -> Tensor:
    """Swallows masks, dropout and scale."""
    return v * 2


def passes_on(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return real(q, k, v, *args, **kwargs)


def test_a_replaced_function_is_named_and_what_it_computes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The census said 0 sites and nothing else."""
    model, x = made(call)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel_of_its_own)
    truth = model(x)
    done = swap(model, x)
    (ticket,) = done.census.tickets
    assert not ticket.swapped
    assert "kernel_of_its_own, which another tool put in the place of" in ticket.because
    assert any(f"another tool put {__name__}.kernel_of_its_own" in note for note in done.census.notes)
    assert torch.equal(model(x), truth)
    assert F.scaled_dot_product_attention is kernel_of_its_own
    assert swap(model).census.notes[0].startswith("another tool put")  # without an example too


@pytest.mark.parametrize("first", ("patch", "swap"))
def test_what_passes_the_call_on_to_pytorchs_own_is_redirected_behind_it(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model swapped before was no longer run by Headway, and nobody said so."""
    model, x = made(call)
    truth = model(x)
    if first == "swap":
        done = swap(model, x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", passes_on)
    if first == "patch":
        done = swap(model, x)
        assert any("passes_on" in note for note in done.census.notes)
    (ticket,) = done.census.swapped
    before = sum(ticket.runs.values())
    torch.testing.assert_close(model(x), truth)
    assert sum(ticket.runs.values()) == before + 1
    assert F.scaled_dot_product_attention is passes_on


def test_pytorchs_own_is_no_news() -> None:
    model, x = made(call)
    assert swap(model, x).census.notes == ()
    assert site_of(model[1]) is not None  # type: ignore[index]


# -- listening ---------------------------------------------------------------------------------------------------------


def test_a_profiler_at_work_keeps_what_it_measures() -> None:
    told: list[str] = []
    model, x = made(helped)

    def mine(frame: Any, event: str, _: Any) -> None:
        told.append(frame.f_code.co_name)

    sys.setprofile(mine)
    try:
        seen = see(model, lambda m: m(x))
        assert sys.getprofile() is mine
        assert "a profiler is at work" in str(inspect(model, x))
    finally:
        sys.setprofile(None)
    assert "helped" in told
    assert not seen.unseen


def test_nothing_is_left_listening_after_an_exception() -> None:
    model, _ = made(helped)
    with pytest.raises(ZeroDivisionError):
        see(model, lambda m: 1 / 0)
    assert sys.getprofile() is None
