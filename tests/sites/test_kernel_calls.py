"""Modules that call flash_attn's or xFormers' functions: redirected one by one, every argument honoured or refused.

The packages are stand-ins with the true signatures (flash_attn 2.8, flash_attn.cute, xFormers 0.0.35), computed by the
textbook: nothing of Headway is in them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import io
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites.made import Block, gpt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import headway
from headway.errors import HeadwayError, RequestError, SwapError
from headway.sites import kernel_calls
from headway.sites import packed as packed_rows
from headway.sites.site import site_of
from headway.swap import swap

# -- the packages -----------------------------------------------------------------------------------------------------


def unseen(function: Any) -> Any:
    """What a kernel does inside is no function of PyTorch's: no mode sees it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run


@unseen
def textbook(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, added: Any, scale: float | None, **how: Any) -> Tensor:
    """On (B, H, L, D); rows that see nothing are 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if how.get("softcap", 0.0) > 0:
        scores = how["softcap"] * torch.tanh(scores / how["softcap"])
    scores = (scores + added).masked_fill(~keep, float("-inf"))
    if how.get("sinks") is not None:
        scores = torch.cat((scores, how["sinks"][:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = torch.where(scores.isneginf().all(-1, keepdim=True), 0.0, scores).softmax(-1)
    return weights[..., : k.shape[2]].masked_fill(~keep, 0.0).to(v.dtype) @ v


def band(q_len: int, kv_len: int, left: int | None, right: int | None, offset: int) -> Tensor:
    step = torch.arange(kv_len)[None, :] - torch.arange(q_len)[:, None] - offset
    return (step >= (-kv_len - q_len if left is None else -left)) & (
        step <= (kv_len + q_len if right is None else right)
    )


def flash(q, k, v, dropout_p=0.0, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, sinks=None):
    """(B, L, H, D), as flash_attn lays it out; lower-right."""
    assert dropout_p == 0.0
    left, right = (None if side is None or side < 0 else side for side in window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    offset = k.shape[2] - q.shape[2]
    keep = band(q.shape[2], k.shape[2], left, 0 if causal else right, offset)
    added: Any = 0.0
    if slopes is not None:
        away = (torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None] - offset).abs()
        added = -slopes.view(-1, q.shape[1], 1, 1) * away
    return textbook(q, k, v, keep, added, scale, softcap=softcap, sinks=sinks).transpose(1, 2).contiguous()


def packed(q, k, v, q_starts, k_starts, *args, slopes=None, **kwargs):
    assert slopes is None or slopes.dim() == 1
    bounds = zip(q_starts[:-1], q_starts[1:], k_starts[:-1], k_starts[1:], strict=True)
    parts = [
        flash(q[None, a:b], k[None, c:d], v[None, c:d], *args, slopes=slopes, **kwargs)[0] for a, b, c, d in bounds
    ]
    return torch.cat(parts)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    CALLS.append("flash_attn_func")
    return flash(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    CALLS.append("flash_attn_kvpacked_func")
    return flash(q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    CALLS.append("flash_attn_qkvpacked_func")
    return flash(*qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    CALLS.append("flash_attn_varlen_func")
    how = (dropout_p, softmax_scale, causal, window_size, softcap)
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *how, slopes=alibi_slopes)


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    CALLS.append("flash_attn_varlen_kvpacked_func")
    how = (dropout_p, softmax_scale, causal, window_size, softcap)
    return packed(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, *how, slopes=alibi_slopes)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    CALLS.append("flash_attn_varlen_qkvpacked_func")
    how = (dropout_p, softmax_scale, causal, window_size, softcap)
    return packed(*qkv.unbind(1), cu_seqlens, cu_seqlens, *how, slopes=alibi_slopes)


def flash_attn_with_kvcache(q, k_cache, v_cache):
    return flash(q, k_cache, v_cache)


def cute() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        CALLS.append("cute.flash_attn_func")
        return flash(q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, learnable_sink), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, return_lse=False,
    ):  # fmt: skip
        CALLS.append("cute.flash_attn_varlen_func")
        how = (0.0, softmax_scale, causal, window_size, softcap)
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *how, sinks=learnable_sink), None

    return module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    CALLS.append("memory_efficient_attention")
    assert p == 0.0
    q, k, v = ((x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2)).transpose(1, 2) for x in (query, key, value))
    assert q.shape[1] == k.shape[1]
    added: Any = 0.0
    if isinstance(attn_bias, Tensor):
        added = attn_bias.unsqueeze(1) if query.dim() == 3 else attn_bias.flatten(1, -3)
    elif attn_bias is not None:
        added = attn_bias.materialize((q.shape[2], k.shape[2]))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    out = textbook(q, k, v, seen, added, scale).transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])
    return out.to(output_dtype or query.dtype).contiguous()


def module(name: str, *functions: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


class LowerTriangularMask:
    offset = staticmethod(lambda m, n: 0)
    left: int | None = None
    right: int | None = 0

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        m, n = shape
        return torch.zeros(m, n).masked_fill(~band(m, n, self.left, self.right, self.offset(m, n)), float("-inf"))


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    offset = staticmethod(lambda m, n: n - m)


class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    def __init__(self, _window_size: int) -> None:
        self._window_size, self.left = _window_size, _window_size - 1


class LocalAttentionFromBottomRightMask(LowerTriangularFromBottomRightMask):
    def __init__(self, window_left: int, window_right: int) -> None:
        self.window_left = self.left = window_left
        self.window_right = self.right = window_right


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        return super().materialize(shape) + self._bias


@dataclasses.dataclass
class Lengths:
    seqstart_py: list[int]


@dataclasses.dataclass
class BlockDiagonalMask:
    q_seqinfo: Lengths
    k_seqinfo: Lengths

    def block(self) -> Any:
        block = LowerTriangularMask()
        block.right = None
        return block

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        mask = torch.full(shape, float("-inf"))
        q, k = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        assert (q[-1], k[-1]) == shape
        for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
            mask[a:b, c:d] = self.block().materialize((b - a, d - c))
        return mask


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def block(self) -> Any:
        return LowerTriangularMask()


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def block(self) -> Any:
        return LowerTriangularFromBottomRightMask()


@dataclasses.dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalMask):
    _window_size: int = 2

    def block(self) -> Any:
        block = LowerTriangularMask()
        block.left = self._window_size - 1
        return block


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalLocalAttentionMask):
    def block(self) -> Any:
        return LowerTriangularFromBottomRightLocalAttentionMask(self._window_size)


class BlockDiagonalPaddedKeysMask:
    pass


CALLS: list[str] = []
"""What the stand-ins were called for; it shows whether a call was redirected."""

FLASH = [
    flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func,
    flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
]  # fmt: skip
for each in FLASH:
    each.__module__ = "flash_attn.flash_attn_interface"

flash_attn = module("flash_attn", *FLASH)
flash_attn.cute = cute()  # type: ignore[attr-defined]
fa4 = flash_attn.cute
xformers = module("xformers")
xops = xformers.ops = module("xformers.ops", memory_efficient_attention)  # type: ignore[attr-defined]
xops.fmha = module("xformers.ops.fmha", memory_efficient_attention)  # type: ignore[attr-defined]
also_known_as = flash_attn_func
causal_attention = functools.partial(flash_attn_func, causal=True)
SCALE = 0.25


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (flash_attn, flash_attn.cute, xformers, xops, xops.fmha):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    CALLS.clear()


# -- one call of each function ----------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Calls what `name` says with the arguments it is given, by each of the names there are."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = first * self.gain
        if self.name == "flash_attn_func":
            return flash_attn_func(first, *args, **kwargs)
        if self.name == "flash_attn_kvpacked_func":
            return flash_attn.flash_attn_kvpacked_func(first, *args, **kwargs)
        if self.name == "flash_attn_qkvpacked_func":
            return flash_attn_qkvpacked_func(first, *args, **kwargs)
        if self.name == "flash_attn_varlen_func":
            return flash_attn_varlen_func(first, *args, **kwargs)
        if self.name == "flash_attn_varlen_kvpacked_func":
            return flash_attn_varlen_kvpacked_func(first, *args, **kwargs)
        if self.name == "flash_attn_varlen_qkvpacked_func":
            return flash_attn_varlen_qkvpacked_func(first, *args, **kwargs)
        if self.name == "cute.flash_attn_func":
            return fa4.flash_attn_func(first, *args, **kwargs)
        if self.name == "cute.flash_attn_varlen_func":
            return flash_attn.cute.flash_attn_varlen_func(first, *args, **kwargs)
        if self.name == "fmha":
            return xformers.ops.fmha.memory_efficient_attention(first, *args, **kwargs)
        if self.name == "grouped":
            k, v, *rest = args
            k, v = (x.expand(*x.shape[:3], first.shape[3], x.shape[4]) for x in (k, v))
            return xops.memory_efficient_attention(first, k, v, *rest, **kwargs)
        assert self.name == "xops"
        return xops.memory_efficient_attention(first, *args, **kwargs)


def runs(model: nn.Module) -> int:
    sites = (site_of(module) for module in model.modules())
    return sum(sum(site.ticket.runs.values()) for site in sites if site is not None)


def compare(name: str, *args: Any, require: tuple[str, ...] = (), **kwargs: Any) -> None:
    """The answer and all gradients, against the package's own function."""
    stock, ours = Calls(name), Calls(name)
    swap(ours, require=require)  # without an example: the proof is a test of its own
    wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    theirs = stock(*args, **kwargs)
    CALLS.clear()
    mine = ours(*args, **kwargs)
    assert not CALLS, "the kernel itself ran"
    assert runs(ours) == 1
    assert type(mine) is type(theirs)
    if isinstance(theirs, tuple):
        assert (len(mine), mine[1]) == (2, None)
        mine, theirs = mine[0], theirs[0]
    assert (mine.shape, mine.dtype, mine.is_contiguous()) == (theirs.shape, theirs.dtype, True)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mix = torch.randn_like(theirs)
    wanted_of = ([*wanted, ours.gain], [*wanted, stock.gain])
    for one, other in zip(
        *(
            torch.autograd.grad((out * mix).sum(), of)
            for out, of in zip((mine, theirs), wanted_of, strict=True)
        ),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window": {"window_size": (2, 1)},
    "window to the left": {"window_size": (2, -1)},
    "window to the right": {"window_size": (-1, 1)},
    "window of one": {"window_size": (0, 0)},
    "causal window": {"causal": True, "window_size": (2, 3)},
    "softcap": {"softcap": 2.0, "causal": True},
    "softcap off": {"softcap": -1.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])},
    "causal alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1]), "causal": True},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", ((6, 6), (3, 7), (7, 3), (1, 5)), ids=str)
def test_flash_attn_func(lengths: tuple[int, int], option: dict[str, Any]) -> None:
    """Grouped heads; causal, windows and slopes from the lower right; queries that see nothing are 0."""
    q, k = rand(2, lengths[0], 4, 8), rand(2, lengths[1], 2, 8)
    compare("flash_attn_func", q, k, rand(2, lengths[1], 2, 8), **option)
    compare("flash_attn_kvpacked_func", q, rand(2, lengths[1], 2, 2, 8), **option)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_flash_attn_qkvpacked_func(option: dict[str, Any]) -> None:
    compare("flash_attn_qkvpacked_func", rand(2, 6, 3, 4, 8), **option)


def test_flash_attn_func_by_position() -> None:
    q, k = rand(2, 3, 4, 8), rand(2, 5, 2, 8)
    compare("flash_attn_func", q, k, rand(2, 5, 2, 8), 0.0, 0.3, True, (2, 0), 1.5, None, True, False)


@pytest.mark.parametrize("slopes", ((1, 4), (2, 4)), ids=str)
@pytest.mark.parametrize("lengths", ((4, 4), (3, 7)), ids=str)
def test_slopes_of_each_batch_entry(slopes: tuple[int, int], lengths: tuple[int, int]) -> None:
    batch = slopes[0]
    q, k = rand(batch, lengths[0], 4, 8), rand(batch, lengths[1], 4, 8)
    compare("flash_attn_func", q, k, rand(batch, lengths[1], 4, 8), alibi_slopes=torch.rand(slopes), causal=True)


def starts(*lengths: int) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_varlen_of_one_packing(option: dict[str, Any]) -> None:
    """The same lengths as one tensor, and as two that are equal."""
    both = starts(3, 1, 0, 5)
    q, k, v = rand(9, 4, 8), rand(9, 2, 8), rand(9, 2, 8)
    compare("flash_attn_varlen_func", q, k, v, both, both, 5, 5, **option)
    compare("flash_attn_varlen_func", q, k, v, both, both.clone(), 5, 5, **option)
    compare("flash_attn_varlen_kvpacked_func", q, rand(9, 2, 2, 8), both, both, 5, 5, **option)
    compare("flash_attn_varlen_qkvpacked_func", rand(9, 3, 4, 8), both, 5, **option)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", (((3, 1, 5), (4, 6, 5)), ((1, 1, 1), (4, 6, 2)), ((5, 2), (2, 0))), ids=str)
def test_varlen_of_two_packings(lengths: tuple[tuple[int, ...], tuple[int, ...]], name: str) -> None:
    """Diagonals end at the last key of each sequence by itself, not of all; some see nothing."""
    q_starts, k_starts = (starts(*each) for each in lengths)
    q, k = rand(int(q_starts[-1]), 4, 8), rand(int(k_starts[-1]), 2, 8)
    longest = max(lengths[0]), max(lengths[1])
    v = rand(int(k_starts[-1]), 2, 8)
    compare("flash_attn_varlen_func", q, k, v, q_starts, k_starts, *longest, **OPTIONS[name])


def test_packed_lengths_that_change_in_place_make_another_mask() -> None:
    ours, both = Calls("flash_attn_varlen_qkvpacked_func"), starts(2, 4)
    swap(ours)
    qkv = rand(6, 3, 4, 8)
    for changed in ((2, 4), (5, 1), (2, 4)):
        both.copy_(starts(*changed))
        out = ours(qkv, both, 6)
        torch.testing.assert_close(out, packed(*qkv.unbind(1), both, both), rtol=1e-4, atol=1e-5)


def test_masks_of_packed_lengths_are_shared_and_do_not_keep_them() -> None:
    ours, both, theirs = Calls("flash_attn_varlen_func"), starts(2, 4), starts(3, 3)
    swap(ours)
    site = site_of(ours)
    assert site is not None
    masks: list[Any] = []
    real = site.attend
    site.attend = lambda *a, **k: masks.append(a[3]) or real(*a, **k)  # type: ignore[method-assign]
    q = torch.randn(6, 4, 8)
    for _ in range(2):
        ours(q, q, q, both, theirs, 4, 3, causal=True)
    assert masks[0] is masks[1]
    gone = weakref.ref(both), weakref.ref(masks[0])
    del both, masks[:]
    headway_door().clear()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def headway_door() -> Any:
    return sys.modules["headway.attention"]._PLANS


CUTE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (2, None)},
    "off": {"window_size": (-1, -1)},
    "causal window": {"window_size": (2, 3), "causal": True},
    "sinks": {"learnable_sink": torch.tensor([0.5, -1.0, 0.0, 2.0])},
    "softcap": {"softcap": 2.0, "softmax_scale": 0.4, "num_splits": 2, "pack_gqa": True},
}


@pytest.mark.parametrize("option", CUTE.values(), ids=CUTE)
def test_flash_attn_cute(option: dict[str, Any]) -> None:
    q, k, v = rand(2, 3, 4, 8), rand(2, 7, 2, 8), rand(2, 7, 2, 8)
    compare("cute.flash_attn_func", q, k, v, **option)
    q, k, v = rand(6, 4, 8), rand(9, 2, 8), rand(9, 2, 8)
    lengths = {"cu_seqlens_q": starts(2, 4), "cu_seqlens_k": starts(5, 4), "max_seqlen_q": 4, "max_seqlen_k": 5}
    compare("cute.flash_attn_varlen_func", q, k, v, **lengths, **option)


def biases(m: int, n: int) -> Iterator[tuple[str, Any]]:
    yield "none", None
    yield "upper left", LowerTriangularMask()
    if n >= m:  # else rows see nothing, which xFormers leaves open
        yield "lower right", LowerTriangularFromBottomRightMask()
        yield "local causal", LowerTriangularFromBottomRightLocalAttentionMask(2)
        yield "local", LocalAttentionFromBottomRightMask(1, 2)


@pytest.mark.parametrize("lengths", ((6, 6), (3, 7), (7, 3)), ids=str)
@pytest.mark.parametrize("name", ("xops", "fmha"))
def test_memory_efficient_attention(name: str, lengths: tuple[int, int]) -> None:
    """One head, heads, and groups of heads that share keys; LowerTriangularMask is upper-left."""
    m, n = lengths
    for _, bias in biases(m, n):
        compare(name, rand(2, m, 8), rand(2, n, 8), rand(2, n, 6), attn_bias=bias)
        compare(name, rand(2, m, 3, 8), rand(2, n, 3, 8), rand(2, n, 3, 6), bias, 0.0, 0.3)
        compare(name, rand(2, m, 2, 3, 8), rand(2, n, 2, 3, 8), rand(2, n, 2, 3, 8), attn_bias=bias)
        compare("grouped", rand(2, m, 2, 3, 8), rand(2, n, 2, 1, 8), rand(2, n, 2, 1, 8), attn_bias=bias)


@pytest.mark.parametrize("heads", ((), (3,), (2, 3)), ids=str)
def test_a_tensor_as_bias(heads: tuple[int, ...]) -> None:
    bias = rand(2, *heads, 4, 5)
    q, k, v = rand(2, 4, *heads, 8), rand(2, 5, *heads, 8), rand(2, 5, *heads, 8)
    compare("xops", q, k, v, attn_bias=bias)
    compare("xops", q, k, v, attn_bias=bias, op=(None, None), output_dtype=torch.float64)
    if len(heads) == 1:
        compare("xops", q, k, v, attn_bias=LowerTriangularMaskWithTensorBias(bias))


def test_grouped_keys_of_xformers_are_not_copied() -> None:
    ours = Calls("xops")
    swap(ours)
    k, v = (torch.randn(2, 5, 2, 1, 8).expand(2, 5, 2, 3, 8) for _ in range(2))
    ours(torch.randn(2, 4, 2, 3, 8), k, v)
    site = site_of(ours)
    assert site is not None
    (decision,) = site.ticket.decisions.values()
    assert (decision.request.heads, decision.request.kv_heads) == (6, 2)


BLOCKS = (
    BlockDiagonalMask, BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask, BlockDiagonalCausalLocalAttentionFromBottomRightMask,
)  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("keys", ([0, 3, 4, 9], [0, 4, 6, 12]), ids=str)
def test_packed_sequences_of_xformers(kind: Any, keys: list[int]) -> None:
    bias = kind(Lengths([0, 3, 4, 9]), Lengths(keys))
    compare("xops", rand(1, 9, 3, 8), rand(1, keys[-1], 3, 8), rand(1, keys[-1], 3, 8), attn_bias=bias)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any], str]]:
    q, t, both = torch.randn(2, 4, 4, 8), torch.randn(6, 4, 8), starts(2, 4)
    four, three = (q,) * 3, (t,) * 3
    yield "weights", "flash_attn_func", four, {"return_attn_probs": True}, "headway.maps"
    yield "pages", "flash_attn_varlen_func", (*three, both, both, 4, 4), {"block_table": both}, "gather the pages"
    yield "axes", "flash_attn_func", three, {}, "(batch, length, heads, head_dim)"
    yield "packed axes", "flash_attn_varlen_func", (*four, both, both, 4, 4), {}, "(tokens, heads, head_dim)"
    yield "qkv", "flash_attn_qkvpacked_func", (q,), {}, "an axis of 3 before heads"
    yield "slopes", "flash_attn_func", four, {"alibi_slopes": torch.rand(3, 4)}, "(4,) or (2, 4)"
    yield "lengths", "flash_attn_varlen_func", (*three, starts(2, 3), starts(2, 3), 4, 4), {}, "add up"
    yield "an option nobody knows", "cute.flash_attn_func", four, {"score_mod": max}, "takes only its default None"
    yield "lse", "cute.flash_attn_func", four, {"return_lse": True}, "return_lse=True"
    yield "negative windows", "cute.flash_attn_func", four, {"window_size": (3, -1)}, "None for no bound"
    yield "half a packing", "cute.flash_attn_varlen_func", three, {"cu_seqlens_q": both}, "takes both or none"
    yield "lengths in use", "cute.flash_attn_varlen_func", four, {"seqused_k": both}, "got seqused_k"
    yield "an unknown bias", "xops", four, {"attn_bias": BlockDiagonalPaddedKeysMask()}, "BlockDiagonalPaddedKeysMask"
    yield "axes of a bias", "xops", four, {"attn_bias": torch.zeros(4, 4)}, "(B, H, M, N) for 4"
    yield "fewer key heads", "xops", (q, q[:, :, :2], q[:, :, :2]), {}, "expand key and value"
    yield "a batch of blocks", "xops", four, {"attn_bias": BlockDiagonalMask(Lengths([0, 4]), Lengths([0, 4]))}, "1"
    yield "2-D", "xops", (q[0, 0],) * 3, {}, "(B, M, K)"


@pytest.mark.parametrize("case", [case for case, *_ in refused()])
def test_what_cannot_be_honoured_is_refused(case: str) -> None:
    _, name, args, kwargs, words = next(each for each in refused() if each[0] == case)
    ours = Calls(name)
    swap(ours)
    with pytest.raises(HeadwayError) as caught:
        ours(*args, **kwargs)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not CALLS


def test_what_the_function_does_not_take_is_a_type_error() -> None:
    ours = Calls("flash_attn_func")
    swap(ours)
    q = torch.randn(1, 4, 2, 8)
    for args, wrong in (((q, q, q), {"window": 3}), ((q, q, q), {"q": q}), ((q, q), {}), ((q,) * 12, {})):
        with pytest.raises(TypeError, match="argument"):
            ours(*args, **wrong)


def test_a_signature_that_hides_its_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xops, "memory_efficient_attention", lambda *args, **kwargs: None)
    ours, q = Calls("xops"), torch.randn(1, 4, 2, 8)
    swap(ours)
    with pytest.raises(RequestError, match="does not name its arguments"):
        ours(q, q, q)


def test_deterministic_is_required_of_the_backend() -> None:
    ours = Calls("flash_attn_func")
    swap(ours)
    q = rand(1, 4, 2, 8)
    ours(q, q, q, deterministic=True), ours(rand(1, 5, 2, 8), *(rand(1, 5, 2, 8),) * 2)
    site = site_of(ours)
    assert site is not None
    assert site.require == ()


def test_dropout_is_the_callers() -> None:
    ours = Calls("flash_attn_func").eval()
    swap(ours)
    q = torch.randn(1, 6, 2, 8)
    torch.manual_seed(5)
    one = ours(q, q, q, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(one, ours(q, q, q, dropout_p=0.5))
    many = torch.stack([ours(q, q, q, dropout_p=0.5) for _ in range(400)])
    assert ((many.mean(0) - flash(q, q, q)).abs() / (many.std(0) / 20)).max() < 6


# -- models -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One method that calls, one that does not, and a lambda that does, with a global beside the kernel."""

    def __init__(self, size: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(size, 3 * size), nn.Linear(size, size), heads

    def split(self, x: Tensor) -> Any:
        return (y.unflatten(-1, (self.heads, -1)) for y in self.qkv(x).chunk(3, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
        run = lambda: flash_attn_func(q, k, v, softmax_scale=SCALE, causal=causal)  # noqa: E731
        return run()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.split(x)).flatten(2))


TOKENS = torch.arange(12).view(2, 6) % 11


def trace(model: nn.Module) -> list[Any]:
    return [(type(m), {k: v for k, v in m.__dict__.items() if k != "training"}) for m in model.modules()]


def test_a_model_is_proven_trained_and_undone() -> None:
    stock = gpt(Attention)
    ours = copy.deepcopy(stock)
    was = trace(ours)
    done = swap(ours, TOKENS)
    assert [ticket.name for ticket in done.census.swapped] == ["1.attention", "2.attention"], str(done)
    assert {ticket.kind for ticket in done.census.tickets} == {kernel_calls.KIND}
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    assert all(proof.judge == "float64" and proof.backends for proof in done.certificate.proofs)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (stock, ours)]
    for _ in range(3):
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            CALLS.clear()
            optimizer.zero_grad()
            F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
            optimizer.step()
            assert bool(CALLS) == (model is stock)
    for one, other in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    done.undo()
    assert all(a[0] is b[0] and a[1] == b[1] for a, b in zip(trace(ours), was, strict=True))
    CALLS.clear()
    ours(TOKENS)
    assert CALLS == ["flash_attn_func"] * 2
    assert type(ours[1].attention) is Attention


def test_nothing_process_wide_is_changed() -> None:
    """Neither the packages, nor the model's Python module, nor its class; before, during and after."""
    here = sys.modules[__name__]
    before = dict(vars(here)), dict(vars(flash_attn)), dict(vars(Attention)), dict(sys.modules)
    ours = gpt(Attention)
    done = swap(ours, TOKENS)
    ours(TOKENS)
    for _ in range(2):
        assert vars(here) is Attention.forward.__globals__
        assert dict(vars(here)) == before[0]
        assert all(vars(here)[name] is value for name, value in before[0].items())
        assert dict(vars(flash_attn)) == before[1]
        assert dict(vars(Attention)) == before[2]
        assert sys.modules["flash_attn"] is before[3]["flash_attn"]
        done.undo()


def test_two_models_of_one_class() -> None:
    ours, other = gpt(Attention), gpt(Attention)
    done = swap(ours, TOKENS)
    CALLS.clear()
    mine, theirs = ours(TOKENS), other(TOKENS)
    assert CALLS == ["flash_attn_func"] * 2
    torch.testing.assert_close(mine, theirs)
    assert type(other[1].attention) is Attention
    assert sum(sum(ticket.runs.values()) for ticket in done.census.swapped) == 2


def test_only_one_of_two_and_backends_by_name() -> None:
    ours = gpt(Attention)
    swap(ours, TOKENS, only="1.*", backend={"1.*": "reference"})
    CALLS.clear()
    ours(TOKENS)
    assert CALLS == ["flash_attn_func"]
    site = site_of(ours[1].attention)
    assert site is not None
    assert set(site.ticket.runs) == {"reference"}


def test_globals_are_looked_up_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model's module binds anew is what the method sees; also another kernel by the same name."""
    ours, stock = gpt(Attention), gpt(Attention)
    swap(ours)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    torch.testing.assert_close(ours(TOKENS), stock(TOKENS))
    monkeypatch.setitem(globals(), "flash_attn_func", lambda q, k, v, **_: v)
    torch.testing.assert_close(ours(TOKENS), stock(TOKENS))


def test_threads_and_models_do_not_mix() -> None:
    models = {name: gpt(Attention) for name in ("reference", "sdpa-math")}
    for name, model in models.items():
        swap(model, TOKENS, backend=name)
    CALLS.clear()
    truth, wrong = gpt(Attention)(TOKENS), []

    def work(name: str) -> None:
        for _ in range(20):
            if not torch.allclose(models[name](TOKENS), truth, atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in (*models, *models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for name, model in models.items():
        sites = [site for site in map(site_of, model.modules()) if site is not None]
        assert all(set(site.ticket.runs) == {name} for site in sites)
        assert [sum(site.ticket.runs.values()) for site in sites] == [40, 40]


def test_copies_and_pickles_are_swapped_and_can_be_undone() -> None:
    ours = gpt(Attention)
    swap(ours, TOKENS)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    truth, before = gpt(Attention)(TOKENS), runs(ours)
    for again in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        CALLS.clear()
        torch.testing.assert_close(again(TOKENS), truth)
        assert not CALLS
        assert runs(again) == before + 2
        headway.undo(again)
        assert [type(m) for m in again.modules()] == [type(m) for m in gpt(Attention).modules()]
        assert not any("_headway" in m.__dict__ for m in again.modules())
        again(TOKENS)
        assert CALLS == ["flash_attn_func"] * 2
    assert runs(ours) == before


def test_hooks_and_signatures_stay() -> None:
    ours, seen = gpt(Attention), []
    attention = ours[1].attention
    signature = inspect.signature(attention.forward)
    attention.register_forward_hook(lambda *_: seen.append("hook"))
    swap(ours)
    ours(TOKENS)
    assert seen == ["hook"]
    assert inspect.signature(attention.forward) == signature
    assert inspect.signature(attention.attend) == inspect.signature(Attention().attend)


class Checkpointed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        inside = lambda *given: flash_attn_func(*given, causal=True)  # noqa: E731
        once = checkpoint(inside, q, k, v, use_reentrant=False)
        return self.out(checkpoint(self.attend, once, k, v, use_reentrant=False).flatten(2))


def test_what_is_computed_again_in_backward_is_redirected_too() -> None:
    ours, x = Checkpointed(), torch.randn(2, 5, 16)
    done = swap(ours, x)
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    stock = Checkpointed()
    stock.load_state_dict(ours.state_dict())
    for model in (stock, ours):
        CALLS.clear()
        model(x).sum().backward()
    assert not CALLS
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Outer(nn.Module):
    """Calls by itself, and holds a module of another class that does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None]
        return self.inner(xops.memory_efficient_attention(x, x, x).flatten(2))


@pytest.mark.parametrize("only", ("", "inner"))
def test_modules_inside_each_other(only: str) -> None:
    ours, x = Outer(), torch.randn(2, 5, 16)
    truth = ours(x)
    swap(ours, x, only=only)
    CALLS.clear()
    torch.testing.assert_close(ours(x), truth)
    (name,) = CALLS
    assert name == ("memory_efficient_attention" if only else "flash_attn_func")
    swap(ours, x)
    CALLS.clear()
    torch.testing.assert_close(ours(x), truth)
    assert not CALLS


class Named(nn.Module):
    """By another name, by a partial, and with a keyword-only default of the method's own."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        x = also_known_as(x, x.flip(1), x.roll(1, 1), causal=causal)
        return causal_attention(x, x.flip(1), x.roll(1, 1), softmax_scale=SCALE)


class Inherits(Named):
    def forward_twice(self, x: Tensor) -> Tensor:
        return self(self(x))


@pytest.mark.parametrize("kind", (Named, Inherits))
def test_other_names_partials_and_inherited_methods(kind: type[nn.Module]) -> None:
    ours, x = kind(), torch.randn(2, 5, 2, 8)
    truth = ours(x)
    done = swap(ours, x)
    assert done.census.swapped, str(done)
    CALLS.clear()
    torch.testing.assert_close(ours(x), truth)
    assert not CALLS


class SaysSuper(Named):
    """super() needs the class that its own cell holds."""

    def forward(self, x: Tensor) -> Tensor:
        super().train(self.training)
        return flash_attn_func(x, x, x) + len([1, 2])


def test_super_inside_a_method_that_calls() -> None:
    ours, x = SaysSuper(), torch.randn(2, 5, 2, 8)
    truth = ours(x)
    assert swap(ours, x).census.swapped
    torch.testing.assert_close(ours(x), truth)


# -- left alone -------------------------------------------------------------------------------------------------------


def helper(x: Tensor) -> Tensor:
    return flash_attn_func(x, x, x)


def helpers_helper(x: Tensor) -> Tensor:
    return helper(x)


class ByHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helpers_helper(x)


class ByImport(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from flash_attn import flash_attn_func

        return flash_attn_func(x, x, x)


class ByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function = flash_attn_func

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, x, x)


class ByPartialAttribute(ByAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.function = functools.partial(flash_attn_func, causal=True)


class ByClassAttribute(nn.Module):
    function = staticmethod(flash_attn_func)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, x, x)


class ByDefault(nn.Module):
    def forward(self, x: Tensor, function: Callable[..., Tensor] = flash_attn_func) -> Tensor:
        return function(x, x, x)


class Statically(nn.Module):
    @staticmethod
    def attend(x: Tensor) -> Tensor:
        return flash_attn_func(x, x, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Decorated(nn.Module):
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return flash_attn_func(x, x, x)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global WRITTEN
        WRITTEN = 1
        return flash_attn_func(x, x, x)


class BySuper(Named):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ByClass(nn.Module):
    def attend(self, x: Tensor) -> Tensor:
        return flash_attn_func(x, x, x)

    def forward(self, x: Tensor) -> Tensor:
        return ByClass.attend(self, x)


class OfAClass:
    function = staticmethod(flash_attn_func)


class Processor:
    def __call__(self, x: Tensor) -> Tensor:
        return xops.memory_efficient_attention(x, x, x)


class ByProcessor(nn.Module):
    """As diffusers' attention."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(x)


class ByAnothersAttribute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OfAClass.function(x, x, x)


class OnlyCache(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return flash_attn_with_kvcache(x, x, x)


def closed_over() -> nn.Module:
    function = flash_attn_func

    class ByClosure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x, x, x)

    return ByClosure()


class Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return flash_attn_func(x, x, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class ByAutograd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Autograd.apply(x)


def line(function: Any) -> str:
    return f"{__file__}:{inspect.unwrap(function).__code__.co_firstlineno}"


LEFT: dict[Any, str] = {
    ByHelper: f"helper ({line(helper)}), which it calls, calls flash_attn_func with globals of its own",
    ByImport: f"({line(ByImport.forward)}) imports flash_attn itself",
    ByAttribute: "it holds flash_attn_func itself, as self.function",
    ByPartialAttribute: "it holds flash_attn_func itself, as self.function",
    ByClassAttribute: "its class holds flash_attn_func itself, as function",
    ByDefault: "has flash_attn_func from a default",
    Statically: "attend is no plain method",
    Decorated: "Decorated.forward",
    Writes: "binds WRITTEN there",
    BySuper: f"calls Named.forward ({line(Named.forward)}) by super()",
    ByClass: "ByClass.attend",
    ByAnothersAttribute: "has flash_attn_func from OfAClass",
    ByProcessor: "Processor.__call__",
    OnlyCache: "it calls flash_attn_with_kvcache, of which no site understands the arguments",
    closed_over: "has flash_attn_func from function",
    ByAutograd: "Autograd.forward",
}


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
def test_out_of_reach_is_left_alone_and_said(make: Any) -> None:
    """Never silently missed: with an example and without, the census says where the call is."""
    model = nn.Sequential(make())
    kinds, x = [type(m) for m in model.modules()], torch.randn(2, 5, 2, 8)
    for example in (None, x):
        done = swap(model, example)
        assert [type(m) for m in model.modules()] == kinds
        (ticket,) = done.census.tickets
        assert LEFT[make] in ticket.because
        assert ticket.kind == kernel_calls.KIND
    CALLS.clear()
    model(x)
    assert CALLS or make is OnlyCache


class Deep(nn.Module):
    """A class of transformers', with one of the user's own above it."""

    def forward(self, x: Tensor) -> Tensor:
        return flash_attn_func(x, x.flip(1), x.roll(1, 1))


def test_classes_of_transformers_are_another_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return flash_attn_func(x, x.flip(1), x.roll(1, 1), causal=True)

    monkeypatch.setattr(Deep, "__module__", "transformers.models.deep")
    assert not swap(Deep()).census.tickets
    assert len(swap(Own()).census.swapped) == 1


def test_a_forward_replaced_on_the_instance_is_left_alone() -> None:
    model = nn.Sequential(Attention())
    was = model[0].forward
    model[0].forward = lambda x: was(x) * 2  # type: ignore[method-assign]
    (ticket,) = swap(model).census.tickets
    assert "replaced on the instance" in ticket.because


class Branches(nn.Module):
    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch in ("kernel", "both"):
            x = flash_attn_func(x, x, x)
        if self.branch in ("sdpa", "both"):
            x = F.scaled_dot_product_attention(x, x, x)
        return x


def test_the_branch_that_the_example_takes_decides() -> None:
    x = torch.randn(2, 5, 2, 8)

    def tickets(branch: str) -> list[tuple[str, bool]]:
        return [(ticket.kind, ticket.swapped) for ticket in swap(Branches(branch), x).census.tickets]

    sdpa = "F.scaled_dot_product_attention"
    assert tickets("kernel") == [(kernel_calls.KIND, True)]
    assert tickets("sdpa") == [(sdpa, True)]
    assert tickets("both") == [(kernel_calls.KIND, False), (sdpa, True)]
    assert tickets("neither") == [(kernel_calls.KIND, False)]


class Decodes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return flash_attn_with_kvcache(x, x, x) if x.shape[1] == 1 else flash_attn_func(x, x, x)


def test_calls_that_stay_are_noted() -> None:
    ours, x = Decodes(), torch.randn(2, 5, 2, 8)
    done = swap(ours, x)
    assert done.census.swapped
    assert done.census.notes == ("the model: calls of flash_attn_with_kvcache stay with their package",)
    torch.testing.assert_close(ours(x[:, :1]), flash_attn_with_kvcache(*(x[:, :1],) * 3))


# -- the proof --------------------------------------------------------------------------------------------------------


class OnlyHalf(nn.Module):
    """Calls a function that refuses float64, as flash_attn does."""

    def forward(self, x: Tensor) -> Tensor:
        return xops.memory_efficient_attention(x, x.flip(1), x.roll(1, 1))


@pytest.mark.parametrize(
    "refusal", [RuntimeError("only support fp16 and bf16 data type"), KeyError(torch.float64)], ids=["said", "xFormers"]
)
def test_a_kernel_that_refuses_float64_judges_itself(monkeypatch: pytest.MonkeyPatch, refusal: Exception) -> None:
    """xFormers on a GPU looks an alignment up by dtype, and raises what the lookup does."""

    def strict(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        if query.dtype == torch.float64:
            raise refusal
        return memory_efficient_attention(query, key, value, attn_bias, p, scale)

    monkeypatch.setattr(xops, "memory_efficient_attention", strict)
    done = swap(OnlyHalf(), torch.randn(2, 5, 2, 8))
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    (proof,) = done.certificate.proofs
    assert f"the model as it was ({type(refusal).__name__}: {refusal}" in proof.judge


def test_a_kernel_that_does_not_run_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        raise NotImplementedError("no operator for cpu")

    monkeypatch.setattr(xops, "memory_efficient_attention", fails)
    ours, x = OnlyHalf(), torch.randn(2, 5, 2, 8)
    with pytest.raises(SwapError, match="no operator for cpu") as caught:
        swap(ours, x)
    assert "without an example" in str(caught.value)
    assert type(ours) is OnlyHalf
    done = swap(ours)
    assert "not proven" in str(done)
    torch.testing.assert_close(ours(x), memory_efficient_attention(x, x.flip(1), x.roll(1, 1)))


def test_a_call_that_is_refused_fails_the_proof_and_is_put_back() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return flash_attn_func(x, x, x, return_attn_probs=True)

    ours = Asks()
    done = swap(ours, torch.randn(2, 5, 2, 8))
    (ticket,) = done.census.tickets
    assert "failed the proof" in ticket.because
    assert RequestError.__name__ in ticket.because
    assert type(ours) is Asks


def test_wrong_kernels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares with the model's own kernel: were causal taken from the upper left, it would fail."""
    real = packed_rows.band
    monkeypatch.setattr(packed_rows, "band", lambda left, right, align: real(left, right, "upper-left"))
    x = torch.randn(2, 3, 2, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    ours = Calls("flash_attn_func")
    (ticket,) = swap(ours, (*x, 0.0, None, True)).census.tickets
    assert "failed the proof" in ticket.because


def test_without_the_packages_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "xformers", "xformers.ops", "xformers.ops.fmha"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "headway.shims", raising=False)
    monkeypatch.setattr(kernel_calls, "_look_at_class", None)
    assert not list(kernel_calls.find(gpt(Attention), None))


def test_torch_compile_leaves_the_method_to_the_interpreter() -> None:
    """A tracer knows no such globals: it breaks its graph there, and what is around is compiled."""
    ours, stock, x = Block(Attention()), Block(Attention()), torch.randn(2, 5, 16)
    stock.load_state_dict(ours.state_dict())
    swap(ours, x)
    torch._dynamo.reset()
    compiled, theirs = (torch.compile(model, backend="eager") for model in (ours, stock))
    for given in (x, torch.randn(2, 6, 16)):
        before = runs(ours)
        CALLS.clear()
        out = compiled(given)
        assert not CALLS
        assert runs(ours) == before + 1
        torch.testing.assert_close(out, stock(given))
        torch.testing.assert_close(theirs(given), stock(given))
        assert CALLS
