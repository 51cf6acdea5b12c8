"""One call of xFormers' functions: its inputs as `headway.attention` takes them, and the answer as they give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from headway.errors import HeadwayError, RequestError
from headway.masks import Documents, Mask
from headway.masks.documents import Packing
from headway.masks.memo import lasts
from headway.shims.insist import insist
from headway.shims.plain import Plain, decision
from headway.shims.xformers.ops.fmha.attn_bias import AttentionBias, _Blocks, _KeysWithGaps
from headway.sites.kernel_arguments import xformers_heads, xformers_mask
from headway.sites.packed import Attends, Ends, Wanted, answered, attend_packed, attend_rows, kept, put, take, within


@dataclasses.dataclass
class Inputs:
    """What memory_efficient_attention and its kin are called with."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | AttentionBias | None = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def scale_float(self) -> float:
        return float(self.query.shape[-1] ** -0.5) if self.scale is None else self.scale

    def get_output_dtype(self) -> torch.dtype:
        """The answer's dtype: of parts that will be merged at least float32."""
        if self.output_dtype is not None:
            return self.output_dtype
        return torch.promote_types(self.query.dtype, torch.float32) if self.is_partial else self.query.dtype


def attend(inp: Inputs) -> Tensor:
    """Attention laid out as the query is."""
    return _answer(inp, Plain())[0]


def attend_with_lse(inp: Inputs) -> tuple[Tensor, Tensor]:
    """Attention, and the logs of its denominators: (B, H, M), or (B, G, H, M) if the query has groups."""
    out, lse = _answer(inp, Plain(lse=True, lse_learns=True))
    return out, cast(Tensor, lse)


def refusals(inp: Inputs) -> list[str]:
    """Why the call would be refused; nothing is computed."""
    asking = _Asking()
    try:
        _answer(inp, asking)
    except HeadwayError as error:
        return [str(error)]
    return asking.refused


def _answer(inp: Inputs, door: Attends) -> tuple[Tensor, Tensor | None]:
    query, bias = inp.query, inp.attn_bias
    q, k, v = xformers_heads(query, inp.key, inp.value)
    if isinstance(bias, _Blocks):
        out, *lse = (x[None] for x in _in_blocks(door, q, k, v, bias, inp))
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = xformers_mask(bias, query, q, k)
        out, *lse = answered(door, q, k, v, mask, Wanted(scale=inp.scale, dropout=inp.p))
        out = out.transpose(1, 2)
    out = out.reshape(*query.shape[:-1], inp.value.shape[-1]).to(inp.get_output_dtype()).contiguous()
    logs = lse[0] if lse else None
    return out, logs if logs is None or query.dim() != 5 else logs.unflatten(1, query.shape[2:4])


@dataclasses.dataclass(frozen=True)
class _Asking:
    """Whether there would be attention."""

    refused: list[str] = dataclasses.field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **options: Any) -> Tensor:
        found = decision(q, k, v, mask, **options)
        if found.chosen is None:
            self.refused.append(str(found))
        return q.new_empty(*q.shape[:3], v.shape[3])


# -- blocks -----------------------------------------------------------------------------------------------------------


def _in_blocks(door: Attends, q: Tensor, k: Tensor, v: Tensor, bias: _Blocks, inp: Inputs) -> tuple[Tensor, ...]:
    """q (1, L, H, D), k and v alike; the result (L, H, D), and lse (H, L) if the door tells it."""
    name = type(bias).__name__
    if q.shape[0] != 1 or k.shape[0] != 1:
        raise RequestError(
            f"got a batch of {q.shape[0]} with {name}, takes 1 with all sequences end to end: x.flatten(0, 1)[None]"
        )
    queries = bias.q_seqinfo.packing(f"the queries of {name}", q.shape[1], q.device)
    left, right, lower = bias._sides()
    wanted = Wanted(left, right, scale=inp.scale, dropout=inp.p)
    q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)  # an index's gradient would be a copy into zeros
    if isinstance(bias, _KeysWithGaps):
        ends = _ends(bias, queries, q.device)
        if queries.longest == 1:
            wanted = Wanted(scale=inp.scale, dropout=inp.p)  # the ends say it all
        rows, keys, values = (x.transpose(1, 2) for x in (put(q, queries), *_rows_of_keys(bias, k, v)))
        out, *lse = (x.transpose(1, 2) for x in attend_rows(door, rows, keys, values, wanted, ends))
        return (take(out, queries), *(take(x, queries).transpose(0, 1) for x in lse))
    others = queries
    if bias.k_seqinfo is not bias.q_seqinfo:
        others = bias.k_seqinfo.packing(f"the keys of {name}", k.shape[0], k.device)
    if lower or others is queries or (left, right) == (None, None):
        return attend_packed(door, q, k, v, queries, others, wanted)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))

    def make() -> Mask:
        return within(Documents.packed(queries, others), left, right, "upper-left", q)

    mask = kept(queries, others, None, q.device, ("upper-left", left, right), make)
    out, *lse = answered(door, q, k, v, mask, wanted)
    return (out.squeeze(0).transpose(0, 1), *(x.squeeze(0) for x in lse))


def _ends(bias: _KeysWithGaps, queries: Packing, device: torch.device) -> Ends:
    """Where the real queries and keys of each block end; once for all layers, while the bias stays as it is."""

    def make() -> Ends:
        counts, left = bias._key_spans()[1].to(device), bias._sides()[0]
        if queries.longest > 1:
            return Ends(queries.on(device).diff(), counts)
        # A block's only query, its last, sees all keys, or the last of them.
        return Ends(None, counts, None if left is None else (counts - 1 - left).clamp(min=0))

    held = [each for info in (bias, bias.q_seqinfo, bias.k_seqinfo) for each in vars(info).values()]
    tensors = [each for each in held if isinstance(each, Tensor)]
    if not lasts(device):
        return make()
    state: Any = [(id(each), each._version) for each in tensors if not each.is_inference()]
    if len(state) < len(tensors):  # the others do not tell when they change
        if any(each.device.type != "cpu" for each in tensors):
            return make()
        state = [each.tolist() for each in tensors]
    return kept(bias, queries, (state, bias._sides()), device, (), make)


def _rows_of_keys(bias: _KeysWithGaps, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """Keys and values (tokens, G, D) as (blocks, most, G, D).

    Where they lie is worked out on the device, from what the bias's tensors hold then: nothing is waited for, and a
    recorded CUDA graph follows them. What is no key becomes 0, as in a cache it may be anything, even NaN.
    """
    needed, places = bias._keys_needed(), bias._places(k.device)
    if needed not in (None, len(k)):
        raise RequestError(f"got {len(k)} keys with {type(bias).__name__}, takes the {needed} that it was made for")
    used = torch.arange(bias._width(), device=k.device) < bias._key_spans()[1].to(k.device)[:, None]
    if places is not None:
        places = torch.where(used, places, 0)
        insist(
            ((places >= 0) & (places < len(k))).all(),
            f"got keys of {type(bias).__name__} outside the {len(k)} that there are, takes blocks within them: look at"
            " its starts, lengths and pages",
        )
    for x in (k, v):
        rows = x.unflatten(0, used.shape) if places is None else x[places]
        yield torch.where(used[..., None, None], rows, 0.0)


def gradients(grad: Tensor, output: Tensor, lse: Tensor, inp: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, for an output and denominators that may be of more keys than these.

    Weights are exp(score - lse), and these keys' own answer has weights exp(score - own): each cotangent times
    exp(own - lse) is one for it, and what the output differs in is a cotangent of `own`.
    """
    learns = [x.detach().requires_grad_() for x in (inp.query, inp.key, inp.value)]
    with torch.enable_grad():
        out, own = attend_with_lse(dataclasses.replace(inp, query=learns[0], key=learns[1], value=learns[2]))
    lse = lse[..., : own.shape[-1]]
    share = torch.where(own.isneginf(), 0.0, (own.detach() - lse).exp()).movedim(-1, 1)
    wide, more = (_by_head(x).to(share.dtype) for x in (grad, out.detach() - output))
    push, over = wide * share.unsqueeze(-1), share * (wide * more).sum(-1)
    ends = [(out, push.reshape(out.shape).to(out.dtype)), (own, over.movedim(1, -1).to(own.dtype))]
    ends = [(end, cotangent) for end, cotangent in ends if end.requires_grad]
    found = torch.autograd.grad([end for end, _ in ends], learns, [c for _, c in ends], allow_unused=True)
    dq, dk, dv = (torch.zeros_like(x) if g is None else g for g, x in zip(found, learns, strict=True))
    return dq, dk, dv


def _by_head(x: Tensor) -> Tensor:
    """(B, M, *heads, K)."""
    return x.unsqueeze(2) if x.dim() == 3 else x
