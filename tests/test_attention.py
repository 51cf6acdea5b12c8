"""The door: what one call takes, gives and refuses, whichever backend runs it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accepts import ACCEPTS
from agreement import Call, check
from deck import DEVICES, Source
from test_agreement import TABLES, installed
from torch import Tensor

import headway
from headway import (
    Bias,
    Causal,
    Dense,
    Documents,
    HeadwayError,
    Mask,
    MaskError,
    NoBackendError,
    Padding,
    RecompileBudgetError,
    RequestError,
    UnknownNameError,
    Window,
    attention,
)
from headway.backends.registry import NAMES

door = importlib.import_module("headway.attention")

pytestmark = pytest.mark.usefixtures("flex_uncompiled")

RUNNING = [
    pytest.param(device, backend, marks=pytest.mark.cuda if device == "cuda" else ())
    for device in DEVICES
    for backend in ("auto", *NAMES)
    if backend == "auto" or (ACCEPTS[TABLES[device]][backend].dtypes and installed(backend) and backend != "sage")
]
"""Backends that run something on a device that is here."""


def draw(
    *shape: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    learns: bool = False,
    kv_len: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one shape (batch, heads, length, size), of which k and v may be of another length."""
    batch, heads, length, size = shape
    lengths = (length, length if kv_len is None else kv_len, length if kv_len is None else kv_len)
    made = (
        Source(name).normal(batch, heads, n, size).to(device, dtype) for name, n in zip("qkv", lengths, strict=True)
    )
    q, k, v = (x.requires_grad_(learns) for x in made)
    return q, k, v


# -- no numbers at all ------------------------------------------------------------------------------------------------

EMPTY = {
    "no batch": ((0, 2, 5, 32), (0, 2, 5, 32)),
    "no heads": ((2, 0, 5, 32), (2, 0, 5, 32)),
    "no queries": ((2, 2, 0, 32), (2, 2, 5, 32)),
    "no keys": ((2, 2, 5, 32), (2, 2, 0, 32)),
    "neither": ((2, 2, 0, 32), (2, 2, 0, 32)),
}


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize(("device", "backend"), RUNNING)
def test_nothing_to_attend_to_gives_zeros(device: str, backend: str, sizes: tuple[Any, Any]) -> None:
    learns = not (backend == "flex" and device == "cpu")
    if backend == "torch-varlen":
        return  # it is for documents, and there are none
    q_shape, kv_shape = sizes
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=learns) for s in (q_shape, kv_shape, kv_shape))
    out = attention(q, k, v, backend=backend)
    assert out.shape == q.shape
    assert not out.any()
    if learns:
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(not g.any() and g.shape == x.shape for g, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize(
    "mask", [Causal("lower-right"), Padding([0, 0]), Bias(torch.zeros(2, 1, 5, 0)), Window(1, 1, "upper-left")]
)
def test_no_keys_under_a_mask(mask: Mask, device: str) -> None:
    q, k, v = draw(2, 2, 5, 16, kv_len=0, device=device)
    assert not attention(q, k, v, mask=mask if not isinstance(mask, Bias) else Bias(mask.bias.to(device))).any()


def test_the_lse_of_no_keys_is_minus_infinity_or_the_sink(device: str) -> None:
    q, k, v = draw(2, 2, 5, 16, kv_len=0, device=device)
    sinks = torch.tensor([1.5, -2.0], device=device)
    _, lse = attention(q, k, v, return_lse=True)
    assert bool(lse.isneginf().all())
    _, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    torch.testing.assert_close(lse, sinks[:, None].expand(2, 2, 5))


@pytest.mark.parametrize("kv_len", [5, 0])
def test_all_that_learns_gets_a_gradient_even_where_there_is_nothing(kv_len: int, device: str) -> None:
    q, k, v = draw(2, 2, 0 if kv_len else 5, 16, kv_len=kv_len, device=device, learns=True)
    bias = torch.zeros(q.shape[2], kv_len, device=device, requires_grad=True)
    sinks = torch.zeros(2, device=device, requires_grad=True)
    out = attention(q, k, v, mask=Bias(bias), sinks=sinks)
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias, sinks))
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (1, 1, 1, 1), (1, 3, 1, 8), (3, 1, 2, 16)], ids=str)
@pytest.mark.parametrize(("device", "backend"), RUNNING)
def test_ones(device: str, backend: str, shape: tuple[int, ...]) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if (device, backend) == ("cuda", "flex"):
        return  # compiling four shapes; tests/test_agreement.py has its lengths of 1
    call = Call(*draw(*shape, device=device, dtype=dtype))
    try:
        check(call, backend, learns=False)
    except NoBackendError:
        assert backend not in ("auto", "reference", "sdpa-math")


# -- rows that see nothing --------------------------------------------------------------------------------------------

BLIND: dict[str, Callable[[str], Mask]] = {
    "causal, more queries than keys": lambda device: Causal("lower-right"),
    "window past the keys": lambda device: Window(1, 1, "upper-left"),
    "padding of nothing": lambda device: Padding([0, 9]),
    "dense": lambda device: Dense(torch.zeros(12, 9, dtype=torch.bool, device=device)),
    "-inf": lambda device: Bias(torch.full((12, 9), float("-inf"), device=device)),
    "an empty document": lambda device: Documents([6, 6], [9, 0]),
}


@pytest.mark.parametrize("mask", BLIND.values(), ids=BLIND)
@pytest.mark.parametrize(("device", "backend"), RUNNING)
def test_rows_that_see_nothing_are_exactly_zero(device: str, backend: str, mask: Callable[[str], Mask]) -> None:
    """The judge checks exactness; here no backend may get out of it but by refusing."""
    if (device, backend) == ("cuda", "flex"):
        return  # tests/test_agreement.py has these, compiled
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    learns = not (backend == "flex" and device == "cpu")
    call = Call(*draw(2, 2, 12, 16, kv_len=9, device=device, dtype=dtype, learns=learns), mask=mask(device))
    try:
        check(call, backend, learns=learns)
    except NoBackendError:
        assert backend not in ("auto", "reference", "sdpa-math")


def test_the_smallest_number_is_a_number_and_minus_infinity_blocks(device: str) -> None:
    """`finfo.min` in every place of a row makes the mean of v, as softmax says; -inf makes nothing."""
    q, k, v = draw(1, 1, 4, 16, device=device)
    lowest = torch.full((4, 4), torch.finfo(torch.float32).min, device=device)
    out = attention(q, k, v, mask=Bias(lowest), backend="reference")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))
    assert not attention(q, k, v, mask=Bias(lowest * float("inf")), backend="reference").any()
    assert not attention(q, k, v, mask=headway.masks.from_transformers(lowest[None, None])).any()


# -- calls that make no sense -----------------------------------------------------------------------------------------


def bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    """What must be said, and the call it is said of. All start from a call that is right."""
    q, k, v = draw(2, 4, 6, 16)
    return {
        "three axes": (
            r"got q \[4, 6, 16\].*; takes \(batch, heads.*unsqueeze\(0\) adds a batch",
            lambda: attention(q[0], k[0], v[0]),
        ),
        "five axes": (r"got q \[1, 2.*takes", lambda: attention(q[None], k[None], v[None])),
        "two dtypes": (
            r"got q torch.float32, k torch.float16.*takes one .*x.to\(dtype\)",
            lambda: attention(q, k.half(), v),
        ),
        "integers": (
            r"got q torch.int32.*takes one floating-point dtype",
            lambda: attention(q.int(), k.int(), v.int()),
        ),
        "complex": (r"got q torch.complex64.*takes", lambda: attention(q + 0j, k + 0j, v + 0j)),
        "features of size 0": (
            r"got q \[2, 4, 6, 0\].*takes a head_dim of 1",
            lambda: attention(q[..., :0], k[..., :0], v),
        ),
        "two batches": (r"got .*takes one batch for all", lambda: attention(q, k[:1], v[:1])),
        "v of another batch": (r"got .*takes one batch for all", lambda: attention(q, k, v[:1])),
        "two head sizes": (r"got .*one head_dim for q and k", lambda: attention(q, k[..., :8], v)),
        "two lengths in k and v": (r"got .*same heads and keys in k and v", lambda: attention(q, k, v[:, :, :3])),
        "two heads in k and v": (r"got .*same heads and keys in k and v", lambda: attention(q, k, v[:, :2])),
        "heads that do not share": (
            r"got 4 query heads and 3 key heads; takes",
            lambda: attention(q, k[:, :3], v[:, :3]),
        ),
        "more key heads": (r"got 2 query heads and 4 key heads; takes", lambda: attention(q[:, :2], k, v)),
        "no key heads": (r"got 4 query heads and 0 key heads; takes", lambda: attention(q, k[:, :0], v[:, :0])),
        "dropout of 1": (r"got dropout=1.0; takes a share", lambda: attention(q, k, v, dropout=1.0)),
        "dropout below 0": (r"got dropout=-0.1; takes a share", lambda: attention(q, k, v, dropout=-0.1)),
        "dropout nan": (r"got dropout=nan; takes a share", lambda: attention(q, k, v, dropout=float("nan"))),
        "softcap of 0": (r"got softcap=0.0; takes a positive", lambda: attention(q, k, v, softcap=0.0)),
        "softcap below 0": (r"got softcap=-1.0; takes a positive", lambda: attention(q, k, v, softcap=-1.0)),
        "softcap nan": (r"got softcap=nan; takes a positive", lambda: attention(q, k, v, softcap=float("nan"))),
        "softcap inf": (r"got softcap=inf; takes a positive", lambda: attention(q, k, v, softcap=float("inf"))),
        "scale nan": (r"got scale=nan; takes", lambda: attention(q, k, v, scale=float("nan"))),
        "scale inf": (r"got scale=inf; takes", lambda: attention(q, k, v, scale=float("inf"))),
        "sinks too few": (
            r"got sinks \[2\].*takes one logit per query head",
            lambda: attention(q, k, v, sinks=torch.ones(2)),
        ),
        "sinks of two axes": (r"got sinks \[1, 4\].*takes one", lambda: attention(q, k, v, sinks=torch.ones(1, 4))),
        "a tensor for a mask": (
            r"got a mask of type Tensor; takes a typed mask: headway.masks.from_sdpa.*from_key_padding_mask",
            lambda: attention(q, k, v, torch.ones(6, 6, dtype=torch.bool)),
        ),
        "a string for a mask": (
            r"got a mask of type str; takes a typed mask: headway.Causal\(\)",
            lambda: attention(q, k, v, "causal"),
        ),
        "a class for a mask": (
            r"got a mask of type \w+; takes a typed mask: Causal\(\), with parentheses",
            lambda: attention(q, k, v, Causal),
        ),
        "another device": (r"got q on cpu, k on meta.*takes one device: move", lambda: attention(q, k.to("meta"), v)),
    }


@pytest.mark.parametrize("warm", [False, True], ids=["first", "after a call that was right"])
@pytest.mark.parametrize("name", bad_calls())
def test_a_call_that_makes_no_sense_says_so(name: str, warm: bool) -> None:
    """Whatever was called before: nothing remembered may let it pass."""
    said, call = bad_calls()[name]
    if warm:
        q, k, v = draw(2, 4, 6, 16)
        attention(q, k, v)
        attention(q, k, v, dropout=0.5)
        attention(q, k, v, softcap=2.0)
        attention(q, k, v, sinks=torch.ones(4))
        attention(q, k, v, scale=-1.0)
    with pytest.raises(RequestError, match=f"(?s){said}"):
        call()


@pytest.mark.parametrize("name", bad_calls())
def test_explain_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, call = bad_calls()[name]
    monkeypatch.setitem(call.__globals__, "attention", headway.explain)  # type: ignore[attr-defined]  # a function
    with pytest.raises(RequestError, match=f"(?s){said}"):
        call()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Causal(), "pass align='upper-left'.*or align='lower-right'"),
        (Documents([3, 4]), "documents of 7 tokens"),
        (Padding([1, 2, 3]), "padding for 3 batch entries, takes"),
        (Padding([99, 1]), "a length of 99, takes at most"),
        (Dense(torch.ones(3, 3, dtype=torch.bool)), "takes 1 or"),
        (Bias(torch.ones(7, 6, 9)), "takes 1 or"),
    ],
    ids=repr,
)
def test_a_mask_that_does_not_fit_says_so(mask: Mask, said: str) -> None:
    q, k, v = draw(2, 4, 6, 16, kv_len=9)
    for _ in range(2):
        with pytest.raises(MaskError, match=f"(?s){said}"):
            attention(q, k, v, mask=mask)


def test_a_mask_fits_one_shape_and_not_the_next() -> None:
    mask = Documents([3, 4])
    attention(*draw(1, 1, 7, 8), mask=mask)
    with pytest.raises(MaskError, match="documents of 7 tokens"):
        attention(*draw(1, 1, 8, 8), mask=mask)


def test_errors_are_one_tree() -> None:
    for name in ("MaskError", "NoBackendError", "RecompileBudgetError", "RequestError", "UnknownNameError"):
        assert issubclass(getattr(headway, name), HeadwayError)
    assert issubclass(RequestError, ValueError)
    assert issubclass(NoBackendError, RuntimeError)


# -- which backend ----------------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_an_error() -> None:
    for call in (attention, headway.explain):
        with pytest.raises(UnknownNameError, match="unknown backend 'flash5'; known: auto, flash2, flash3"):
            call(*draw(1, 1, 4, 16), backend="flash5")


def test_the_environment_decides_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(1, 1, 4, 16)
    monkeypatch.setenv("HEADWAY_BACKEND", "reference")
    assert headway.explain(q, k, v).chosen.name == "reference"
    assert headway.explain(q, k, v, backend="sdpa-math").chosen.name == "sdpa-math"
    monkeypatch.setenv("HEADWAY_BACKEND", "flash2")
    with pytest.raises(NoBackendError, match="flash2 was asked for by name"):
        attention(q, k, v)
    attention(q, k, v, backend="sdpa-math")


@pytest.mark.parametrize("name", ["auto", ""])
def test_the_environment_may_say_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", name)
    assert headway.explain(*draw(1, 1, 4, 16)).chosen.name != "reference"


def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "flash_attention_2")
    for call in (attention, headway.explain):
        with pytest.raises(
            UnknownNameError, match=r"'flash_attention_2' \(from the environment variable HEADWAY_BACKEND"
        ):
            call(*draw(1, 1, 4, 16))
    attention(*draw(1, 1, 4, 16), backend="reference")


def test_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made before must not hide a name set since."""
    q, k, v = draw(1, 1, 4, 16)
    attention(q, k, v)
    monkeypatch.setenv("HEADWAY_BACKEND", "flash2")
    with pytest.raises(NoBackendError):
        attention(q, k, v)


def test_a_name_never_falls_back(device: str) -> None:
    """What `auto` would gladly run elsewhere is refused under a name that does not take it, with every reason."""
    q, k, v = draw(1, 1, 4, 16, device=device)
    with pytest.raises(NoBackendError) as refusal:
        attention(q, k, v, softcap=2.0, scale=-1.0, backend="sdpa-flash")
    text = str(refusal.value)
    assert "sdpa-flash was asked for by name" in text
    assert "softcap" in text
    assert "scale" in text
    assert "also" not in text


def test_auto_says_why_and_why_not(device: str) -> None:
    text = str(headway.explain(*draw(1, 1, 4, 16, device=device), softcap=2.0))
    assert re.search("asked +batch 1, heads 1, length 4, head_dim 16", text)
    assert "softcap" in text
    for name in NAMES:
        assert name in text


def test_nothing_is_computed_by_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    import headway.backends.reference as reference

    monkeypatch.setattr(reference, "attend", None)
    monkeypatch.setattr(reference, "lower", None)
    assert headway.explain(*draw(1, 1, 4, 16), mask=Causal(), backend="reference").chosen is not None


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "backend"), RUNNING)
def test_shapes_and_dtypes_of_answers(device: str, backend: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = draw(2, 4, 10, 32, kv_len=10, device=device, dtype=dtype)
    mask = Causal() if backend == "sdpa-flash" else Documents([4, 6])
    out = attention(q, k[:, :2], v[:, :2], mask=mask, backend=backend)
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
    try:
        out, lse = attention(q, k[:, :2], v[:, :2], mask=mask, backend=backend, return_lse=True)
    except NoBackendError:
        return
    assert (lse.shape, lse.dtype, lse.device) == (q.shape[:3], torch.float32, q.device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_lse_is_the_log_of_the_denominator(dtype: torch.dtype, device: str) -> None:
    q, k, v = draw(2, 2, 10, 16, device=device, dtype=dtype)
    _, lse = attention(q, k, v, mask=Causal(), return_lse=True, scale=0.3)
    scores = (q.double() @ k.double().transpose(-1, -2)) * 0.3
    scores = scores.masked_fill(~torch.ones(10, 10, dtype=torch.bool, device=device).tril(), float("-inf"))
    close = 1e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=close, atol=close)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_heads_that_share_keys_are_neighbours(device: str) -> None:
    """Query heads 0 and 1 use key head 0, 2 and 3 use key head 1, as `repeat_interleave` lays them."""
    q, k, v = draw(1, 4, 6, 16, device=device)
    k, v = k[:, :2], v[:, :2]
    apart = attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(attention(q, k, v), apart, rtol=1e-4, atol=1e-4)


def test_the_mask_is_the_fourth_argument_and_the_rest_have_names() -> None:
    parameters = list(inspect.signature(attention).parameters.values())
    assert [p.name for p in parameters[:4]] == ["q", "k", "v", "mask"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[4:])


def test_inputs_are_left_as_they_were(device: str) -> None:
    q, k, v = draw(1, 2, 9, 16, device=device)
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    before = [(x.clone(), x.stride(), x._version) for x in (q, k, v)]
    attention(q, k, v, mask=Causal(), sinks=torch.ones(2, device=device))
    for x, (value, stride, version) in zip((q, k, v), before, strict=True):
        assert torch.equal(x, value)
        assert (x.stride(), x._version) == (stride, version)


def test_a_refusal_inside_a_transform_names_the_real_lengths() -> None:
    q, k, v = draw(2, 2, 9, 16, kv_len=9)
    with pytest.raises(NoBackendError, match=r"heads 2, length 9,"):
        torch.func.vmap(lambda q, k, v: attention(q[None], k[None], v[None], backend="sdpa-flash")[0])(
            q[:, None].squeeze(1), k, v
        )


def test_values_of_nothing_have_no_lse() -> None:
    """They gave -inf for rows that see keys."""
    q, k, _ = draw(1, 2, 3, 8)
    assert attention(q, k, k[..., :0]).shape == (1, 2, 3, 0)
    with pytest.raises(RequestError, match="values of size 0 with return_lse"):
        attention(q, k, k[..., :0], return_lse=True)


def test_nested_tensors_and_a_scale_that_learns_are_refused_in_words() -> None:
    q, k, v = draw(1, 2, 3, 8)
    with pytest.raises(RequestError, match=r"multiply q by it"):
        attention(q, k, v, scale=torch.tensor(1.0))  # type: ignore[call-overload]
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 8)], layout=torch.jagged)
    with pytest.raises(RequestError, match=r"got nested tensors.*Documents"):
        attention(nested, k, v)


def test_explain_decides_as_attention_does() -> None:
    """Under autocast by its dtype, and by the class of the lengths."""
    q, k, v = draw(1, 2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert headway.explain(q, k, v, require=("float32",)).chosen is None
        with pytest.raises(NoBackendError):
            attention(q, k, v, require=("float32",))
    assert "length 9," in str(headway.explain(q, k, v))


def test_a_growing_cache_outlives_the_budget_of_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under auto the next backend takes over, with a warning; by name it raises."""
    from headway.backends import flex

    def spent(*_: object) -> None:
        raise RecompileBudgetError("flex attention would be compiled for the 17th time")

    monkeypatch.setattr(flex, "attend", spent)
    monkeypatch.setattr("headway.choice.choose._tier", lambda backend, machine: backend.name != "flex")
    door._choose.cache_clear()
    q, k, v = draw(1, 2, 9, 32)
    try:
        assert headway.explain(q, k, v, softcap=3.0).chosen.name == "flex"  # type: ignore[union-attr]
        with pytest.warns(RuntimeWarning, match=r"17th time.*auto takes reference"):
            check(Call(q, k, v, softcap=3.0))
        check(Call(q, k, v, softcap=3.0))
        with pytest.raises(RecompileBudgetError):
            attention(q, k, v, softcap=3.0, backend="flex")
    finally:
        door._choose.cache_clear()


def test_what_is_no_tensor_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RequestError, match=r"got q Tensor, k ndarray, v list; takes tensors: torch.as_tensor\(x\)"):
        attention(q, q.numpy(), q.tolist())  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_jit_trace_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RequestError, match=r"got a call inside torch.jit.trace.*undo the swap first"):
        torch.jit.trace(lambda q: attention(q, q, q), q)
