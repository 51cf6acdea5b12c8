"""What a call remembers and what it leaves alone: plans, lowered masks, threads, flags, modes, tensor types."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from agreement import Call, check
from test_attention import draw
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waiting import no_waiting

import headway
from headway import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    HeadwayError,
    Mask,
    Padding,
    Predicate,
    Prefix,
    Window,
    attention,
)
from headway.backends import reference, sdpa_flash, sdpa_math

door = importlib.import_module("headway.attention")  # the name `headway.attention` is the function
RUNNING_ON_CPU = {"reference": reference, "sdpa-math": sdpa_math, "sdpa-flash": sdpa_flash}

# -- masks between calls ----------------------------------------------------------------------------------------------


@pytest.fixture
def lowerings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A record of each time a mask is lowered for a backend that runs on CPU."""
    record: list[Any] = []
    for module in RUNNING_ON_CPU.values():
        lower = module.lower
        monkeypatch.setattr(
            module, "lower", lambda mask, *rest, lower=lower: (record.append(mask), lower(mask, *rest))[1]
        )
    return record


@pytest.mark.parametrize("mask", [Padding([9, 4]), Documents([3, 6]), Causal() & Padding([9, 4])], ids=repr)
@pytest.mark.parametrize("backend", RUNNING_ON_CPU)
def test_layers_that_share_a_mask_lower_it_once(backend: str, mask: Mask, lowerings: list[Any]) -> None:
    q, k, v = draw(2, 2, 9, 16)
    for _ in range(12):
        q = attention(q, k, v, mask=mask, backend=backend)
    assert len(lowerings) == 1


@pytest.mark.parametrize("backend", RUNNING_ON_CPU)
def test_equal_plain_masks_are_one(backend: str, lowerings: list[Any]) -> None:
    q, k, v = draw(2, 2, 9, 16)
    for _ in range(3):
        attention(q, k, v, mask=Causal() & Window(left=4), backend=backend)
    assert len(lowerings) == 1


CHANGES: dict[str, Callable[[], tuple[Mask, Callable[[], Any]]]] = {}


def change(make: Callable[[], tuple[Mask, Callable[[], Any]]]) -> Callable[[], tuple[Mask, Callable[[], Any]]]:
    CHANGES[make.__name__] = make
    return make


@change
def dense() -> tuple[Mask, Callable[[], Any]]:
    may = torch.ones(9, 9, dtype=torch.bool)
    return Dense(may), lambda: may[:, 4:].zero_()


@change
def bias() -> tuple[Mask, Callable[[], Any]]:
    added = torch.zeros(9, 9)
    return Bias(added), lambda: added[:, 4:].fill_(float("-inf"))


@change
def padding_lengths() -> tuple[Mask, Callable[[], Any]]:
    lengths = torch.tensor([9, 9])
    return Padding(lengths), lambda: lengths.fill_(4)


@change
def padding_bool() -> tuple[Mask, Callable[[], Any]]:
    real = torch.ones(2, 9, dtype=torch.bool)
    return Padding(real), lambda: real[:, 4:].zero_()


@change
def prefix() -> tuple[Mask, Callable[[], Any]]:
    n = torch.tensor([9, 9])
    return Prefix(n) & Causal("upper-left"), lambda: n.fill_(2)


@change
def inside_a_join() -> tuple[Mask, Callable[[], Any]]:
    may = torch.ones(9, 9, dtype=torch.bool)
    return ~Dense(may) | Causal(), lambda: may[:, 4:].zero_()


@change
def captured_by_a_predicate() -> tuple[Mask, Callable[[], Any]]:
    last = torch.tensor(9)
    return Predicate(lambda b, h, q, k: k < last), lambda: last.fill_(4)


@change
def held_by_a_callable_object() -> tuple[Mask, Callable[[], Any]]:
    class Below:
        def __init__(self) -> None:
            self.last = torch.tensor(9)

        def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k < self.last

    rule = Below()
    return Predicate(rule), lambda: rule.last.fill_(4)


@change
def through_a_view() -> tuple[Mask, Callable[[], Any]]:
    store = torch.ones(2, 9, 9, dtype=torch.bool)
    return Dense(store[0]), lambda: store[:, :, 4:].zero_()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("backend", ["auto", *RUNNING_ON_CPU])
def test_a_change_of_a_mask_s_tensor_in_place_is_seen(backend: str, name: str) -> None:
    """Or the mask is refused: never an answer by the old one."""
    try:
        mask, happens = CHANGES[name]()
    except HeadwayError:
        return
    call = Call(*draw(2, 2, 9, 16), mask=mask)
    check(call, backend)
    happens()
    check(call, backend)


def test_a_mask_first_used_in_inference_can_train() -> None:
    for backend in RUNNING_ON_CPU:
        for mask in (Padding([9, 4]), Causal() & Window(left=3), Documents([3, 6])):
            with torch.inference_mode():
                attention(*draw(2, 2, 9, 16), mask=mask, backend=backend)
            check(Call(*draw(2, 2, 9, 16, learns=True), mask=mask), backend)


def test_a_mask_first_used_without_gradients_learns() -> None:
    added = torch.zeros(9, 9, requires_grad=True)
    mask = Bias(added)
    with torch.no_grad():
        attention(*draw(2, 2, 9, 16), mask=mask)
    assert torch.autograd.grad(attention(*draw(2, 2, 9, 16), mask=mask).square().sum(), added)[0].any()
    with torch.inference_mode():
        attention(*draw(2, 2, 9, 16), mask=mask)
    added.requires_grad_(False)
    attention(*draw(2, 2, 9, 16), mask=mask)


def test_a_mask_learns_step_after_step() -> None:
    """No graph of the last step is kept."""
    added = nn.Parameter(torch.zeros(9, 9))
    mask, optimizer = Bias(added) & Causal(), torch.optim.SGD([added], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        attention(*draw(2, 2, 9, 16), mask=mask).square().sum().backward()
        optimizer.step()
    check(Call(*draw(2, 2, 9, 16), mask=mask))


def test_a_mask_made_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        mask = Padding(torch.tensor([9, 4]))
    check(Call(*draw(2, 2, 9, 16), mask=mask), learns=False)


def test_a_mask_is_let_go() -> None:
    mask = Padding(torch.tensor([9, 4]))
    attention(*draw(2, 2, 9, 16), mask=mask)
    gone = weakref.ref(mask.tensors[0])
    del mask
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mask", [Causal(), Padding([9, 4]), Causal() & Documents([3, 6]), ~Window(1, 1)], ids=repr)
def test_a_used_mask_copies_and_pickles(mask: Mask) -> None:
    known = attention(*draw(2, 2, 9, 16), mask=mask)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        torch.testing.assert_close(attention(*draw(2, 2, 9, 16), mask=other), known)


def test_one_mask_serves_several_shapes_and_dtypes() -> None:
    mask = Causal("lower-right") & Window(4, 0, "lower-right")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for lengths in ((9, 9), (5, 9), (9, 5), (1, 9)):
            for batch in (1, 2):
                q, k, v = draw(batch, 2, lengths[0], 16, kv_len=lengths[1], dtype=dtype)
                check(Call(q, k, v, mask=mask))


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_made_once_for_a_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plan = door._plan
    monkeypatch.setattr(door, "_plan", lambda *a: (made.append(1), plan(*a))[1])
    for scale in (0.1, 0.2, 0.3):
        attention(*draw(2, 2, 9, 16), mask=Causal(), scale=scale)
    assert len(made) == 1


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "causal": {"mask": Causal()},
    "padding": {"mask": Padding([9, 4])},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.7},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, 2.0])},
    "other sinks": {"sinks": torch.tensor([2.5, 0.0])},
    "lse": {"return_lse": True},
    "deterministic": {"require": ("deterministic",)},
}


def test_calls_that_differ_do_not_share_a_plan() -> None:
    """All variants in turn, twice over, with and without gradients, views and plain tensors: each by its own plan."""
    for _ in range(2):
        for options in VARIANTS.values():
            for learns in (True, False):
                q, k, v = draw(2, 2, 9, 16, learns=learns)
                check(Call(q, k, v, **options), learns=learns)
                q, k, v = (
                    x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(learns) for x in (q, k, v)
                )
                check(Call(q, k, v, **options), learns=learns)


def test_learnt_sinks_after_the_same_call_without_gradients() -> None:
    q, k, v = draw(2, 2, 9, 16)
    sinks = torch.tensor([0.5, 2.0], requires_grad=True)
    with torch.no_grad():
        attention(q, k, v, sinks=sinks)
    check(Call(q, k, v, sinks=sinks))
    chosen = headway.explain(q, k, v, sinks=sinks)
    assert chosen.request.needs_grad


def test_many_kinds_of_call_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door._Plans, "most", 8)
    for length in range(1, 30):
        attention(*draw(1, 1, length, 16), mask=Causal())
    assert len(door._PLANS) <= 8


def test_eight_threads_calling_at_once() -> None:
    masks = [None, Causal(), Padding([3, 2]), Window(2, 2)]

    def work(i: int) -> tuple[Tensor, Tensor]:
        length = 3 + i % 11
        q, k, v = draw(2, 2, length, 16, learns=i % 2 == 0)
        mask = masks[i % 4]
        return attention(q, k, v, mask=mask), attention(q, k, v, mask=mask, backend="reference")

    with ThreadPoolExecutor(8) as pool:
        for out, known in pool.map(work, range(200)):
            torch.testing.assert_close(out, known, rtol=1e-4, atol=1e-5)


# -- settings of the process ------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "reduced precision": cuda.fp16_bf16_reduction_math_sdp_allowed(),
        "matmul": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "sdpa": nn.functional.scaled_dot_product_attention,
    }


@pytest.mark.usefixtures("flex_uncompiled")
def test_no_setting_of_the_process_changes(device: str) -> None:
    before = settings()
    for options in VARIANTS.values():
        if "sinks" in options:
            options = options | {"sinks": options["sinks"].to(device)}
        for backend in ("auto", "reference", "sdpa-math", "sdpa-flash"):
            try:
                attention(*draw(2, 2, 9, 16, device=device, learns=True), backend=backend, **options)
            except HeadwayError:
                continue
    assert settings() == before


@pytest.mark.parametrize("off", ["flash", "mem_efficient", "math", "cudnn"])
def test_flags_of_others_do_not_reach_a_named_backend(off: str) -> None:
    """Another library may have switched a kernel of SDPA off for the process; what is named here runs, and right."""
    switch = getattr(torch.backends.cuda, f"enable_{off}_sdp")
    switch(False)
    try:
        for backend in RUNNING_ON_CPU:
            check(Call(*draw(2, 2, 9, 16, learns=True), mask=Causal()), backend)
    finally:
        switch(True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(device: str) -> None:
    grads = []
    for _ in range(2):
        q, k, v = draw(2, 2, 65, 32, device=device, learns=True)
        out = attention(q, k, v, mask=Causal(), require=("deterministic",))
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_switching_determinism_on_makes_another_plan() -> None:
    call = Call(*draw(2, 2, 9, 16, learns=True), mask=Causal())
    check(call)
    torch.use_deterministic_algorithms(True)
    try:
        check(call)
    finally:
        torch.use_deterministic_algorithms(False)


SEEN_ON_CUDA: dict[str, Callable[[], Mask | None]] = {
    "none": lambda: None,
    "causal": Causal,
    "window": lambda: Window(2, 2),
    "padding": lambda: Padding(torch.tensor([64, 9], device="cuda")),
    "documents": lambda: Documents([30, 34]) & Causal(),
    "dense": lambda: Dense(torch.ones(64, 64, dtype=torch.bool, device="cuda")),
    "bias": lambda: Bias(torch.zeros(64, 64, device="cuda")),
}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SEEN_ON_CUDA)
def test_nothing_waits_for_the_device(name: str) -> None:
    """Once a kind of call is known: with a mask that has been met, and with one just made."""
    q, k, v = draw(2, 2, 64, 64, device="cuda", dtype=torch.bfloat16, learns=True)
    mask, new = SEEN_ON_CUDA[name](), SEEN_ON_CUDA[name]()
    attention(q, k, v, mask=mask, scale=0.1).sum().backward()
    with no_waiting():
        for one in (mask, new):
            attention(q, k, v, mask=one, scale=0.2).sum().backward()


# -- autocast, inference, kinds of tensor -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype: torch.dtype, device: str) -> None:
    q, k, v = draw(2, 2, 9, 16, device=device, learns=True)
    with torch.autocast(device, dtype):
        out = attention(q, k.to(dtype), v, mask=Causal())
    assert out.dtype == dtype
    check_like = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask=Causal())
    torch.testing.assert_close(out, check_like)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_autocast_leaves_float64_alone(device: str) -> None:
    q, k, v = draw(2, 2, 9, 16, device=device, dtype=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        out = attention(q, k, v, mask=Causal(), sinks=torch.zeros(2, device=device))
    assert out.dtype == torch.float64
    check(Call(q, k, v, mask=Causal()))


def test_autocast_off_inside_autocast_is_off(device: str) -> None:
    q, k, v = draw(2, 2, 9, 16, device=device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert attention(q, k, v).dtype == torch.float32


def test_autocast_of_another_device_changes_nothing() -> None:
    q, k, v = draw(2, 2, 9, 16)
    if torch.cuda.is_available():
        with torch.autocast("cuda", torch.bfloat16):
            assert attention(q, k, v).dtype == torch.float32


def test_autocast_honours_every_argument(device: str) -> None:
    q, k, v = draw(2, 2, 9, 16, device=device)
    sinks, half = torch.tensor([0.5, 2.0], device=device), [x.bfloat16() for x in (q, k, v)]
    options = {
        "mask": Causal(),
        "scale": 0.3,
        "softcap": 2.0,
        "sinks": sinks,
        "return_lse": True,
        "backend": "reference",
    }
    with torch.autocast(device, torch.bfloat16):
        got = attention(q, k, v, **options)
        with pytest.raises(HeadwayError, match="require maps"):
            attention(q, k, v, backend="sdpa-math", require=("maps",))
    for one, other in zip(got, attention(*half, **options), strict=True):
        torch.testing.assert_close(one, other)


def test_inference_mode(device: str) -> None:
    with torch.inference_mode():
        for mask in (None, Causal(), Padding([9, 4])):
            check(Call(*draw(2, 2, 9, 16, device=device), mask=mask), learns=False)


def test_parameters_are_inputs_as_good_as_any(device: str) -> None:
    q, k, v = (nn.Parameter(x) for x in draw(2, 2, 9, 16, device=device))
    for mask in (None, Causal(), Padding([9, 4])):
        check(Call(q, k, v, mask=mask))
        check(Call(q.detach(), k, v.detach(), mask=mask))
    assert len(door._PLANS) > 0, "planned once, as for any tensor"


class Tagged(Tensor):
    """A subclass that changes nothing."""


def test_a_tensor_subclass_computes_the_same(device: str) -> None:
    q, k, v = draw(2, 2, 9, 16, device=device)
    known = attention(q, k, v, mask=Causal())
    got = attention(*(x.as_subclass(Tagged) for x in (q, k, v)), mask=Causal())
    torch.testing.assert_close(got.as_subclass(Tensor), known)
    mixed = attention(q.as_subclass(Tagged), k, v, mask=Padding([9, 4]))
    torch.testing.assert_close(mixed.as_subclass(Tensor), attention(q, k, v, mask=Padding([9, 4])))


@pytest.mark.parametrize("mask", [None, Causal(), Padding([9, 4])], ids=repr)
def test_fake_tensors_give_shapes(mask: Mask | None) -> None:
    q, k, v = draw(2, 2, 9, 16)
    attention(q, k, v, mask=mask)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        out = attention(*fakes, mask=mask)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    torch.testing.assert_close(
        attention(q, k, v, mask=mask), attention(q, k, v, mask=mask, backend="reference"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("warm", [False, True])
def test_meta_tensors_give_shapes_or_a_refusal(warm: bool) -> None:
    q, k, v = draw(2, 2, 9, 16)
    if warm:
        attention(q, k, v, mask=Causal())
    metas = [x.to("meta") for x in (q, k, v)]
    try:
        out = attention(*metas, mask=Causal())
    except HeadwayError:
        return
    assert out.shape == q.shape
    assert out.device.type == "meta"


def test_a_module_moves_to_another_dtype_and_back() -> None:
    q, k, v = draw(2, 2, 9, 16)
    mask = Padding([9, 4]) & Causal()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        check(Call(*(x.to(dtype) for x in (q, k, v)), mask=mask))


def test_lowered_masks_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that lives as long as a module keeps one lowering; plain masks keep no more than so many bytes in all."""
    alibi = Alibi(torch.tensor([0.5, 0.25]))
    for length in range(20, 40):
        q, k, v = draw(1, 2, length, 16)
        attention(q, k, v, mask=alibi)
    kept_now = [value for at, value in alibi.memo.items() if isinstance(at, tuple) and at[0] == "lowered"]
    assert len(kept_now) == 1
    monkeypatch.setattr(door._Plans, "most_bytes", 20_000)
    for length in range(40, 60):
        q, k, v = draw(1, 2, length, 16)
        attention(q, k, v, mask=Window(3))
        assert door._PLANS.bytes <= 20_000


def test_kept_tensors_do_not_come_out_of_a_transform() -> None:
    """One was kept that torch.func had wrapped; flex met it later, in another call."""
    from headway.masks import frame as frames

    frames._SCALARS.clear()
    q, k, v = draw(1, 2, 9, 32)
    documents = Documents([4, 5])
    torch.func.grad(lambda x: attention(x, k, v, mask=Window(left=3)).sum() + attention(x, k, v, mask=documents).sum())(
        q
    )
    kept_now = [*frames._SCALARS.values(), *documents.queries.memo.values()]
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for pair in kept_now for t in pair)


@pytest.mark.parametrize("guards", [True, False])
def test_a_plan_is_recalled_for_tensors_like_its_own_alone(guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guards:
        monkeypatch.setattr(door, "_TENSOR_GUARDS", None)  # another version of torch may not have them
    q, k, v = draw(2, 4, 9, 16)
    memory, few = draw(2, 4, 7, 16)[1:], draw(2, 2, 9, 16)[1:]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    learning = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    wide = [x.double() for x in (q, k, v)]
    kinds = [(q, k, v), (q, q, q), (q, k, k), (q, *memory), (q, *few), strided, learning, wide]
    for _ in range(3):  # each after each other
        for some in kinds:
            for mask in (None, Padding([some[1].shape[2], 4])):
                check(Call(*some, mask=mask), learns=False)
                assert attention(*some, mask=mask).requires_grad == (some is learning)
                with torch.no_grad():
                    assert not attention(*some, mask=mask).requires_grad


def test_a_call_like_the_last_makes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds in turns, as self- and cross-attention are; a key of all they are is most of a call's own time."""
    q, k, v = draw(1, 2, 9, 16)
    memory = draw(1, 2, 7, 16)[1:]
    for some in ((q, k, v), (q, *memory)):
        attention(*some, mask=None)
    monkeypatch.setattr(door._Plans, "recall", lambda *_: pytest.fail("looked for by key"))
    for _ in range(2):
        attention(q, k, v)
        attention(q, *memory)


def test_what_a_cuda_graph_records_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "is_recorded", lambda device: True)
    q, k, v = draw(1, 2, 9, 16)
    check(Call(q, k, v, mask=Window(2, 0)), learns=False)
    assert not door._PLANS
    assert not door._PLANS.recent
    held = Padding(torch.tensor([5]))
    check(Call(q, k, v, mask=held), learns=False)
    assert not [at for at in held.memo if isinstance(at, tuple) and at[0] == "lowered"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["sdpa-efficient", "sdpa-math", "sdpa-cudnn"])
def test_a_call_first_made_under_capture_does_not_poison_the_next(backend: str) -> None:
    q, k, v = (x.half() for x in draw(1, 2, 64, 32, device="cuda"))
    attention(q, k, v, backend=backend)  # a library may not be loaded under capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(q, k, v, Window(2, 0), backend=backend)
    check(Call(q, k, v, mask=Window(2, 0)), backend, learns=False)
