"""flash_attn's functions against their documentation in float64, forward and backward, over all that they take."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shims.flash_attn.truth import packed, rows
from torch import Tensor

from headway.errors import RequestError
from headway.sites import packed as packed_rows

interface = importlib.import_module("headway.shims.flash_attn.flash_attn_interface")

SIGNATURES = {
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_kvpacked_func": "q, kv",
    "flash_attn_func": "q, k, v",
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
}
"""What comes before the options, in flash-attn 2.8."""

OPTIONS_THERE = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
KVCACHE_THERE = {
    "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None,
    "cache_leftpad": None, "block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip
REQUIRED = inspect.Parameter.empty


def theirs(name: str) -> dict[str, Any]:
    if name == "flash_attn_with_kvcache":
        return {**dict.fromkeys(("q", "k_cache", "v_cache"), REQUIRED), **KVCACHE_THERE}
    pages = {"block_table": None} if name == "flash_attn_varlen_func" else {}
    return {**dict.fromkeys(SIGNATURES[name].split(", "), REQUIRED), **OPTIONS_THERE, **pages}


@pytest.mark.parametrize("name", [*SIGNATURES, "flash_attn_with_kvcache"])
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(interface, name)).parameters
    assert [(each.name, each.default) for each in parameters.values()] == list(theirs(name).items())
    assert {each.kind for each in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


# -- the whole space of options ---------------------------------------------------------------------------------------

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    f"{bound}, {score}": {**bounds, **scores}
    for (bound, bounds), (score, scores) in itertools.product(
        {
            "all": {},
            "causal": {"causal": True},
            "window": {"window_size": (2, 1)},
            "left": {"window_size": (1, -1)},
            "right": {"window_size": (-1, 0)},
            "own": {"window_size": (0, 0)},
            "causal window": {"causal": True, "window_size": (1, 4)},
            "wide": {"window_size": (99, 99)},
        }.items(),
        {
            "plain": {},
            "scale": {"softmax_scale": 0.3},
            "softcap": {"softcap": 1.5},
            "slopes": {"alibi_slopes": SLOPES},
            "all of them": {"softmax_scale": 0.7, "softcap": 2.0, "alibi_slopes": SLOPES},
        }.items(),
    )
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def compare(run: Callable[..., Any], right: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any) -> None:
    """Result, lse and all gradients."""
    out, lse, weights = run(*inputs, return_attn_probs=True, **options)
    wanted, wanted_lse = right(*inputs, **options)
    assert weights.numel() == 0
    assert not lse.requires_grad
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    toward = torch.randn_like(out)
    got, expected = (torch.autograd.grad((x * toward).sum(), inputs) for x in (out, wanted))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(run(*inputs, **options), wanted)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("q_len, kv_len", [(5, 5), (3, 6), (6, 3), (1, 4)])
def test_rows(q_len: int, kv_len: int, option: dict[str, Any]) -> None:
    q, k, v = draw(2, q_len, 4, 8), draw(2, kv_len, 2, 8), draw(2, kv_len, 2, 8)
    compare(interface.flash_attn_func, rows, (q, k, v), **option)


@pytest.mark.parametrize("option", [{}, {"causal": True, "alibi_slopes": torch.rand(2, 4, dtype=torch.float64)}])
def test_rows_that_share_a_tensor(option: dict[str, Any]) -> None:
    q, kv, qkv = draw(2, 3, 4, 8), draw(2, 5, 2, 2, 8), draw(2, 5, 3, 4, 8)
    compare(interface.flash_attn_kvpacked_func, lambda q, kv, **how: rows(q, *kv.unbind(2), **how), (q, kv), **option)
    compare(interface.flash_attn_qkvpacked_func, lambda qkv, **how: rows(*qkv.unbind(2), **how), (qkv,), **option)


RAGGED = {
    "one": ((4,), (4,)),
    "alike": ((3, 3, 3), (3, 3, 3)),
    "ragged": ((3, 0, 1, 5), (3, 0, 1, 5)),
    "cross": ((3, 0, 1, 5), (4, 2, 0, 2)),
    "cross of full rows": ((2, 2), (5, 5)),
    "fewer keys": ((5, 5, 5), (1, 0, 3)),
    "one long among short": ((1, 1, 14, 1, 1), (1, 1, 14, 1, 1)),
    "nothing": ((0, 0), (0, 0)),
    "no keys": ((2, 1), (0, 0)),
}


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def of_lengths(
    name: str, lengths: tuple[int, ...], kv_lengths: tuple[int, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A packed function, and its truth, on operands alone."""
    cumulative = starts(lengths), starts(kv_lengths), max(lengths), max(kv_lengths) + 2  # a bound need not be tight
    function = getattr(interface, name)
    if "qkvpacked" in name:
        return (
            lambda qkv, **how: function(qkv, cumulative[0], cumulative[2], **how),
            lambda qkv, **how: packed(*qkv.unbind(1), lengths, kv_lengths, **how),
        )
    if "kvpacked" in name:
        return (
            lambda q, kv, **how: function(q, kv, *cumulative, **how),
            lambda q, kv, **how: packed(q, *kv.unbind(1), lengths, kv_lengths, **how),
        )
    return (
        lambda q, k, v, **how: function(q, k, v, *cumulative, **how),
        lambda q, k, v, **how: packed(q, k, v, lengths, kv_lengths, **how),
    )


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_packed(lengths: tuple[tuple[int, ...], tuple[int, ...]], option: dict[str, Any]) -> None:
    tokens, kv_tokens = map(sum, lengths)
    operands = draw(tokens, 4, 8), draw(kv_tokens, 2, 8), draw(kv_tokens, 2, 8)
    compare(*of_lengths("flash_attn_varlen_func", *lengths), operands, **option)


@pytest.mark.parametrize("option", [{}, {"causal": True, "alibi_slopes": torch.rand(4, 4, dtype=torch.float64)}])
def test_packed_that_share_a_tensor(option: dict[str, Any]) -> None:
    lengths = (3, 0, 1, 5)
    compare(*of_lengths("flash_attn_varlen_qkvpacked_func", lengths, lengths), (draw(9, 3, 4, 8),), **option)
    kv_lengths = (4, 2, 0, 2)
    operands = draw(9, 4, 8), draw(8, 2, 2, 8)
    compare(*of_lengths("flash_attn_varlen_kvpacked_func", lengths, kv_lengths), operands, **option)


@pytest.mark.parametrize("option", ["all, plain", "causal, plain", "window, slopes", "all, softcap"])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_packed_where_kernels_know_documents(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[tuple[int, ...], tuple[int, ...]], option: str
) -> None:
    """As on a GPU that has such kernels."""
    monkeypatch.setattr(packed_rows, "_kernels_know_documents", lambda q: True)
    test_packed(lengths, OPTIONS[option])


@pytest.mark.parametrize("option", ["all, plain", "causal, plain", "window, slopes", "all, all of them"])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_packed_by_size(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[tuple[int, ...], tuple[int, ...]], option: str
) -> None:
    """As where filler would cost much."""
    monkeypatch.setattr(packed_rows, "WORTH", 0)
    test_packed(lengths, OPTIONS[option])


def test_slopes_of_each_sequence_go_with_it_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "WORTH", 0)
    test_packed_that_share_a_tensor({"causal": True, "alibi_slopes": torch.rand(4, 4, dtype=torch.float64)})


def test_filler_is_less_than_half_of_the_work_and_no_sequence_is_looped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def note(site: Any, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        calls.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend_rows(site, q, k, *rest)

    attend_rows = packed_rows.attend_rows
    monkeypatch.setattr(packed_rows, "attend_rows", note)
    lengths = tuple(512 - i % 500 for i in range(3000))
    x = torch.zeros(sum(lengths), 1, 1)
    interface.flash_attn_varlen_func(x, x, x, starts(lengths), starts(lengths), 512, 512)
    assert len(calls) <= 10
    assert sum(calls) < 2 * sum(n * n for n in lengths)


def test_a_long_sequence_among_many_short_ones_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "put", lambda *_: pytest.fail("100 rows of 64 for 163 tokens"))
    lengths = (*[1] * 99, 64)
    run, right = of_lengths("flash_attn_varlen_func", lengths, lengths)
    x = draw(163, 2, 8)
    torch.testing.assert_close(run(x, x, x, causal=True), right(x, x, x, causal=True)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_come_back_and_weights_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A softmax of 4096 equal weights in bfloat16 would stop counting at 256."""
    q, k = torch.zeros(1, 2, 1, 8, dtype=dtype), torch.zeros(1, 4096, 1, 8, dtype=dtype)
    out = interface.flash_attn_func(q, k, torch.ones_like(k))
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.ones_like(q))


def test_head_sizes_that_flash_attn_pads_or_refuses() -> None:
    for head_dim in (1, 5, 300):
        q, k, v = draw(1, 3, 2, head_dim), draw(1, 4, 1, head_dim), draw(1, 4, 1, head_dim)
        compare(interface.flash_attn_func, rows, (q, k, v), causal=True)


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(64,), (50, 64)], ids=str)
def test_dropout_drops_weights_and_scales_the_others(lengths: tuple[int, ...]) -> None:
    """With equal scores and one-hot values the result is the weights themselves."""
    share, tokens, size = 0.3, sum(lengths), max(lengths)
    q = torch.zeros(tokens, 16, size)
    v = torch.cat([torch.eye(size)[:n] for n in lengths])[:, None].expand(-1, 16, -1).contiguous()
    run = lambda: interface.flash_attn_varlen_func(  # noqa: E731
        q, q, v, starts(lengths), starts(lengths), size, size, dropout_p=share
    )
    torch.manual_seed(7)
    weights = run()
    for part, n in zip(weights.split(lengths), lengths, strict=True):
        part = part[..., :n] * n * (1 - share)
        torch.testing.assert_close(part.round(), part, atol=1e-4, rtol=0)
        assert set(part.round().unique().tolist()) == {0.0, 1.0}
        assert abs((part == 0).double().mean().item() - share) < 5 * (share * (1 - share) / part.numel()) ** 0.5
    assert not torch.equal(run(), weights)
    torch.manual_seed(7)
    assert torch.equal(run(), weights)


def test_dropout_of_0_draws_nothing() -> None:
    q, state = draw(1, 3, 2, 8), torch.get_rng_state()
    interface.flash_attn_func(q, q, q, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, option",
    [
        (((3, 3), (3, 3)), "causal, slopes"),
        (((3, 0, 1, 5), (3, 0, 1, 5)), "all, plain"),
        (((3, 0, 1, 5), (3, 0, 1, 5)), "causal, plain"),
        (((3, 1), (4, 2)), "causal, slopes"),
    ],
    ids=str,
)
def test_one_graph(lengths: tuple[tuple[int, ...], tuple[int, ...]], option: str) -> None:
    run, right = of_lengths("flash_attn_varlen_func", *lengths)
    tokens, kv_tokens = map(sum, lengths)
    operands = draw(tokens, 4, 8), draw(kv_tokens, 2, 8), draw(kv_tokens, 2, 8)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, wanted = compiled(*operands, **OPTIONS[option]), right(*operands, **OPTIONS[option])[0]
    torch.testing.assert_close(out, wanted)
    got, expected = (torch.autograd.grad(x.square().sum(), operands) for x in (out, wanted))
    torch.testing.assert_close(got, expected)


def test_lengths_that_change_at_every_step_are_few_graphs() -> None:
    graphs: list[Any] = []
    torch.compiler.reset()
    run = torch.compile(
        lambda x, at, most: interface.flash_attn_varlen_func(x, x, x, at, at, most, most, causal=True),
        fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph,
    )  # fmt: skip
    steps = ((2, 7, 9), (3, 1), (1, 4, 4, 2, 8), (2, 6), (9, 1, 1, 5), (3, 4, 5), (7, 2), (1, 1, 3, 8))
    for lengths in steps:
        x = draw(sum(lengths), 2, 8)
        torch.testing.assert_close(
            run(x, starts(lengths), max(lengths)), packed(x, x, x, lengths, lengths, causal=True)[0]
        )
    assert len(graphs) <= 3


def test_a_graph_checks_lengths_when_it_runs() -> None:
    x = torch.randn(5, 2, 8)
    run = torch.compile(lambda x, at: interface.flash_attn_varlen_func(x, x, x, at, at, 3, 3), fullgraph=True)
    torch.testing.assert_close(run(x, starts((3, 2))), interface.flash_attn_varlen_func(
        x, x, x, starts((3, 2)), starts((3, 2)), 3, 3
    ))  # fmt: skip
    for wrong in ((1, 4), (2, 2), (3, 3)):
        with pytest.raises(RuntimeError, match="start at 0, never decrease, end at the number of tokens"):
            run(x, starts(wrong))


# -- what is refused --------------------------------------------------------------------------------------------------


def refused() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]]:
    q, k, five = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 3, 8), torch.randn(5, 2, 8)

    def lengths(at: Any, most: int = 5) -> tuple[str, tuple[Any, ...]]:
        at = torch.tensor(at, dtype=torch.int32) if isinstance(at, list) else at
        return "flash_attn_varlen_func", (five, five, five, at, at, most, most)

    return {
        "no leading 0": (*lengths([2, 5]), {}, "takes a 0 in front"),
        "too few": (*lengths([0, 2]), {}, "end at 2 for 5 tokens, takes lengths that add up"),
        "too many": (*lengths([0, 9], 9), {}, "end at 9 for 5 tokens"),
        "falling": (*lengths([0, 4, 2, 5]), {}, "fall from 4 to 2"),
        "int64": (*lengths(torch.tensor([0, 5])), {}, "takes int32 (sequences + 1,)"),
        "floats": (*lengths(torch.tensor([0.0, 5.0])), {}, "takes int32"),
        "2-D": (*lengths(torch.zeros(1, 2, dtype=torch.int32)), {}, "takes int32 (sequences + 1,)"),
        "no sequence": (*lengths([0]), {}, "takes int32 (sequences + 1,)"),
        "max_seqlen": (*lengths([0, 1, 5], 3), {}, "got max_seqlen 3 for a sequence of 4"),
        "sequences": (
            "flash_attn_varlen_func", (five, five, five, starts((5,)), starts((2, 3)), 5, 3), {},
            "of 1 sequences of queries and 2 of keys",
        ),
        "heads": ("flash_attn_func", (q, k, k), {}, "got 4 query heads and 3 key heads"),
        "axes": ("flash_attn_func", (five, five, five), {}, "(batch, length, heads, head_dim)"),
        "packed axes": (
            "flash_attn_varlen_func", (q, q, q, starts((3,)), starts((3,)), 3, 3), {}, "(tokens, heads, head_dim)"
        ),
        "qkv": ("flash_attn_qkvpacked_func", (q,), {}, "an axis of 3 before heads"),
        "batches": ("flash_attn_func", (q, *(torch.randn(2, 3, 4, 8),) * 2), {}, "takes one batch"),
        "dtypes": ("flash_attn_func", (q, q.half(), q.half()), {}, "takes one floating-point dtype"),
        "slopes": ("flash_attn_func", (q, q, q), {"alibi_slopes": torch.rand(3)}, "takes (4,) or (1, 4)"),
        "slopes of packed": (
            "flash_attn_varlen_func", (five, five, five, starts((2, 3)), starts((2, 3)), 3, 3),
            {"alibi_slopes": torch.rand(3, 2)}, "takes (2,) or (2, 2)",
        ),
        "dropout of all": ("flash_attn_func", (q, q, q), {"dropout_p": 1.0}, "from 0 to below 1"),
        "weights of dropout": (
            "flash_attn_func", (q, q, q), {"dropout_p": 0.5, "return_attn_probs": True}, "without dropout"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_what_cannot_be_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(packed_rows, "put", lambda *_: pytest.fail("work was done first"))
    name, args, kwargs, words = refused()[case]
    with pytest.raises(RequestError) as caught:
        getattr(interface, name)(*args, **kwargs)
    assert words in str(caught.value)
    assert "takes" in str(caught.value)


def test_lengths_that_change_in_place_are_read_again() -> None:
    both, x = starts((2, 3)), draw(5, 2, 8)
    for changed in ((2, 3), (4, 1), (2, 3)):
        both.copy_(starts(changed))
        out = interface.flash_attn_varlen_func(x, x, x, both, both, 5, 5)
        torch.testing.assert_close(out, packed(x, x, x, changed, changed)[0])
    both.copy_(torch.tensor([1, 2, 5]))
    with pytest.raises(RequestError, match="a 0 in front"):
        interface.flash_attn_varlen_func(x, x, x, both, both, 5, 5)


def test_layers_that_share_lengths_share_what_was_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = packed_rows._over_filler
    monkeypatch.setattr(packed_rows, "_over_filler", lambda *a: made.append(real(*a)) or made[-1])
    both, x = starts((2, 3)), draw(5, 2, 8)
    for _ in range(2):
        interface.flash_attn_varlen_func(x, x, x, both, both, 3, 3)
    with torch.inference_mode():
        interface.flash_attn_varlen_func(x, x, x, both, both, 3, 3)
    interface.flash_attn_varlen_func(x, x, x, both, both, 3, 3).sum().backward()
    assert made[0] is made[1] is made[3]


def test_steps_of_training_leave_nothing_behind() -> None:
    """Each step has lengths of its own; what was made of the last ones goes with them."""
    import gc

    x = draw(5, 2, 8)
    for _ in range(3):
        both = starts((2, 3))
        interface.flash_attn_varlen_func(x, x, x, both, both, 3, 3)
    del both
    gc.collect()
    assert len(packed_rows._PACKINGS) == 0


CU = torch.tensor([0, 3, 9], dtype=torch.int32)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "pages": (
        lambda x: interface.flash_attn_varlen_func(x, x, x, CU, CU, 6, 6, block_table=TABLE),
        r"got block_table with k \[9, 4, 32\].*takes pages, \(pages, page length, key heads, head_dim\)",
    ),
    "one number": (
        lambda x: interface.flash_attn_func(x[None], x[None], x[None], window_size=4),
        r"got window_size=4, takes \(left, right\)",
    ),
    "a list": (
        lambda x: interface.flash_attn_varlen_func(x, x, x, CU.tolist(), CU, 6, 6),
        "got cu_seqlens_q of type list, takes a tensor: torch.tensor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_argument_is_refused_with_what_is(case: str) -> None:
    call, said = WRONG[case]
    with pytest.raises(RequestError, match=said):
        call(torch.randn(9, 4, 32))
