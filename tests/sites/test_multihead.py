"""nn.MultiheadAttention swapped: its whole contract beside the stock module, judged in float64."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from headway.errors import HeadwayError
from headway.sites.multihead import Multihead, set_meant
from headway.sites.site import site_of
from headway.swap import swap, undo

BATCH, QUERIES, KEYS, SIZE, HEADS = 2, 4, 5, 8, 2

quietly = pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype stage:UserWarning",
    "ignore:enable_nested_tensor is True:UserWarning",
    "ignore:Support for mismatched key_padding_mask:UserWarning",
)
pytestmark = quietly


def twins(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """A stock module with no zeros in its biases, and a copy that is swapped; both in float64."""
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(SIZE, HEADS, **options).double()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    ours = copy.deepcopy(stock)
    assert len(swap(ours).census.swapped) == 1
    return stock, ours


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(kind: str, batch_first: bool, kdim: int | None, vdim: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one of: self, cross, key is value, own value; with 'unbatched' in front or not."""

    def tensor(length: int, size: int) -> Tensor:
        if kind.startswith("unbatched"):
            return rand(length, size).requires_grad_()
        shape = (BATCH, length, size) if batch_first else (length, BATCH, size)
        return rand(*shape).requires_grad_()

    query = tensor(QUERIES, SIZE)
    if kind.endswith("self"):
        return query, query, query
    key = tensor(KEYS, kdim or SIZE)
    if kind.endswith("is value"):
        return query, key, key
    return query, key, tensor(KEYS, vdim or SIZE)


def attn_masks(q_len: int, kv_len: int, batched: bool) -> Iterator[tuple[str, Tensor | None]]:
    """True is blocked; key 0 never is, so no row is empty."""
    rows = BATCH * HEADS if batched else HEADS
    yield "none", None
    for shape in ((q_len, kv_len), (rows, q_len, kv_len)):
        blocked = torch.rand(shape) > 0.6
        blocked[..., 0] = False
        yield f"bool {len(shape)}-D", blocked
        yield f"float {len(shape)}-D", rand(*shape).masked_fill(blocked, float("-inf"))


def paddings(kv_len: int, batched: bool) -> Iterator[tuple[str, Tensor | None]]:
    yield "none", None
    blocked = torch.zeros(BATCH, kv_len, dtype=torch.bool)
    blocked[0, -2:] = blocked[1, 2] = True
    added = rand(BATCH, kv_len).masked_fill(blocked, float("-inf"))
    yield "bool", blocked if batched else blocked[0]
    yield "float", added if batched else added[0]


def answer(module: nn.Module, args: tuple[Tensor, ...], **kwargs: Any) -> dict[str, Tensor | None]:
    """Output, weights, and the gradients of inputs and parameters under a fixed mix of both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out, weights = module(*args, **kwargs)
    mixes = torch.Generator().manual_seed(5)
    mixed = sum(
        (x * torch.randn(x.shape, generator=mixes, dtype=torch.float64)).sum() for x in (out, weights) if x is not None
    )
    wanted = {f"input {i}": x for i, x in enumerate(args)} | dict(module.named_parameters())
    grads = torch.autograd.grad(mixed, list(wanted.values()), allow_unused=True)
    return {"out": out, "weights": weights} | dict(zip(wanted, grads, strict=True))


def assert_same(ours: dict[str, Tensor | None], stock: dict[str, Tensor | None], where: str) -> None:
    assert ours.keys() == stock.keys()
    for name, theirs in stock.items():
        mine = ours[name]
        if theirs is None or mine is None:
            assert mine is theirs or not torch.any(torch.cat([x for x in (mine, theirs) if x is not None])), (
                f"{where}: {name} is {mine} and should be {theirs}"
            )
            continue
        assert mine.shape == theirs.shape, f"{where}: {name} is {list(mine.shape)}, should be {list(theirs.shape)}"
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10), (
            f"{where}: {name} errs {(mine - theirs).abs().max()}"
        )


CONSTRUCTORS = [
    pytest.param(
        {
            **{"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero},
            **{"kdim": kdim, "vdim": vdim, "batch_first": batch_first},
        },
        id="-".join(
            [
                "bias" if bias else "no_bias",
                *(["bias_kv"] if bias_kv else []),
                *(["zero_attn"] if zero else []),
                *([f"k{kdim}v{vdim}"] if kdim else []),
                "batch_first" if batch_first else "length_first",
            ]
        ),
    )
    for bias, bias_kv, zero, (kdim, vdim), batch_first in itertools.product(
        (True, False), (False, True), (False, True), ((None, None), (6, 10)), (True, False)
    )
]


@pytest.mark.parametrize("options", CONSTRUCTORS)
def test_every_constructor_with_every_forward_argument(options: dict[str, Any]) -> None:
    """Outputs, weights and all gradients; kdim/vdim, bias_kv, zero_attn, batch_first, masks and their combinations."""
    stock, ours = twins(**options)
    kinds = ("self", "cross", "key is value") if options["kdim"] is None else ("cross",)
    for kind in (*kinds, *(f"unbatched {kind}" for kind in kinds)):
        args = inputs(kind, options["batch_first"], options["kdim"], options["vdim"])
        batched = args[0].dim() == 3
        kv_len = QUERIES if kind.endswith("self") else KEYS
        wants = ((False, True), (True, True), (True, False))
        cases = itertools.product(attn_masks(QUERIES, kv_len, batched), paddings(kv_len, batched))
        for number, ((mask, attn_mask), (padding, key_padding_mask)) in enumerate(cases):
            turn = (number + number // 3) % 3
            # Without a batch in turns: all that differs is an axis.
            for need_weights, average in wants if batched else wants[turn : turn + 1]:
                kwargs = {
                    "attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "need_weights": need_weights,
                    "average_attn_weights": average,
                }  # fmt: skip
                where = f"{kind}, attn_mask {mask}, padding {padding}, weights {need_weights}, averaged {average}"
                assert_same(answer(ours, args, **kwargs), answer(stock, args, **kwargs), where)


@pytest.mark.parametrize("options", CONSTRUCTORS)
def test_the_causal_hint_is_taken_as_pytorch_takes_it(options: dict[str, Any]) -> None:
    """is_causal is a hint: it replaces the mask only without padding and weights, and needs a mask to hint at."""
    stock, ours = twins(**options)
    kinds = ("self", "cross") if options["kdim"] is None else ("cross",)
    for kind in (*kinds, *(f"unbatched {kind}" for kind in kinds)):
        args = inputs(kind, options["batch_first"], options["kdim"], options["vdim"])
        batched = args[0].dim() == 3
        kv_len = QUERIES if kind.endswith("self") else KEYS
        causal = torch.ones(QUERIES, kv_len, dtype=torch.bool).triu(1)
        every = HEADS * (BATCH if batched else 1)
        masks = [causal, torch.zeros(causal.shape).double().masked_fill(causal, float("-inf"))]
        masks += [mask.expand(every, -1, -1) for mask in masks]
        for mask, (padding, filler), need_weights in itertools.product(masks, paddings(kv_len, batched), (True, False)):
            kwargs = {"attn_mask": mask, "key_padding_mask": filler, "need_weights": need_weights, "is_causal": True}
            where = f"{kind}, {mask.dtype} {mask.dim()}-D, padding {padding}, weights {need_weights}"
            assert_same(answer(ours, args, **kwargs), answer(stock, args, **kwargs), where)
        for module in (stock, ours):
            with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
                module(*args, is_causal=True)


def test_the_same_tensor_and_an_equal_one_give_the_same() -> None:
    """Projections are joined where inputs are one object; that must not show in the numbers."""
    for options in ({}, {"batch_first": True}, {"bias": False}):
        stock, ours = twins(**options)
        x = rand(3, 4, SIZE)
        for args in ((x, x, x), (x, x.clone(), x.clone()), (x, x, x.clone()), (x.clone(), x, x), (x, x.clone(), x)):
            assert torch.allclose(ours(*args)[0], stock(x, x, x)[0], rtol=1e-10)
            assert torch.allclose(ours(*args, need_weights=False)[0], stock(x, x, x)[0], rtol=1e-10)


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("average", (True, False))
@pytest.mark.parametrize("masked", (False, True))
def test_dropout_with_weights_draws_as_pytorch_does(batch_first: bool, average: bool, masked: bool) -> None:
    """With equal seeds: which weights are dropped, what is returned (weights after dropout), and the gradients."""
    stock, ours = twins(dropout=0.4, batch_first=batch_first)
    assert stock.training
    assert ours.training
    args = inputs("cross", batch_first, None, None)
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1) if masked else None
    answers = []
    for module in (ours, stock):
        torch.manual_seed(11)
        answers.append(answer(module, args, attn_mask=mask, average_attn_weights=average))
    assert_same(*answers, "train mode")


def test_dropout_without_weights_is_dropout() -> None:
    """No draw is shared with PyTorch's kernel here; its mean is the answer without, and eval drops nothing."""
    stock, ours = twins(dropout=0.5, batch_first=True)
    x = rand(2, 6, SIZE)
    many = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(400)])
    truth = stock.eval()(x, x, x)[0]
    assert many.std(0).min() > 0
    error = (many.mean(0) - truth).abs() / (many.std(0) / 20)
    assert error.max() < 6, "the mean over draws is not the answer without dropout"
    assert torch.allclose(ours.eval()(x, x, x, need_weights=False)[0], truth)


@pytest.mark.parametrize("need_weights", (False, True))
@pytest.mark.parametrize("how", ("bool attn_mask", "float attn_mask", "bool padding", "float padding", "both"))
def test_a_row_that_sees_nothing_is_zero(need_weights: bool, how: str) -> None:
    """PyTorch gives NaN here or 0, as its path has it; ours gives exactly 0 before out_proj and finite gradients."""
    stock, ours = twins(batch_first=True)
    x = rand(2, 4, SIZE).requires_grad_()
    blocked = torch.zeros(4, 4, dtype=torch.bool)
    blocked[1] = True
    padded = torch.tensor([[True] * 4, [False] * 4])
    half, other = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    half[1, :2] = other[0, 2:] = True
    lowest = float("-inf")
    kwargs: dict[str, Any] = {
        "bool attn_mask": {"attn_mask": blocked},
        "float attn_mask": {"attn_mask": torch.zeros(4, 4).double().masked_fill(blocked, lowest)},
        "bool padding": {"key_padding_mask": padded},
        "float padding": {"key_padding_mask": torch.zeros(2, 4).double().masked_fill(padded, lowest)},
        "both": {"attn_mask": half, "key_padding_mask": other},
    }[how]
    empty = torch.zeros(2, 4, dtype=torch.bool)
    empty[(slice(None), 1) if "attn" in how else (0, slice(None)) if "padding" in how else (0, 1)] = True
    got = answer(ours, (x, x, x), need_weights=need_weights, **kwargs)
    truth = answer(stock, (x, x, x), need_weights=need_weights, **kwargs)
    out = got["out"]
    assert out is not None
    assert torch.equal(out[empty], ours.out_proj.bias.expand_as(out[empty])), "not exactly 0 before out_proj"
    assert torch.allclose(out[~empty], truth["out"][~empty])  # type: ignore[index]
    if need_weights:
        assert truth["out"][empty].isnan().all()  # type: ignore[index]  # what stock says, which is why ours differs
        assert got["weights"] is not None
        assert not got["weights"][empty].any()
    for name, value in got.items():
        assert value is None or value.isfinite().all(), f"{name} is not finite"


@pytest.mark.parametrize("inside", (True, False), ids=("in a layer", "alone"))
def test_a_row_that_sees_nothing_has_one_answer_in_every_mode(inside: bool) -> None:
    """PyTorch has three: NaN on the fast path, NaN with weights, 0 else (pytorch#190486)."""
    torch.manual_seed(0)
    stock: nn.Module = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    stock = stock if inside else stock.self_attn
    ours = copy.deepcopy(stock)
    swap(ours)
    x, empty = torch.randn(2, 4, 16), torch.tensor([[True] * 4, [False] * 4])

    def ask(model: nn.Module, name: str, need_weights: bool) -> Tensor:
        with mode(name, model):
            if inside:
                return model(x, src_key_padding_mask=empty)
            return model(x, x, x, key_padding_mask=empty, need_weights=need_weights)[0]

    truth = ask(ours, "train", False)
    assert truth.isfinite().all()
    for name, need_weights in itertools.product(MODES[:6], (False,) if inside else (False, True)):
        torch.testing.assert_close(ask(ours, name, need_weights), truth, atol=3e-6, rtol=1e-5)
    assert not ask(stock, "eval no_grad", False).isfinite().all()


def test_the_signature_is_pytorchs() -> None:
    """What PyTorch adds to the module is seen here, not passed over."""
    mine, theirs = (inspect.signature(kind.forward).parameters.values() for kind in (Multihead, nn.MultiheadAttention))
    assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in theirs]


def test_what_pytorchs_layers_read_is_as_it_was() -> None:
    """A class that took the module's place without one of these made the layers raise."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    stock, ours = copy.deepcopy(layer).self_attn, layer.self_attn
    swap(layer)
    for name in ("batch_first", "_qkv_same_embed_dim", "embed_dim", "num_heads", "head_dim", "dropout", "kdim", "vdim"):
        assert getattr(ours, name) == getattr(stock, name)
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert torch.equal(ours.get_parameter(name), stock.get_parameter(name))
    padding, causal = torch.tensor([[False, True]]), torch.tensor([[False, True], [False, False]])
    mine, theirs = (one.merge_masks(causal, padding, torch.zeros(1, 2, 16)) for one in (ours, stock))
    assert mine[1] == theirs[1]
    assert torch.equal(mine[0], theirs[0])  # type: ignore[arg-type]


def _wrong() -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    x, y = rand(2, 4, SIZE), rand(2, 5, SIZE)
    yield "4-D", (x[None],) * 3, {}
    yield "1-D", (x[0, 0],) * 3, {}
    yield "batched query, unbatched key", (x, x[0], x[0]), {}
    yield "unbatched query, batched key", (x[0], x, x), {}
    yield "another size", (rand(2, 4, SIZE + 2),) * 3, {}
    yield "key of another size", (x, rand(2, 4, 3), rand(2, 4, 3)), {}
    yield "key and value of unequal lengths", (x, x, y), {}
    yield "key and value of unequal batches", (x, x, y[:1]), {}
    yield "batch of one key for two queries", (x, x[:1], x[:1]), {}
    yield "2-D mask of one row", (x, x, x), {"attn_mask": torch.zeros(1, 4, dtype=torch.bool)}
    yield "2-D mask of one column", (x, x, x), {"attn_mask": torch.zeros(4, 1, dtype=torch.bool)}
    yield "2-D mask of another size", (x, x, x), {"attn_mask": torch.zeros(4, 5, dtype=torch.bool)}
    yield "3-D mask of the batch", (x, x, x), {"attn_mask": torch.zeros(2, 4, 4, dtype=torch.bool)}
    yield "3-D mask of one", (x, x, x), {"attn_mask": torch.zeros(1, 4, 4)}
    yield "4-D mask", (x, x, x), {"attn_mask": torch.zeros(2, 2, 4, 4, dtype=torch.bool)}
    yield "1-D mask", (x, x, x), {"attn_mask": torch.zeros(4, dtype=torch.bool)}
    yield "integer mask", (x, x, x), {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}
    yield "padding of another length", (x, x, x), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}
    yield "padding of another batch", (x, x, x), {"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)}
    yield "1-D padding of a batch", (x, x, x), {"key_padding_mask": torch.zeros(4, dtype=torch.bool)}
    yield "integer padding", (x, x, x), {"key_padding_mask": torch.zeros(2, 4, dtype=torch.int64)}
    yield "2-D padding without a batch", (x[0],) * 3, {"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)}
    yield "3-D mask without a batch", (x[0],) * 3, {"attn_mask": torch.zeros(4, 4, 4, dtype=torch.bool)}


@pytest.mark.parametrize("need_weights", (False, True))
@pytest.mark.parametrize("case", [case for case, *_ in _wrong()])
def test_what_pytorch_refuses_is_refused(case: str, need_weights: bool) -> None:
    """A 3-D mask per batch entry is not quietly taken as one per head, nor a short mask repeated."""
    _, args, kwargs = next(each for each in _wrong() if each[0] == case)
    for module in twins(batch_first=True):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            module(*args, need_weights=need_weights, **kwargs)


def test_the_hint_does_not_excuse_a_mask_of_another_size() -> None:
    """PyTorch does not look at the mask's shape when it takes the hint; nor do we."""
    x = rand(2, 4, SIZE)
    stock, ours = twins(batch_first=True)
    kwargs: dict[str, Any] = {"attn_mask": torch.zeros(4, 4).double(), "is_causal": True, "need_weights": False}
    assert torch.allclose(ours(x, x, x, **kwargs)[0], stock(x, x, x, **kwargs)[0])


def test_positional_and_keyword_calls() -> None:
    """attn(q, k, v) is cross-attention, not self-attention with masks; keyword order does not matter."""
    stock, ours = twins(batch_first=True)
    q, k, v = (x.detach() for x in inputs("cross", True, None, None))
    padding, mask = torch.zeros(BATCH, KEYS, dtype=torch.bool), rand(QUERIES, KEYS)
    for args, kwargs in (
        ((q, k, v), {}),
        ((), {"value": v, "key": k, "query": q}),
        ((q, k, v, None, False, mask, True, False), {}),
        ((q, k), {"value": v, "key_padding_mask": padding.double(), "average_attn_weights": False}),
    ):
        got, truth = ours(*args, **kwargs), stock(*args, **kwargs)
        assert isinstance(got, tuple)
        assert len(got) == 2
        for mine, theirs in zip(got, truth, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs)
    assert not torch.allclose(ours(q, k, v)[0], ours(q, q, q)[0])


def test_no_keys_at_all() -> None:
    """Keys of length 0: zeros before out_proj, and nothing raised."""
    _, ours = twins(batch_first=True)
    x, nothing = rand(2, 3, SIZE), rand(2, 0, SIZE)
    for need_weights in (False, True):
        out, _ = ours(x, nothing, nothing, need_weights=need_weights)
        assert torch.equal(out, ours.out_proj.bias.expand(2, 3, SIZE))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("need_weights", (False, True))
def test_narrow_dtypes_err_no_more_than_pytorch(dtype: torch.dtype, need_weights: bool) -> None:
    """A bfloat16 module stays one, and its rounding is no worse than PyTorch's own; weights come in its dtype."""
    truth_module, _ = twins(batch_first=True)
    stock = copy.deepcopy(truth_module).to(dtype)
    ours = copy.deepcopy(stock)
    swap(ours)
    x = rand(4, 16, SIZE)
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)
    truth = truth_module(x.to(dtype).double(), *(x.to(dtype).double(),) * 2, attn_mask=mask)[0]
    theirs, mine = (
        m(x.to(dtype), *(x.to(dtype),) * 2, attn_mask=mask, need_weights=need_weights) for m in (stock, ours)
    )
    assert mine[0].dtype == theirs[0].dtype == dtype
    assert mine[1] is None or mine[1].dtype == theirs[1].dtype == dtype
    error, allowed = ((out[0].double() - truth).square().mean().sqrt() for out in (mine, theirs))
    assert error <= 1.5 * allowed + torch.finfo(dtype).eps / 8


@pytest.mark.parametrize("size, heads", ((63, 1), (63, 3), (63, 21), (21, 7), (24, 2)))
def test_heads_of_odd_sizes(size: int, heads: int) -> None:
    """Kernels want multiples of 8 or 16; what no kernel takes is computed by one that does, forward and backward."""
    stock = nn.MultiheadAttention(size, heads, batch_first=True).double()
    ours = copy.deepcopy(stock)
    swap(ours)
    for need_weights in (False, True):
        x = (rand(2, 5, size).requires_grad_(),) * 3
        kwargs = {"need_weights": need_weights}
        assert_same(answer(ours, x, **kwargs), answer(stock, x, **kwargs), f"{size} in {heads}")


# -- inside PyTorch's transformer layers ---------------------------------------------------------------------------


def runs(model: nn.Module) -> list[int]:
    """How often each swapped module's forward computed attention."""
    sites = [site_of(module) for module in model.modules()]
    return [sum(s.ticket.runs.values()) + s.ticket.in_full for s in sites if s is not None and s.ticket.swapped]


def encoder(norm_first: bool = False, batch_first: bool = True, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, norm_first=norm_first, batch_first=batch_first, **options
    )
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@contextlib.contextmanager
def mode(name: str, model: nn.Module) -> Iterator[None]:
    model.train(name == "train")
    with contextlib.ExitStack() as stack:
        if "no_grad" in name:
            stack.enter_context(torch.no_grad())
        if "inference" in name:
            stack.enter_context(torch.inference_mode())
        if "autocast" in name:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if "hooks" in name:
            for module in model.modules():
                stack.callback(module.register_forward_hook(lambda *_: None).remove)
        yield


MODES = (
    "train", "eval", "eval no_grad", "eval inference", "eval hooks", "eval no_grad hooks", "eval autocast",
    "eval no_grad autocast",
)  # fmt: skip


@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("batch_first", (True, False), ids=("batch_first", "length_first"))
@pytest.mark.parametrize("norm_first", (True, False), ids=("norm_first", "norm_last"))
def test_an_encoder_runs_our_forward_in_every_mode(norm_first: bool, batch_first: bool, padded: bool) -> None:
    """The stock fast path would skip a subclass' forward in eval without gradients, or read what a wrapper lacks."""
    stock = encoder(norm_first, batch_first)
    ours = copy.deepcopy(stock)
    swap(ours)
    x = torch.randn(2, 6, 16)
    filler = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    valid = slice(None) if filler is None else ~filler
    given = x if batch_first else x.transpose(0, 1)
    for name in MODES:
        before = runs(ours)
        with mode(name, ours):
            out = ours(given, src_key_padding_mask=filler)
        assert [b - a for a, b in zip(before, runs(ours), strict=True)] == [1, 1], f"our forward did not run in {name}"
        # Without gradients and with padding PyTorch's own fast path raises: it takes no bfloat16 from autocast.
        grad = torch.enable_grad() if name == "eval no_grad autocast" else contextlib.nullcontext()
        with mode(name, stock), grad:
            truth = stock(given, src_key_padding_mask=filler)
        out, truth = (y if batch_first else y.transpose(0, 1) for y in (out, truth))
        close = {"atol": 0.06, "rtol": 0.06} if "autocast" in name else {"atol": 3e-6, "rtol": 1e-5}
        torch.testing.assert_close(out[valid].float(), truth[valid].float(), **close)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ("bool", "float", "causal hint"))
def test_an_encoder_with_a_mask(form: str) -> None:
    stock = encoder()
    ours = copy.deepcopy(stock)
    swap(ours)
    x = torch.randn(2, 6, 16)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mask = causal if form == "bool" else nn.Transformer.generate_square_subsequent_mask(6)
    for name in MODES[:6]:
        before = runs(ours)
        with mode(name, ours):
            out = ours(x, mask, is_causal=form == "causal hint" or None)
        assert runs(ours) == [count + 1 for count in before]
        with mode(name, stock):
            torch.testing.assert_close(out, stock(x, mask), atol=3e-6, rtol=1e-5)


def test_an_encoder_given_nested_tensors() -> None:
    """Sequences of unequal lengths as one nested tensor, in eval without gradients, as PyTorch takes them."""
    stock = encoder().eval()
    ours = copy.deepcopy(stock)
    swap(ours)
    x = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(3, 16)])
    with torch.no_grad():
        out, truth = ours(x), stock(x)
    assert runs(ours) == [1, 1]
    assert out.is_nested
    for mine, theirs in zip(out.unbind(), truth.unbind(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=1e-5)


def test_nested_tensors_in_the_module_itself() -> None:
    stock = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    ours = copy.deepcopy(stock)
    swap(ours)
    q = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(3, 16)])
    k = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(7, 16)])
    with torch.no_grad():
        out, weights = ours(q, k, k, need_weights=False)
        assert weights is None
        for mine, one, other in zip(out.unbind(), q.unbind(), k.unbind(), strict=True):
            torch.testing.assert_close(mine, stock(one, other, other)[0], atol=3e-6, rtol=1e-5)
    with pytest.raises(HeadwayError, match="nested tensors alone"):
        ours(q, k, k, key_padding_mask=torch.zeros(2, 7, dtype=torch.bool))


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("norm_first", (True, False))
def test_a_transformer_with_all_its_masks(norm_first: bool, batch_first: bool) -> None:
    """Encoder, decoder, cross-attention; source, target and memory masks together, in train, eval and no_grad."""
    torch.manual_seed(2)
    stock = nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=batch_first, norm_first=norm_first)
    ours = copy.deepcopy(stock)
    assert len(swap(ours).census.swapped) == 6
    source, target = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    filler = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    kwargs: dict[str, Any] = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": filler.float().masked_fill(filler, float("-inf")),
        "memory_key_padding_mask": filler.float().masked_fill(filler, float("-inf")),
    }
    for name in MODES[:6]:
        before = runs(ours)
        with mode(name, ours):
            out = ours(source, target, **kwargs)
        assert runs(ours) == [count + 1 for count in before], name
        with mode(name, stock):
            torch.testing.assert_close(out, stock(source, target, **kwargs), atol=5e-6, rtol=1e-5)


# -- wrapped projections -------------------------------------------------------------------------------------------


class Sigma(nn.Module):
    """A linear in a wrapper that has no weight or bias of its own, and changes the function."""

    def __init__(self, linear: nn.Linear, sigma: float = 1.7) -> None:
        super().__init__()
        self.linear = linear
        self.sigma = nn.Parameter(torch.tensor(sigma, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.linear.weight, dim=1) * self.sigma, self.linear.bias)


class Quantised(nn.Module):
    """Eight bits and a scale, as quantised linears hold them: no weight, nothing to train."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (weight / self.scale).round().to(torch.int8))
        self.register_buffer("shift", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale, self.shift)


def by_hand(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Self-attention of a module, batch first, whose out_proj is called."""
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return module.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("wrap", (Sigma, Quantised), ids=("sigma 1.7", "quantised"))
@pytest.mark.parametrize("need_weights", (False, True))
def test_a_wrapped_out_proj_is_called(wrap: Any, need_weights: bool) -> None:
    """Its weight is not read off: the raw weight would drop the normalisation and the sigma. Stock crashes here."""
    module = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double()
    module.out_proj = wrap(module.out_proj)
    x = rand(2, 4, SIZE)
    with pytest.raises(AttributeError, match="weight"):
        module(x, x, x)
    truth = by_hand(module, x)
    done = swap(module)
    out = module(x, x, x, need_weights=need_weights)[0]
    assert torch.allclose(out, truth, rtol=1e-9, atol=1e-12)
    wanted = dict(module.named_parameters())
    mine = torch.autograd.grad(out.square().sum(), list(wanted.values()), allow_unused=True)
    theirs = torch.autograd.grad(truth.square().sum(), list(wanted.values()), allow_unused=True)
    for name, one, other in zip(wanted, mine, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-8, atol=1e-10), name
        assert one is None or one.any() or "bias" in name, f"{name} got no gradient"
    done.undo()
    with pytest.raises(AttributeError, match="weight"):
        module(x, x, x)


@pytest.mark.parametrize("norm", ("weight_norm", "spectral_norm", "orthogonal"))
@pytest.mark.parametrize("where", ("out_proj.weight", "in_proj_weight"))
def test_parametrised_projections_act(norm: str, where: str) -> None:
    """A parametrization of out_proj or of in_proj_weight keeps its function and gets its gradients."""
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double()
    if where == "in_proj_weight":
        getattr(parametrizations, norm)(stock, "in_proj_weight")
    else:
        getattr(parametrizations, norm)(stock.out_proj, "weight")
    ours = copy.deepcopy(stock)
    names, kinds = set(dict(ours.named_parameters())), [type(m) for m in ours.modules()]
    done = swap(ours)
    x = rand(2, 4, SIZE).requires_grad_()
    stock.eval(), ours.eval()  # spectral_norm moves its vectors while it trains
    for need_weights in (False, True):
        kwargs = {"need_weights": need_weights}
        assert_same(answer(ours, (x, x, x), **kwargs), answer(stock, (x, x, x), **kwargs), f"{norm} {where}")
    assert set(dict(ours.named_parameters())) == names
    done.undo()
    assert [type(m) for m in ours.modules()] == kinds
    assert parametrize.is_parametrized(ours) or parametrize.is_parametrized(ours.out_proj)


def normed(module: Any, name: str = "in_proj_weight") -> None:
    parametrizations.weight_norm(module, name)
    with torch.no_grad():
        module.parametrizations[name].original0.mul_(1.3)


def test_a_parametrization_that_comes_after_the_swap() -> None:
    """It acts, and stays when the swap is undone."""
    stock = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double()
    ours = copy.deepcopy(stock)
    done = swap(ours)
    normed(stock), normed(ours)
    x = rand(2, 4, SIZE)
    assert torch.allclose(ours(x, x, x)[0], stock(x, x, x)[0])
    assert runs(ours) == runs(copy.deepcopy(ours)) == [1]
    done.undo()
    assert site_of(ours) is None
    assert type(ours).__name__ == type(stock).__name__ == "ParametrizedMultiheadAttention"
    assert type(ours).__mro__[1:] == type(stock).__mro__[1:]
    assert torch.equal(ours(x, x, x)[0], stock(x, x, x)[0])
    parametrize.remove_parametrizations(ours, "in_proj_weight")
    assert type(ours) is nn.MultiheadAttention
    torch.testing.assert_close(ours(x, x, x)[0], stock(x, x, x)[0])


@pytest.mark.parametrize("first", ("parametrize", "swap"))
@pytest.mark.parametrize("inside", (True, False), ids=("in a layer", "alone"))
def test_a_parametrization_that_is_removed_from_a_swapped_module(first: str, inside: bool) -> None:
    """It raised AttributeError with the weight already changed; the module stays swapped."""
    torch.manual_seed(0)
    ours: nn.Module = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    ours = ours if inside else ours.self_attn
    module = ours.self_attn if inside else ours
    if first == "parametrize":
        normed(module)
    done = swap(ours)
    if first == "swap":
        normed(module)
    given = (rand(2, 4, 16).float(),) * (1 if inside else 3)
    before = ours(*given)
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert not parametrize.is_parametrized(module)
    assert "in_proj_weight" in dict(module.named_parameters())
    torch.testing.assert_close(ours(*given), before)
    assert runs(ours) == [2]
    done.undo()
    assert type(module) is nn.MultiheadAttention
    torch.testing.assert_close(ours(*given), before)


def test_one_parametrization_of_two_is_removed_and_another_added() -> None:
    """The class after the undo has what the module has then; that of a copy made before the swap stays as it is."""
    stock = nn.MultiheadAttention(SIZE, HEADS, kdim=6, vdim=6, batch_first=True).double()
    normed(stock, "q_proj_weight"), normed(stock, "k_proj_weight")
    ours = copy.deepcopy(stock)  # PyTorch gives both one class
    assert type(ours) is type(stock)
    done = swap(ours)
    x, y = rand(2, 4, SIZE), rand(2, 5, 6)
    want = stock(x, y, y)[0]
    parametrize.remove_parametrizations(ours, "q_proj_weight")
    torch.testing.assert_close(ours(x, y, y)[0], want)
    torch.testing.assert_close(stock(x, y, y)[0], want)
    parametrizations.weight_norm(ours, "v_proj_weight")
    torch.testing.assert_close(ours(x, y, y)[0], want)
    done.undo()
    assert parametrize.type_before_parametrizations(ours) is nn.MultiheadAttention
    assert set(ours.parametrizations) == {"k_proj_weight", "v_proj_weight"}
    torch.testing.assert_close(ours(x, y, y)[0], want)
    torch.testing.assert_close(stock(x, y, y)[0], want)
    for name in ("k_proj_weight", "v_proj_weight"):
        parametrize.remove_parametrizations(ours, name)
    assert type(ours) is nn.MultiheadAttention
    torch.testing.assert_close(ours(x, y, y)[0], want)


def test_a_class_that_another_tool_made_of_a_swapped_one_is_named() -> None:
    module = nn.MultiheadAttention(SIZE, HEADS)
    done = swap(module)
    ours = type(module)
    module.__class__ = type("Other", (ours,), {})
    with pytest.raises(HeadwayError, match="got '' of a class Other that another tool made.*undo that first"):
        done.undo()
    module.__class__ = ours
    done.undo()
    assert type(module) is nn.MultiheadAttention


def test_hooks_on_out_proj_fire() -> None:
    """Stock reads the weights and never calls the module, so its hooks are dead there."""
    module = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double()
    fired: list[str] = []
    module.out_proj.register_forward_hook(lambda *_: fired.append("forward"))
    module.out_proj.register_forward_pre_hook(lambda *_: fired.append("before"))
    module.out_proj.register_full_backward_hook(lambda *_: fired.append("backward"))
    x = rand(2, 4, SIZE)
    module(x, x, x)[0].sum().backward()
    assert fired == []
    swap(module)
    for need_weights in (False, True):
        fired.clear()
        module(x, x, x, need_weights=need_weights)[0].sum().backward()
        assert fired == ["before", "forward", "backward"]


def test_lora_of_peft_on_out_proj_trains() -> None:
    """peft on out_proj alone gets no gradient at all in a stock module."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.TransformerEncoderLayer(SIZE, HEADS, 16, 0.0, batch_first=True))
    config = peft.LoraConfig(target_modules=["out_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    names = list(adapted.state_dict())
    x = torch.randn(2, 4, SIZE)
    done = swap(adapted, x)
    assert done.certificate is not None
    assert done.certificate.passed
    adapted(x).square().sum().backward()
    lora = {name: p for name, p in adapted.named_parameters() if "lora" in name}
    assert lora
    assert all(p.grad is not None and p.grad.any() for p in lora.values())
    assert list(adapted.state_dict()) == names
    assert any("LoRA" in note or "Linear" in note for note in done.census.notes), "nobody says that the answer changes"
    with adapted.disable_adapter():
        without = adapted(x)
    assert not torch.allclose(adapted(x), without)
    done.undo()
    torch.testing.assert_close(adapted(x), without)


def test_lora_of_peft_on_out_proj_where_keys_have_another_size() -> None:
    """On the module itself peft refuses that; on out_proj it was never trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(SIZE, HEADS, kdim=6, vdim=10, batch_first=True)})
    config = peft.LoraConfig(target_modules=["out_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(model, config).base_model.model
    given = torch.randn(2, 4, SIZE), torch.randn(2, 5, 6), torch.randn(2, 5, 10)
    done = swap(model, lambda m: m["attention"](*given, need_weights=False))
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    model["attention"](*given, need_weights=False)[0].square().sum().backward()
    lora = [p for name, p in model.named_parameters() if "lora" in name]
    assert len(lora) == 2
    assert all(p.grad is not None and p.grad.any() for p in lora)


def adapted(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("first", ("adapters", "swap"))
def test_adapters_of_peft_on_the_module_itself(first: str, padded: bool) -> None:
    """Added to a swapped model they were refused; PyTorch's fast path would skip them in eval without gradients."""
    plain = encoder()
    ours = copy.deepcopy(plain)
    classes = [type(module) for module in plain.modules()]
    if first == "swap":
        swap(ours)
        model = adapted(ours)
    else:
        model = adapted(ours)
        swap(model)
    stock = adapted(copy.deepcopy(plain)).train()  # in eval and without gradients its adapters are skipped
    x = torch.randn(2, 6, 16)
    filler = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    valid = slice(None) if filler is None else ~filler
    truth = stock(x, src_key_padding_mask=filler)
    for name in MODES[:6]:
        before = runs(model)
        with mode(name, model):
            out = model(x, src_key_padding_mask=filler)
        assert runs(model) == [count + 1 for count in before], name
        torch.testing.assert_close(out[valid], truth[valid], atol=5e-6, rtol=1e-5)
    model.train()(x, src_key_padding_mask=filler)[valid].square().sum().backward()
    truth[valid].square().sum().backward()
    lora = {name: p.grad for name, p in model.named_parameters() if "lora" in name}
    assert lora
    for name, p in stock.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(lora[name], p.grad, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == list(stock.state_dict())
    undo(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [type(m) for m in model.unload().modules()] == classes


def test_adapters_merged_into_a_swapped_model() -> None:
    ours, stock = encoder(), encoder()
    swap(ours)
    x = torch.randn(2, 6, 16)
    merged, want = adapted(ours).merge_and_unload(), adapted(stock).merge_and_unload()
    torch.testing.assert_close(merged.eval()(x), want.eval()(x), atol=5e-6, rtol=1e-5)
    assert runs(merged) == [1, 1]


class Calling(nn.TransformerEncoderLayer):
    """Is two sites: its self_attn, and a call of its own."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Any:
        return F.scaled_dot_product_attention(src, src, super().forward(src, *args, **kwargs))


def test_a_layer_that_is_a_site_too_is_undone_to_its_class() -> None:
    layer = Calling(16, 2, 32, 0.0, batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    want = layer(x)
    for _ in range(2):
        done = swap(layer, x)
        assert len(done.census.swapped) == 2
        with torch.no_grad():
            before = runs(layer)
            torch.testing.assert_close(layer(x), want, atol=5e-6, rtol=1e-5)
        assert runs(layer) == [count + 1 for count in before]
    done.undo()
    assert [type(module) for module in (layer, layer.self_attn)] == [Calling, nn.MultiheadAttention]


def test_a_module_swapped_alone_keeps_a_layer_around_it_from_skipping_it() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    swap(layer.self_attn)
    with torch.no_grad():
        layer(torch.randn(2, 6, 16))
    assert runs(layer) == [1]


def test_a_swapped_module_is_initialised_anew_as_before() -> None:
    stock = encoder()
    ours = copy.deepcopy(stock)
    swap(ours)
    for model in (stock, ours):
        torch.manual_seed(5)
        model.layers[0].self_attn._reset_parameters()
    assert torch.equal(ours.layers[0].self_attn.in_proj_weight, stock.layers[0].self_attn.in_proj_weight)


class Loud(nn.TransformerEncoderLayer):
    """Adds to what super().forward gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 2


def test_a_subclass_of_a_layer_keeps_its_additions_and_its_copies_are_swapped() -> None:
    stock = Loud(16, 2, 32, 0.0, batch_first=True).eval()
    ours = copy.deepcopy(stock)
    swap(ours)
    assert isinstance(ours, Loud)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        for each in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            before = runs(each)
            torch.testing.assert_close(each(x), stock(x), atol=5e-6, rtol=1e-5)
            assert runs(each) == [count + 1 for count in before]
    undo(ours)
    assert type(ours) is Loud
    assert ours.__dict__.keys() == stock.__dict__.keys()
    assert ours.activation_relu_or_gelu == stock.activation_relu_or_gelu == 1


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("norm_first", (True, False))
def test_an_encoder_with_wrapped_linears_runs_in_every_mode(norm_first: bool, padded: bool) -> None:
    """Stock reads linear1.weight in eval and crashes; so does its conversion to nested tensors with padding."""
    stock = encoder(norm_first)
    for layer in stock.layers:
        layer.linear1, layer.linear2 = Sigma(layer.linear1), Sigma(layer.linear2)
        layer.self_attn.out_proj = nn.Linear(16, 16)
    x = torch.randn(2, 6, 16)
    filler = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    with torch.no_grad(), pytest.raises(AttributeError, match="weight"):
        stock.eval()(x, src_key_padding_mask=filler)
    ours = copy.deepcopy(stock)
    done = swap(ours, lambda m: m(x, src_key_padding_mask=filler))
    truth = stock.train()(x, src_key_padding_mask=filler)
    valid = slice(None) if filler is None else ~filler
    for name in MODES:
        before = runs(ours)
        with mode(name, ours):
            out = ours(x, src_key_padding_mask=filler)
        assert runs(ours) == [count + 1 for count in before], name
        close = {"atol": 0.1, "rtol": 0.1} if "autocast" in name else {"atol": 5e-6, "rtol": 1e-5}
        torch.testing.assert_close(out[valid].float(), truth[valid], **close)  # type: ignore[arg-type]
    done.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    with torch.no_grad(), pytest.raises(AttributeError, match="weight"):
        ours.eval()(x, src_key_padding_mask=filler)


class Scaled(nn.Linear):
    """A linear whose weight is not all there is to it, as an adapter's, a quantised or an FP8 linear's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.7


def scaled(linear: nn.Linear) -> Scaled:
    made = Scaled(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    return made


def baked(linear: nn.Module) -> nn.Linear:
    """A plain linear of the same function."""
    made = nn.Linear(len(linear.linear.weight[0]) if isinstance(linear, Sigma) else linear.in_features, 1)
    with torch.no_grad():
        bias = linear(torch.zeros(made.in_features))
        made.weight, made.bias = nn.Parameter((linear(torch.eye(made.in_features)) - bias).mT), nn.Parameter(bias)
    return made


@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("wrap", (Sigma, scaled))
@pytest.mark.parametrize("where", ("linear1", "linear2", "self_attn.out_proj"))
def test_a_linear_is_called_in_every_mode(where: str, wrap: Any, padded: bool) -> None:
    """PyTorch's fast path reads the weight: it raises where there is none, and else forgets what else was there."""
    ours, stock = encoder(), encoder()
    path, _, name = where.rpartition(".")
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        wrapped = wrap(mine.get_submodule(where))
        setattr(mine.get_submodule(path), name, wrapped)
        setattr(theirs.get_submodule(path), name, baked(wrapped))
    x = torch.randn(2, 6, 16)
    filler = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    valid = slice(None) if filler is None else ~filler
    done = swap(ours, lambda m: m(x, src_key_padding_mask=filler))
    assert done.certificate is not None
    assert done.certificate.passed
    truth = stock(x, src_key_padding_mask=filler)[valid]
    for name in MODES[:6]:
        with mode(name, ours):
            torch.testing.assert_close(ours(x, src_key_padding_mask=filler)[valid], truth, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", (nn.utils.weight_norm, nn.utils.spectral_norm))
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_norms_of_weights_by_hooks(norm: Any) -> None:
    """The older ones compute the weight before each call; PyTorch never calls, and goes on with the first one."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    norm(module.out_proj)
    x = torch.randn(2, 6, 16)
    for _ in range(20):  # until the spectral norm is one
        module.out_proj(x)
    done = swap(module, (x, x, x))
    assert done.certificate is not None
    assert done.certificate.passed
    module.eval()
    with torch.no_grad():
        before = module(x, x, x)[0]
        for parameter in module.out_proj.parameters():
            parameter.copy_(torch.randn_like(parameter))
        after = module(x, x, x)[0]
        torch.testing.assert_close(after, by_hand(module, x))
        assert not torch.allclose(after, before, atol=0.1)
    module.train()(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.out_proj.parameters())


class Improved(nn.Module):
    """A layer of somebody's own, of which an encoder knows nothing but its self_attn."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)

    def forward(
        self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        out = self.self_attn(
            src, src, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False
        )
        return self.norm(src + out[0])


def test_an_encoder_of_other_layers() -> None:
    stock = nn.TransformerEncoder(Improved(), 2)
    ours = copy.deepcopy(stock)
    swap(ours)
    x, filler = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    for name in MODES[:6]:
        before = runs(ours)
        with mode(name, ours):
            out = ours(x, src_key_padding_mask=filler)
        assert runs(ours) == [count + 1 for count in before], name
        with mode(name, stock):
            torch.testing.assert_close(out[~filler], stock(x, src_key_padding_mask=filler)[~filler])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "saved"))
@pytest.mark.parametrize("first", ("swap", "checkpoint"))
def test_checkpointed_layers(first: str, reentrant: bool) -> None:
    """By PyTorch's own wrapper, through which an encoder finds self_attn: the same gradients, drop for drop."""
    plain = encoder(activation="gelu")
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    ours = copy.deepcopy(plain)
    x = torch.randn(2, 6, 16)
    if first == "swap":
        swap(ours, x)
    impl = checkpoint_wrapper.CheckpointImpl.REENTRANT if reentrant else checkpoint_wrapper.CheckpointImpl.NO_REENTRANT
    for i, layer in enumerate(ours.layers):
        ours.layers[i] = checkpoint_wrapper.checkpoint_wrapper(layer, impl)
    if first == "checkpoint":
        done = swap(ours, x)
        assert done.certificate is not None
        assert done.certificate.passed
    swap(plain)
    for model in (ours, plain):
        torch.manual_seed(1)
        model.train()(x.clone().requires_grad_()).square().sum().backward()
    assert runs(plain) == [1, 1]
    assert runs(ours) == [2, 2], "once, and once more for the backward pass"
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    undo(ours)
    assert runs(ours) == []


def test_a_wrapper_that_hides_the_attention_is_swapped_inside() -> None:
    """PyTorch's encoder asks its first layer for self_attn and raises, swapped or not; alone the layer runs."""

    class Hides(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model = encoder().eval()
    stock = copy.deepcopy(model)
    for i, layer in enumerate(model.layers):
        model.layers[i] = Hides(layer)
    x = torch.randn(2, 6, 16)
    with pytest.raises(AttributeError, match="self_attn"):
        swap(model, x)
    assert len(swap(model).census.swapped) == 2
    with torch.no_grad():
        torch.testing.assert_close(model.layers[0](x), stock.layers[0](x))
    assert runs(model) == [1, 0]


@pytest.mark.parametrize("only", ("*", "layers.0.*", "layers.1.*"))
def test_an_encoder_whose_every_row_is_padded_keeps_its_length_and_its_answer(only: str) -> None:
    """Packed and unpacked on the fast path, the answer once was as long as the longest row (pytorch#97111).

    Also where one layer alone is swapped, so that what PyTorch's own layer packed comes to ours, or the other way.
    """
    stock = encoder().eval()
    ours = copy.deepcopy(stock)
    swap(ours, only=only)
    x, filler = torch.randn(2, 6, 16), torch.tensor([[False] * 3 + [True] * 3, [False] * 4 + [True] * 2])
    truth = stock(x, src_key_padding_mask=filler)[~filler]
    for name in ("train", "eval", "eval no_grad", "eval inference"):
        before = runs(ours)
        with mode(name, ours):
            out = ours(x, src_key_padding_mask=filler)
        assert runs(ours) == [count + 1 for count in before], name
        assert out.shape == x.shape
        torch.testing.assert_close(out[~filler], truth, atol=5e-6, rtol=1e-5)


def test_padded_rows_stay_as_pytorch_has_them_in_eval() -> None:
    """With padding and no gradients stock packs the rows and fills the rest with zeros; a swap does not change that."""
    stock = encoder().eval()
    stock.norm = None
    ours = copy.deepcopy(stock)
    x, filler = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    done = swap(ours, {"src": x, "src_key_padding_mask": filler})
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, src_key_padding_mask=filler), stock(x, src_key_padding_mask=filler))
        assert not ours(x, src_key_padding_mask=filler)[filler].any()


# -- subclasses ----------------------------------------------------------------------------------------------------


class Doubled(nn.MultiheadAttention):
    """Adds to what super().forward gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 2, weights


class Own(nn.MultiheadAttention):
    """Computes something of its own."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return query, None


class Reads(nn.MultiheadAttention):
    """Its forward asks what a swapped module answers otherwise."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self._qkv_same_embed_dim
        return super().forward(*args, **kwargs)


def test_a_subclass_that_calls_super_keeps_its_additions() -> None:
    stock = Doubled(SIZE, HEADS, batch_first=True).double()
    ours = copy.deepcopy(stock)
    done = swap(ours)
    x = rand(2, 4, SIZE)
    out = ours(x, x, x, need_weights=False)[0]
    assert torch.allclose(out, stock(x, x, x)[0])
    assert runs(ours) == [1]
    assert isinstance(ours, Doubled)
    assert type(ours).__name__ == "Doubled"
    done.undo()
    assert type(ours) is Doubled


@pytest.mark.parametrize(
    "kind, word",
    ((Own, "Own computes attention in a forward of its own"), (Reads, "reads _qkv_same_embed_dim")),
)
def test_a_subclass_that_cannot_be_ours_is_left_alone(kind: Any, word: str) -> None:
    module = kind(SIZE, HEADS)
    (ticket,) = swap(nn.ModuleList([module])).census.tickets
    assert not ticket.swapped
    assert word in ticket.because
    if kind is Own:
        assert "test_multihead.py:" in ticket.because
    assert type(module) is kind


def _patch(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    return query * 3, None


def test_a_forward_patched_on_the_instance_is_left_alone() -> None:
    """And the census says by whom; what the other tool did still works."""
    module = nn.MultiheadAttention(SIZE, HEADS)
    module.forward = _patch  # type: ignore[method-assign]
    (ticket,) = swap(module).census.tickets
    assert not ticket.swapped
    assert "replaced on the instance" in ticket.because
    assert "_patch" in ticket.because
    x = torch.randn(2, 4, SIZE)
    assert torch.equal(module(x, x, x)[0], x * 3)


def test_a_copy_made_of_the_swapped_one_answers_the_same() -> None:
    """Stock parameters of a checkpoint load into it, and its own state loads into a stock module."""
    stock, ours = twins(batch_first=True)
    other = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double()
    other.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = rand(2, 4, SIZE)
    assert torch.allclose(other(x, x, x)[0], ours(x, x, x)[0])
    undo(ours)
    assert torch.allclose(other(x, x, x)[0], ours(x, x, x)[0])


def test_as_meant_runs_alone_without_gradients_too() -> None:
    """PyTorch's own shortcut inside nn.MultiheadAttention was given a projection without a bias, and raised."""
    module = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double().eval()
    x = rand(BATCH, QUERIES, SIZE)
    with torch.no_grad():
        expected = module(x, x, x, need_weights=False)[0]
        module.out_proj = nn.Sequential(module.out_proj)  # type: ignore[assignment]
        set_meant(module)
        torch.testing.assert_close(module(x, x, x, need_weights=False)[0], expected)
