"""nn.MultiheadAttention and its subclasses, alone and inside PyTorch's transformer layers.

A swapped module is the same object with the same parameters; only its class is another, which keeps the whole contract
of nn.MultiheadAttention.forward and computes by headway. Projections are read and called where the module has them, so
parametrizations, LoRA, quantised and other wrapped projections act.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.errors import RequestError
from headway.masks import Causal, Mask, from_attn_mask, from_key_padding_mask
from headway.masks.base import shape_of
from headway.sites.roles import rejoin, set_role, take_role
from headway.sites.seen import Seen
from headway.sites.site import HELD, Found, Site

KIND = "nn.MultiheadAttention"

Three = tuple[Tensor, Tensor, Tensor]


class Multihead(nn.MultiheadAttention):
    """What the class of a swapped module inherits, right above nn.MultiheadAttention."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """As it is, but False where nobody knows what this module is in.

        It could be a layer of PyTorch's, whose fast path would skip our forward. In a swapped model `Layer` answers.
        """
        alone = HELD in self.__dict__ and not self.__dict__[HELD].ticket.name
        return not alone and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as PyTorch has it
        batched = query.dim() == 3
        q, k, v = self._heads(*self._project(*self._batch_first(query, key, value)))
        # PyTorch takes the hint's word for it in these cases, and looks at the mask itself in the others.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = Causal("upper-left") if hinted else self._mask(attn_mask, key_padding_mask, q, k, batched)
        dropout = self.dropout if self.training else 0.0
        site: Site = self.__dict__[HELD]
        weights = None
        if need_weights:
            out, weights = site.in_full(q, k, v, mask, dropout=dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = site.attend(q, k, v, mask, dropout=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _batch_first(self, query: Tensor, key: Tensor, value: Tensor) -> Three:
        """(B, L, C) each; the same object stays the same object, as projections look for that."""
        if not (query.dim() == key.dim() == value.dim() and query.dim() in (2, 3)):
            raise RequestError(
                f"got query, key and value with {query.dim()}, {key.dim()} and {value.dim()} axes;"
                " takes 3 for each, or 2 for each without a batch"
            )
        if query.dim() == 3 and self.batch_first:
            q, k, v = query, key, value
        else:
            q = query.unsqueeze(0) if query.dim() == 2 else query.transpose(0, 1)
            k = q if key is query else key.unsqueeze(0) if key.dim() == 2 else key.transpose(0, 1)
            v = k if value is key else value.unsqueeze(0) if value.dim() == 2 else value.transpose(0, 1)
        if k.shape[:2] != v.shape[:2] or len(k) != len(q):
            raise RequestError(
                f"got query {shape_of(query)}, key {shape_of(key)} and value {shape_of(value)};"
                " takes one batch size, and one length for key and value"
            )
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Three:
        """By as few matrix products as the inputs allow."""
        weight, bias, size = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        elif query is key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            q = F.linear(query, weight[:size], None if bias is None else bias[:size])
            k, v = F.linear(key, weight[size:], None if bias is None else bias[size:]).chunk(2, -1)
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            pairs = zip((query, key, value), weight.chunk(3), biases, strict=True)
            q, k, v = (F.linear(x, w, b) for x, w, b in pairs)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = _appended(k, self.bias_k), _appended(v, self.bias_v)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return q, k, v

    def _heads(self, *projected: Tensor) -> Three:
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
        return q, k, v

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, batched: bool
    ) -> Mask | None:
        """Both masks as one; keys that this module adds are seen by all."""
        added = (self.bias_k is not None) + self.add_zero_attn
        batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2] - added
        masks: list[Mask] = []
        if attn_mask is not None:
            # Nothing is broadcast: a mask for each batch entry would pass for one for each head.
            _check_shape("attn_mask", attn_mask, (q_len, kv_len), (batch * self.num_heads, q_len, kv_len))
            masks.append(from_attn_mask(F.pad(attn_mask, (0, added)) if added else attn_mask, self.num_heads))
        if key_padding_mask is not None:
            _check_shape("key_padding_mask", key_padding_mask, (batch, kv_len) if batched else (kv_len,))
            masks.append(from_key_padding_mask(F.pad(key_padding_mask, (0, added)) if added else key_padding_mask))
        return functools.reduce(lambda one, other: one & other, masks) if masks else None

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Sequences of unequal lengths: padded, and the filler masked and cut off again."""
        if key_padding_mask is not None or not self.batch_first:
            raise RequestError(
                "got a nested query with key_padding_mask or batch_first=False;"
                " takes nested tensors alone, which say their lengths, and batch first"
            )
        q_lengths, k_lengths = ([len(row) for row in x.unbind()] for x in (query, key))
        q = query.to_padded_tensor(0.0)
        k = q if key is query else key.to_padded_tensor(0.0)
        v = k if value is key else value.to_padded_tensor(0.0)
        filler = torch.arange(k.shape[1], device=k.device) >= torch.tensor(k_lengths, device=k.device)[:, None]
        out, weights = self.forward(q, k, v, filler, need_weights, attn_mask, True, is_causal)
        rows = [row[:n] for row, n in zip(out.unbind(), q_lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=query.layout), weights


def _appended(x: Tensor, row: Tensor) -> Tensor:
    """One more key or value, the same for each batch entry."""
    return torch.cat((x, row.to(x.dtype).expand(len(x), 1, -1)), 1)


def _check_shape(what: str, mask: Tensor, *takes: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in takes:
        raise RequestError(f"got {what} {shape_of(mask)}, takes {' or '.join(map(str, map(list, takes)))}")


def find(model: nn.Module, seen: Seen | None) -> Iterator[Found]:
    """Every nn.MultiheadAttention of a model, once, with all its paths."""
    del seen  # a class says enough
    paths: dict[nn.MultiheadAttention, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            paths.setdefault(module, []).append(name)
    for module, (name, *aliases) in paths.items():
        yield Found(name, module, KIND, _why_not(module), tuple(aliases))


def patched(module: nn.Module) -> str:
    """Who replaced its forward on the instance, which no class can override; or ''."""
    own = module.__dict__.get("forward")
    if own is None:
        return ""
    where = getattr(own, "__module__", "?")
    return f"its forward was replaced on the instance (by {where}.{getattr(own, '__qualname__', own)})"


def _why_not(module: nn.MultiheadAttention) -> str:
    """Why its forward cannot be ours, or ''."""
    if because := patched(module):
        return because
    forward = getattr(type(module), "_original", type(module)).forward
    if forward is nn.MultiheadAttention.forward:
        return ""
    code = getattr(forward, "__code__", None)
    if code is None or not {"__class__", "super"} & {*code.co_freevars, *code.co_names}:
        where = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
        return f"{type(module).__name__} computes attention in a forward of its own{where}"
    if "_qkv_same_embed_dim" in code.co_names:
        return f"{type(module).__name__}'s own forward reads _qkv_same_embed_dim, which swapped may be False"
    return ""


def notes(model: nn.Module) -> Iterator[str]:
    """What a swap changes that is no speed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not _why_not(module) and not is_plain(module.out_proj):
            yield (
                f"{name or 'the model'}: PyTorch reads the weight of out_proj, a {type(module.out_proj).__name__}, and"
                " never calls it; swapped it is called, and the proof compares with PyTorch's forward calling it"
            )


def apply(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Give each named module its site and its new class, or none of them."""
    set_role(model, sites, Multihead)
    _set_around(model)


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give back the classes, of all sites or of the named; the very objects are as before."""
    take_role(model, Multihead, names)
    _set_around(model)


def _set_around(model: nn.Module) -> None:
    """What is around swapped modules has its class, and nothing else has."""
    take_role(model, Encoder)
    take_role(model, Layer)
    set_role(model, dict.fromkeys(_encoders(model)), Encoder)
    set_role(model, dict.fromkeys(_layers(model)), Layer)


class Layer(nn.TransformerEncoderLayer):
    """What the class of a layer of a swapped module inherits: its fast path would skip the module's forward."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """0, for which there is no fast path; nothing else asks. Adapters around the module need its own answers."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)


def _layers(model: nn.Module) -> Iterator[str]:
    """The layers whose attention is swapped, or something around it, such as an adapter."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.TransformerEncoderLayer) or "activation_relu_or_gelu" not in module.__dict__:
            continue
        attention = getattr(module, "self_attn", None)
        swapped = attention is not None and any(isinstance(inner, Multihead) for inner in attention.modules())
        if swapped and not isinstance(module, Layer):  # another role may lie over this one
            yield name


class Encoder(nn.TransformerEncoder):
    """What the class of an encoder of swapped modules inherits."""

    @property
    def use_nested_tensor(self) -> bool:
        """As it was set, but for layers whose weights are not where PyTorch would read them: it would raise."""
        layer = self.layers[0]
        linears = (getattr(layer, "linear1", None), getattr(layer, "linear2", None), layer.self_attn.out_proj)
        return self.__dict__["use_nested_tensor"] and all(hasattr(linear, "weight") for linear in linears)

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)


def _encoders(model: nn.Module, of: type = Multihead) -> Iterator[str]:
    """The encoders whose first layer is swapped: that layer is the one they look at."""
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and "use_nested_tensor" in module.__dict__:
            layers = list(module.layers)
            if layers and isinstance(getattr(layers[0], "self_attn", None), of):
                yield name


# -- the model as it was, and as it was meant ------------------------------------------------------------------------


class AsMeant(nn.MultiheadAttention):
    """PyTorch's own forward, but out_proj is called: PyTorch reads its weight, and what wraps or hooks it is lost.

    It keeps the fast path of PyTorch's layers away, which reads the weights of linear1 and linear2 in the same way.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return bool(self.__dict__.get("_inside") and self.__dict__["_qkv_same_embed_dim"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        project = self.out_proj
        unity = nn.Linear(self.embed_dim, self.embed_dim, device="meta")
        like = args[0] if args else kwargs["query"]
        unity.weight = nn.Parameter(torch.eye(self.embed_dim, dtype=like.dtype, device=like.device), False)
        unity.bias = nn.Parameter(like.new_zeros(self.embed_dim), False)  # the module's own fast path wants one
        self.__dict__["_inside"] = True
        self._modules["out_proj"] = unity
        try:
            out, weights = super().forward(*args, **kwargs)
        finally:
            self._modules["out_proj"] = project
            del self.__dict__["_inside"]
        return project(out), weights


def set_meant(model: nn.Module) -> None:
    """Make a model that is not swapped do what it means, where PyTorch's shortcuts do something else or raise."""
    set_role(model, dict.fromkeys(_wrapped(model)), AsMeant)
    set_role(model, dict.fromkeys(_encoders(model, AsMeant)), Encoder)


def _wrapped(model: nn.Module) -> list[str]:
    """The modules whose out_proj, or whose layer's linear1 or linear2, is more than a weight and a bias."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not _why_not(module) and not is_plain(module.out_proj):
            names.append(name)
        linears = (getattr(module, "linear1", None), getattr(module, "linear2", None))
        if isinstance(module, nn.TransformerEncoderLayer) and not all(map(is_plain, linears)):
            attention = module.self_attn
            if isinstance(attention, nn.MultiheadAttention) and not _why_not(attention):
                names.append(f"{name}.self_attn" if name else "self_attn")
    return list(dict.fromkeys(names))


def is_plain(linear: nn.Module | None) -> bool:
    """True if calling it is reading its weight and bias."""
    if not isinstance(linear, nn.Linear):
        return False
    hooks = linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__
    return type(linear).forward is nn.Linear.forward and not hooks
