"""The tests of the tests: each breaks the code on purpose, and the judge must see it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import test_dropout
import torch
from agreement import check
from deck import DECK
from torch import Tensor

from headway import Mask
from headway.backends.kernel import Attended, Extras, Kernel
from headway.masks import Causal, Frame

Attend: TypeAlias = Callable[..., Attended]
Patch: TypeAlias = pytest.MonkeyPatch


def kernel(backend: str) -> Any:
    return importlib.import_module(f"headway.backends.{backend.replace('-', '_')}")


def change(patch: Patch, backend: str, how: Callable[[Attend], Attend]) -> None:
    """Put `how(attend)` in the place of the backend's attend."""
    patch.setattr(kernel(backend), "attend", how(kernel(backend).attend))


def with_extras(**changes: Callable[[Extras], Any]) -> Callable[[Attend], Attend]:
    """The kernel is told something else than the caller said."""
    import dataclasses

    def broken(attend: Attend) -> Attend:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, extras: Extras) -> Attended:
            told = {name: value(extras) for name, value in changes.items()}
            return attend(q, k, v, mask, dataclasses.replace(extras, **told))

        return run

    return broken


def with_answer(after: Callable[[Tensor, Tensor | None], Attended]) -> Callable[[Attend], Attend]:
    """The kernel's answer is spoilt."""
    return lambda attend: lambda *arguments: after(*attend(*arguments))


def with_inputs(
    before: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Callable[[Attend], Attend]:
    """The kernel is given other tensors."""
    return lambda attend: lambda q, k, v, *rest: attend(*before(q, k, v), *rest)


def only_backward(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is off by a factor."""
    return x.detach() + factor * (x - x.detach())


def one_nan(out: Tensor, lse: Tensor | None) -> Attended:
    spoilt = out.clone()
    spoilt[-1, -1, -1, -1] = math.nan
    return spoilt, lse


def one_off(out: Tensor, lse: Tensor | None) -> Attended:
    spoilt = out.clone()
    spoilt[0, 0, 0, 0] += 0.25
    return spoilt, lse


MUTANTS: dict[str, tuple[str, Callable[[Attend], Attend]]] = {
    "scale 1% off": ("scale", with_extras(scale=lambda e: (e.scale or 64**-0.5) * 1.01)),
    "scale ignored": ("scale", with_extras(scale=lambda e: 0.125)),
    "one NaN": ("mask causal", with_answer(one_nan)),
    "one element off": ("mask causal", with_answer(one_off)),
    "everything 1% off": ("mask padding", with_answer(lambda out, lse: (out * 1.01, lse))),
    "empty rows give the mean of v": ("mask padding-all", with_answer(lambda out, lse: (out + (out == 0) * 0.1, lse))),
    "q's gradient 1% off": ("heads 8:2", with_inputs(lambda q, k, v: (only_backward(q, 1.01), k, v))),
    "k's gradient lost in part": ("heads 8:2", with_inputs(lambda q, k, v: (q, only_backward(k, 0.9), v))),
    "v's gradient doubled": ("heads 8:2", with_inputs(lambda q, k, v: (q, k, only_backward(v, 2.0)))),
    "keys one off": ("length 130x130", with_inputs(lambda q, k, v: (q, k.roll(1, 2), v))),
    "the last key unseen": ("length 5x5", with_inputs(lambda q, k, v: (q, k[:, :, :-1], v[:, :, :-1]))),
    "key heads interleaved": (
        "heads 8:2",
        with_inputs(lambda q, k, v: (q, k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1))),
    ),
    "batch entries swapped": ("batch 3", with_inputs(lambda q, k, v: (q.flip(0), k, v))),
    "half precision inside": ("length 64x64", with_inputs(lambda q, k, v: (q.bfloat16().to(q.dtype), k, v))),
}
"""What is broken: the case that shows it, and how."""


@pytest.mark.parametrize("backend", ["reference", "sdpa-math", "sdpa-flash"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_is_seen(mutant: str, backend: str, monkeypatch: Patch) -> None:
    case, how = MUTANTS[mutant]
    assert_seen(backend, case, lambda: change(monkeypatch, backend, how))


def assert_seen(backend: str, case: str, breaks: Callable[[], None], dtype: str = "float32") -> None:
    """Right before, wrong after."""
    check(DECK[case].draw(dtype, "cpu"), backend)
    breaks()
    importlib.import_module("headway.attention")._PLANS.clear()
    with pytest.raises(AssertionError):
        check(DECK[case].draw(dtype, "cpu"), backend)


@pytest.mark.parametrize("mutant", ["scale 1% off", "everything 1% off", "one NaN", "one element off"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_is_seen_in_half_precision(mutant: str, dtype: str, monkeypatch: Patch) -> None:
    """The mean finds what rounding hides from the worst element."""
    _, how = MUTANTS[mutant]
    assert_seen("sdpa-flash", "length 320x320", lambda: change(monkeypatch, "sdpa-flash", how), dtype)


OPTIONS: dict[str, tuple[str, Callable[[Attend], Attend]]] = {
    "softcap ignored": ("softcap", with_extras(softcap=lambda e: None)),
    "softcap after the mask's bias": ("softcap, heads 8:2, alibi", with_extras(softcap=lambda e: e.softcap * 1.02)),
    "sinks ignored": ("sinks", with_extras(sinks=lambda e: None)),
    "sinks given away": ("sinks", with_extras(sinks=lambda e: e.sinks.flip(0))),
    "sinks without gradient": ("sinks", with_extras(sinks=lambda e: e.sinks.detach())),
    "lse in powers of 2": ("lse", with_answer(lambda out, lse: (out, lse * math.log2(math.e)))),
    "lse without its gradient": ("lse", with_answer(lambda out, lse: (out, only_backward(lse, 0.0)))),
    "lse forgets the sinks": ("sinks, lse", with_answer(lambda out, lse: (out, lse - 0.1))),
    "lse of empty rows 0": ("lse, padding-all", with_answer(lambda out, lse: (out, lse.clamp_min(-1e30)))),
    "lse forgotten": ("lse", with_answer(lambda out, lse: (out, None))),
}


@pytest.mark.parametrize("mutant", OPTIONS)
def test_an_option_lost_is_seen(mutant: str, monkeypatch: Patch) -> None:
    case, how = OPTIONS[mutant]
    assert_seen("reference", case, lambda: change(monkeypatch, "reference", how))


# -- masks lowered wrongly --------------------------------------------------------------------------------------------


def lowering(spoil: Callable[[Kernel, Mask | None, Frame, torch.dtype], Any]) -> Callable[[Patch, str], None]:
    def breaks(patch: Patch, backend: str) -> None:
        module = kernel(backend)
        lower = module.lower
        patch.setattr(module, "lower", lambda mask, frame, dtype: spoil(lower, mask, frame, dtype))

    return breaks


def rolled(lower: Any, mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
    """One key further on."""
    keep, bias = lower(mask, frame, dtype)
    return None if keep is None else keep.roll(1, -1), bias


def other_align(lower: Any, mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
    assert isinstance(mask, Causal)
    return lower(Causal("upper-left" if mask.align == "lower-right" else "lower-right"), frame, dtype)


def no_bias_gradient(lower: Any, mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
    keep, bias = lower(mask, frame, dtype)
    return keep, bias.detach()


def no_mask(lower: Any, mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
    return lower(None, frame, dtype)


def first_entry_for_all(lower: Any, mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
    keep, bias = lower(mask, frame, dtype)
    return keep[:1], bias


LOWERINGS: dict[str, tuple[str, Any]] = {
    "mask one off": ("mask causal", rolled),
    "window one off": ("mask window", rolled),
    "causal aligned the other way, wide": ("mask causal-lower-right-wide", other_align),
    "causal aligned the other way, tall": ("mask causal-upper-left-tall", other_align),
    "mask lost": ("mask documents", no_mask),
    "padding of the first entry for all": ("mask padding", first_entry_for_all),
    "bias lost": ("mask bias", no_mask),
    "bias without gradient": ("mask bias-learnt", no_bias_gradient),
}


@pytest.mark.parametrize("mutant", LOWERINGS)
def test_a_mask_lowered_wrongly_is_seen(mutant: str, monkeypatch: Patch) -> None:
    case, spoil = LOWERINGS[mutant]
    assert_seen("reference", case, lambda: lowering(spoil)(monkeypatch, "reference"))


# -- dropout ----------------------------------------------------------------------------------------------------------

DROPOUTS: dict[str, Callable[[Attend], Attend]] = {
    "dropout ignored": with_extras(dropout=lambda e: 0.0),
    "dropout half of what was asked": with_extras(dropout=lambda e: e.dropout / 2),
    "dropout without scaling up": lambda attend: (
        lambda q, k, v, mask, extras: (
            attend(q, k, v, mask, extras)[0] * (1 - extras.dropout),
            None,
        )
    ),
}


@pytest.mark.parametrize("backend", ["reference", "sdpa-math"])
@pytest.mark.parametrize("mutant", DROPOUTS)
def test_dropout_gone_wrong_is_seen(mutant: str, backend: str, monkeypatch: Patch) -> None:
    test_dropout.test_share_and_mean("cpu", backend, "dropout")
    q, k, _ = test_dropout.draw("cpu")
    weights = test_dropout.weights_left(q, k, None, backend, 0.0)
    change(monkeypatch, backend, DROPOUTS[mutant])
    with pytest.raises(AssertionError):
        test_dropout.assert_drops(test_dropout.weights_left(q, k, None, backend, 0.5), weights, 0.5)
