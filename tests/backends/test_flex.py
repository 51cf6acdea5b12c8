"""flex: really compiled, few programs, and a budget instead of a silent fall to the unfused path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreement import Answer, Call, check, judge
from deck import Source
from test_attention import draw

from headway import Alibi, Bias, Causal, Documents, Mask, Padding, Predicate, RecompileBudgetError, Window, attention
from headway.backends import flex
from headway.backends.kernel import Extras
from headway.masks import Frame


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    flex.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    flex.compiled.cache_clear()
    torch._dynamo.reset()


COMPILED: dict[str, tuple[Callable[[], Mask | None], dict[str, Any]]] = {
    "none": (lambda: None, {}),
    "documents & padding, rows of nothing": (lambda: Documents([100, 0, 60]) & Padding([0, 130]), {}),
    "window, softcap": (lambda: Window(20, 3), {"softcap": 2.0, "scale": -0.3}),
    "bias & alibi": (lambda: Bias(Source("bias").normal(160, 160).float()) & Alibi(torch.tensor([0.1, 0.2])), {}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_on_cpu(name: str) -> None:
    """More than one block of 128, and not a whole number of them."""
    mask, options = COMPILED[name]
    check(Call(*draw(2, 2, 160, 32), mask=mask(), **options), "flex", learns=False)


# -- what is compiled again, counted without compiling --------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Programs handed to inductor, which runs them unfused here."""
    made: list[int] = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: (made.append(1), graph)[1])
    return made


def test_numbers_of_a_mask_are_no_new_program(compilations: list[int]) -> None:
    """Windows, prefixes, document lengths: data, not code."""
    q, k, v = draw(2, 2, 32, 32)
    for left in (3, 4, 9):
        attention(q, k, v, mask=Window(left, 2), backend="flex")
    assert len(compilations) == 1
    for lengths in ([20, 12], [1, 31], [16, 16]):
        attention(q, k, v, mask=Documents(lengths), backend="flex")
    assert len(compilations) == 2
    for lengths in ([20, 12], [1, 31]):
        attention(q, k, v, mask=Padding(lengths), backend="flex")
    assert len(compilations) == 3


def test_softcaps_and_scales(compilations: list[int]) -> None:
    q, k, v = draw(2, 2, 32, 32)
    for softcap in (1.0, 2.0, 30.0):
        attention(q, k, v, softcap=softcap, backend="flex")
    assert len(compilations) == 1


def test_predicates_of_one_code_share_a_program(compilations: list[int]) -> None:
    """A predicate made anew at each step, as users write them, is not a program a step."""
    q, k, v = draw(2, 2, 32, 32)
    for step in (2, 3, 4):
        n = torch.tensor(step)
        attention(q, k, v, mask=Predicate(lambda b, h, q, k, n=n: (q - k) % n == 0), backend="flex")
    assert len(compilations) == 1


def test_past_the_budget_it_raises(compilations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts too, and at its own limit of 8 would run the unfused path from then on, with a log line."""
    monkeypatch.setattr(flex, "BUDGET", 10)
    for length in range(16, 26):
        attention(*draw(1, 1, length, 32), mask=Causal(), backend="flex")
    with pytest.raises(RecompileBudgetError, match="for the 11th time, budget 10.*pad lengths.*or choose another"):
        attention(*draw(1, 1, 26, 32), mask=Causal(), backend="flex")
    attention(*draw(1, 1, 20, 32), mask=Causal(), backend="flex")
    attention(*draw(1, 1, 26, 32), mask=Window(2, 2), backend="flex")
    assert len(compilations) == 11


def test_the_budget_raises_each_time(compilations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BUDGET", 1)
    attention(*draw(1, 1, 16, 32), backend="flex")
    for _ in range(3):
        with pytest.raises(RecompileBudgetError):
            attention(*draw(1, 1, 17, 32), backend="flex")


@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
@pytest.mark.parametrize("far", [-1e30, torch.finfo(torch.float32).min])
def test_rows_far_below_zero_are_shifted_and_their_lse_is_not(far: float) -> None:
    """On a GPU the kernel gave NaN for them; the shift leaves it only scores it can tell apart."""
    bias = torch.zeros(160, 160)
    bias[2], bias[:, :3], bias[5] = far, far, float("-inf")
    for mask in (Bias(bias), Causal() & Bias(bias), Bias(bias) & Bias(bias.clamp(-1e30).bfloat16())):
        lowered = flex.lower(mask, Frame(160, 160, 1, 2), torch.float32)
        q, k, v = draw(1, 2, 160, 32)
        index = torch.arange(160)
        assert lowered.score is not None
        b = h = torch.tensor(0)
        scores = lowered.score(torch.zeros(160, 160), b, h, index[:, None], index[None, :])
        seen = mask.to_bool(Frame(160, 160, 1, 2)).expand(1, 2, 160, 160)[0, 0]
        assert scores.masked_fill(~seen, float("-inf")).amax(-1)[seen.any(-1)].abs().max() == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
            patch.setattr(flex, "compiled", lambda *_: flex._flex)
            out, lse = flex.attend(q, k, v, lowered, Extras(lse=True))  # which the door lets through on CUDA alone
        judge(Call(q, k, v, mask=mask, return_lse=True), Answer(out, lse, {}), learns=False)
