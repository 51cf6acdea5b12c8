"""Hugging Face transformers: modules that compute attention through its AttentionInterface, and their masks.

`register()` makes `attn_implementation="headway"` a name that every model with that interface takes. A swap needs more,
as modules, and models, share one config, which must stay as it is. Each swapped module sees it through a view in which
attention is Headway's. Once all modules of a config are swapped the models that hold it do too: they make the masks.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary

from headway.attention import attention
from headway.backends.reference import in_full
from headway.errors import RequestError
from headway.masks import Bias, Causal, Documents, Frame, Full, Mask, Padding, Window, from_transformers
from headway.sites.seen import Seen
from headway.sites.site import HELD, Found, Site, site_of

KIND = "transformers"
NAME = "headway"

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What modules of transformers ask for the function that computes attention."""

_INTERNAL = "_attn_implementation_internal"
"""Where a config keeps its attn_implementation."""

_LOAD = "_load_from_state_dict"

_NOT_ATTENTIONS = frozenset(
    {
        *("position_ids", "position_embeddings", "cache_position", "seq_idx", "layer_idx"),
        *("past_key_value", "past_key_values", "use_cache", "return_dict", "logits_to_keep", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits", "labels", "input_ids", "inputs_embeds", "token_type_ids"),
    }
)
"""Arguments of models that come along to attention and that say nothing to it. What any other says must be known."""

_HONOURED = frozenset({"output_attentions", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})

_COLLECTORS: list[Any] = []
"""Where transformers' hooks say what they collect; empty until `register`, as nothing here may load transformers."""


def register() -> None:
    """Make "headway" an attn_implementation of transformers, for this process; nothing that is there changes."""
    masking = importlib.import_module("transformers.masking_utils")
    modeling = importlib.import_module("transformers.modeling_utils")
    capturing = sys.modules.get("transformers.utils.output_capturing")  # since 5.0; modeling_utils loads it
    _COLLECTORS[:] = [] if capturing is None else [capturing._active_collector]
    modeling.AttentionInterface.register(NAME, attend)
    masking.AttentionMaskInterface.register(NAME, mask)


# -- the call ---------------------------------------------------------------------------------------------------------


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' models ask for it: (B, L, H, D), and its weights where the caller wants them.

    A 4-D mask is all there is to say about who sees whom, as it is for sdpa. Without one, `is_causal` and
    `sliding_window` say it, by sdpa's rules.
    """
    _refuse_unknown(kwargs)
    q, k, v = _one_batch(query, key, value)
    if isinstance(scaling, Tensor):  # learned: its gradient goes through the query
        q, scaling = q * scaling, 1.0
    q_len, kv_len = q.shape[2], k.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _given(attention_mask, module, q, k)
    if mask is None:
        # A cache may hold room for keys to come, and then the queries are its first: sdpa's upper-left alignment.
        if q_len > 1 and causal and kv_len > q_len:
            k, v = k[:, :, :q_len], v[:, :, :q_len]
            position_bias = None if position_bias is None else position_bias[..., :q_len]
        mask = _from_flags(q_len, k.shape[2], causal, sliding_window)
    parts = [mask, _packed(kwargs, q, k), None if position_bias is None else Bias(position_bias)]
    mask = _all(*(part for part in parts if part is not None))
    wants: dict[str, Any] = {"scale": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    site = site_of(module)
    if _wants_weights(module, kwargs):
        out, weights = (in_full if site is None else site.in_full)(q, k, v, mask, **wants)
        return out.transpose(1, 2).contiguous(), nn.functional.pad(weights, (0, kv_len - k.shape[2]))
    out = attention(q, k, v, mask, **wants) if site is None else site.attend(q, k, v, mask, **wants)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is None or value is False or name in _NOT_ATTENTIONS or name in _HONOURED:
            continue
        raise RequestError(
            f"got {name}={type(value).__name__} for attention, which Headway does not know and will not ignore;"
            f" takes {', '.join(sorted(_HONOURED))} and what AttentionInterface names;"
            " leave this module out (skip=...), or keep its attn_implementation"
        )


def _one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Learned queries come with a batch of one, which sdpa broadcasts."""
    if query.shape[0] == key.shape[0]:
        return query, key, value
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value))
    return query, key, value


def _given(attention_mask: Any, module: nn.Module, q: Tensor, k: Tensor) -> Mask | None:
    """The mask that came with the call, with its structure if it still has it."""
    if attention_mask is None or isinstance(attention_mask, Tensor):
        _refuse_flash(module)
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Typed) and attention_mask.typed is not None:
        if attention_mask.typed_for(q, k):
            return None if attention_mask.skips else attention_mask.typed
        attention_mask = attention_mask.plain()
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (3, 4):
        what = f"{attention_mask.dim()}-D" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise RequestError(
            f"got a {what} attention_mask at the attention call, takes 4-D (batch, heads, queries, keys) or none;"
            " let the model make the mask with attn_implementation='headway', or swap all attention of the model"
        )
    return _kept(attention_mask, _from_tensor)


def _refuse_flash(module: nn.Module) -> None:
    """Flash attention's masks leave packing to its own code, which is not there to see it."""
    config = module.__dict__.get("config")
    if not isinstance(config, _View) or config._makes_masks:
        return
    made_for = config.__dict__[_INTERNAL]
    if "flash" in (made_for or ""):
        raise RequestError(
            f"got a mask made for {made_for!r}, which leaves out what flash attention finds itself; takes one made"
            " for 'headway', 'sdpa' or 'eager': model.set_attn_implementation('sdpa') first, or swap all attention"
        )


def _from_tensor(mask: Tensor) -> Mask:
    return from_transformers(mask if mask.dim() == 4 else mask[None])


def _kept(tensor: Tensor, make: Callable[[Tensor], Mask]) -> Mask:
    """The mask made of a tensor, once for all layers that are given it; kept with the tensor until that changes."""
    if is_compiling() or type(tensor) is not Tensor or tensor.requires_grad or tensor.is_inference():
        return make(tensor)
    held: tuple[int, Mask] | None = _MASKS.get(tensor)
    if held is None or held[0] != tensor._version:
        # Of an alias, which has the same version: a mask of the tensor itself would keep it alive.
        held = _MASKS[tensor] = tensor._version, make(tensor.detach())
    return held[1]


_MASKS: Any = WeakIdKeyDictionary()


def _from_flags(q_len: int, kv_len: int, causal: bool, window: int | None) -> Mask | None:
    align: Any = None if q_len == kv_len else "lower-right"
    band = Causal(align) if q_len > 1 and causal else None
    if window is None or kv_len <= window:
        return band
    return _all(Window(window - 1, None if causal else window - 1, align), *(() if band is None else (band,)))


def _packed(kwargs: Mapping[str, Any], q: Tensor, k: Tensor) -> Mask | None:
    """Packed sequences by their cumulative lengths."""
    q_starts, k_starts = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if q_starts is None and k_starts is None:
        return None
    if q_starts is None or k_starts is None or q.shape[0] != 1:
        raise RequestError(
            f"got cu_seq_lens_q and cu_seq_lens_k {'for a batch' if q.shape[0] != 1 else 'one without the other'};"
            " takes both, and a batch of 1 with all sequences laid end to end; pass position_ids instead"
        )
    longest = kwargs.get("max_length_q")
    if q_starts is k_starts and longest is not None and q.shape[2] == k.shape[2]:
        total, longest = q.shape[2], int(longest)
        return _kept(q_starts, lambda starts: Documents.from_cu_seqlens(starts, longest=longest, total=total))
    return Documents(q_starts.diff(), k_starts.diff())


def _all(*masks: Mask) -> Mask | None:
    return functools.reduce(lambda one, other: one & other, masks) if masks else None


def _wants_weights(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """True if the caller wants weights: as this call says, or the config, or hooks that collect what models return."""
    if kwargs.get("output_attentions"):
        return True
    config = module.__dict__.get("config")
    if config is not None and config.__dict__.get("_output_attentions"):
        return True
    collected = [collector.get() or () for collector in _COLLECTORS]
    return any(key.endswith("attentions") for keys in collected for key in keys)


# -- the mask ---------------------------------------------------------------------------------------------------------


class Typed(Tensor):
    """A 4-D bool mask as transformers' models pass it on, that holds a typed mask and no numbers.

    Models only carry a mask from where it is made to attention. One that looks inside (slices it, adds to it) gets the
    numbers, as sdpa would have them, and from then on this is a plain mask too: nothing can part the two.
    """

    typed: Mask | None
    frame: Frame
    skips: bool
    """True where sdpa gets no mask, and goes by is_causal."""
    _plain: Tensor | None

    @staticmethod
    def __new__(cls, typed: Mask, frame: Frame, skips: bool) -> Typed:
        shape = (frame.batch, 1, frame.q_len, frame.kv_len)
        self: Typed = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=frame.device)
        self.typed, self.frame, self.skips, self._plain = typed, frame, skips, None
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) and args[0].typed is not None:
            return args[0].again()
        args, kwargs = torch.utils._pytree.tree_map_only(Typed, Typed.plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def again(self) -> Typed:
        assert self.typed is not None
        return Typed(self.typed, self.frame, self.skips)

    def typed_for(self, q: Tensor, k: Tensor) -> bool:
        """True if the call is of the shape that this was made for."""
        frame = self.frame
        return (frame.batch, frame.q_len, frame.kv_len) == (q.shape[0], q.shape[2], k.shape[2])

    def plain(self) -> Tensor:
        """The numbers. Whoever has them may change them, so the typed mask is given up."""
        if self._plain is None:
            assert self.typed is not None
            self._plain = self.typed.to_bool(self.frame).expand(self.shape).contiguous()
            self.typed = None
        return self._plain

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Typed({self._plain if self.typed is None else self.typed!r})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.plain().clone() if self.typed is None else self.again()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)


def mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A model's mask: typed where its function says a structure, else bools exactly as sdpa has them."""
    asked: dict[str, Any] = {"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, **kwargs}
    asked |= {"attention_mask": attention_mask, "local_size": local_size, "device": device}
    asked |= {"allow_is_causal_skip": allow_is_causal_skip, "allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    if cache_position is None:
        asked |= {"q_length": q_length, "q_offset": q_offset}
    else:  # transformers 4
        asked["cache_position"], q_length, q_offset = cache_position, len(cache_position), cache_position[0]
    masking = sys.modules["transformers.masking_utils"]
    mask_function = masking.causal_mask_function if mask_function is None else mask_function
    sdpa_mask: Callable[..., Tensor | None] = masking.sdpa_mask
    assert q_length is not None
    assert kv_length is not None
    if is_compiling():
        plain = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset
        causal = mask_function is masking.causal_mask_function and allow_is_causal_skip and attention_mask is None
        if plain and causal and not _slices_queries(kwargs.get("config")):
            return None
        return sdpa_mask(mask_function=mask_function, **asked)
    # The mask of one query is small, and no kernel is faster for its structure.
    if q_length == 1 or not _may_read(attention_mask, q_offset, torch.empty(0, device=device)):
        return sdpa_mask(mask_function=mask_function, **asked)
    skips = _skips(sdpa_mask, asked)
    if skips and allow_is_bidirectional_skip:
        return None
    frame = Frame(q_length, kv_length, batch_size, 1, torch.device(device))
    typed = _typed(mask_function, frame, int(q_offset), kv_offset)
    if typed is None:
        asked["allow_is_causal_skip"] = asked["allow_is_bidirectional_skip"] = False
        return sdpa_mask(mask_function=mask_function, **asked)
    padding = None if attention_mask is None else _padding(attention_mask, kv_offset, kv_length)
    whole = _all(*(typed or (Full(),))) if padding is None else _all(*typed, padding)
    assert whole is not None
    return Typed(whole, frame, skips)


class _Needed(Exception):
    """Raised in place of a mask that would have been made."""


def _skips(sdpa_mask: Callable[..., Tensor | None], asked: Mapping[str, Any]) -> bool:
    """Whether sdpa would go without a mask, which is for sdpa to say; none is made to find out."""

    def needed(*_: Any) -> Tensor:
        raise _Needed

    try:
        return sdpa_mask(mask_function=needed, **asked) is None
    except _Needed:
        return False


def _slices_queries(config: Any) -> bool:
    """True for models that drop queries after the mask is made, which only a mask at hand survives."""
    return str(getattr(config, "model_type", "")).startswith("gemma4")


def _may_read(*tensors: Any) -> bool:
    """True if these hold numbers, here and now."""
    if torch._C._get_tracing_state() is not None:
        return False
    return all(type(x) is Tensor and x.device.type != "meta" for x in tensors if isinstance(x, Tensor)) and not (
        any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors if isinstance(x, Tensor))
    )


def _padding(attention_mask: Tensor, kv_offset: int, kv_len: int) -> Padding | None:
    """Real keys, by their number where the filler lies on one side; None if all are real. Read once."""
    real = attention_mask[:, kv_offset : kv_offset + kv_len].bool()
    real = nn.functional.pad(real, (0, kv_len - real.shape[1]))
    lengths, at = real.sum(1), torch.arange(kv_len, device=real.device)
    right = (real == (at < lengths[:, None])).all()
    left = (real == (at >= kv_len - lengths[:, None])).all()
    *counts, on_right, on_left = torch.cat((lengths, right[None], left[None])).tolist()
    if min(counts) == kv_len:
        return None
    return Padding(counts) if on_right else Padding(counts, side="left") if on_left else Padding(real)


def _typed(function: Any, frame: Frame, q_offset: int, kv_offset: int) -> tuple[Mask, ...] | None:
    """The conjuncts that a mask function of transformers stands for, or None if it is not made of known parts."""
    name, held = _closure(function)
    align = _align(frame, q_offset - kv_offset)
    square = frame.q_len == frame.kv_len and q_offset == kv_offset == 0
    match name:
        case "bidirectional_mask_function":
            return ()
        case "and_masks":
            return _conjunction(held["mask_functions"], frame, q_offset, kv_offset)
        case "padding_mask_function":
            padding = _padding(held["padding_mask"], kv_offset, frame.kv_len)
            return () if padding is None else (padding,)
        case "packed_sequence_mask_function" if square:
            return _documents(held["packed_sequence_mask"])
        case "chunked_overlay" if square:
            return _chunks(held["chunk_size"], held["left_padding"], frame)
    if align == "neither":
        return None
    match name:
        case "causal_mask_function":
            return (Causal(align),)
        case "sliding_window_overlay":
            return (Window(left=held["sliding_window"] - 1, align=align),)
        case "sliding_window_bidirectional_overlay":
            return (Window(held["sliding_window"], held["sliding_window"], align=align),)
    return None


def _closure(function: Any) -> tuple[str, dict[str, Any]]:
    """The name of a mask function of transformers, and what it was made with; '' for anyone else's."""
    code = getattr(function, "__code__", None)
    if code is None or getattr(function, "__module__", "") != "transformers.masking_utils":
        return "", {}
    cells = function.__closure__ or ()
    return function.__qualname__.split(".")[0], {
        n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)
    }


def _align(frame: Frame, offset: int) -> Any:
    """How a diagonal is aligned that starts at key `offset`."""
    if offset == frame.kv_len - frame.q_len:
        return "lower-right" if offset else None
    return "upper-left" if offset == 0 else "neither"


def _conjunction(functions: Any, frame: Frame, q_offset: int, kv_offset: int) -> tuple[Mask, ...] | None:
    found: list[Mask] = []
    for function in functions:
        name, held = _closure(function)
        if name == "remap_positions_for_packed_sequence":
            # Positions that count up by one within each document differ as indices do, which is all that a band asks.
            others = [_closure(other) for other in functions]
            packings = [o["packed_sequence_mask"] for n, o in others if n == "packed_sequence_mask_function"]
            parts = _typed(held["mask_function"], frame, q_offset, kv_offset)
            if not packings or not _counts_up(held["position_ids"], packings[0]) or not _bands(parts):
                return None
        else:
            parts = _typed(function, frame, q_offset, kv_offset)
        if parts is None:
            return None
        found += parts
    return tuple(found)


def _bands(parts: tuple[Mask, ...] | None) -> bool:
    return parts is not None and all(isinstance(part, Causal | Window) for part in parts)


def _counts_up(positions: Tensor, documents: Tensor) -> bool:
    return bool(((positions.diff() == 1) | (documents.diff() != 0)).all())


def _documents(ids: Tensor) -> tuple[Mask, ...] | None:
    """Documents from their number at each token, if all batch entries are packed alike."""
    if not bool(((ids == ids[:1]).all(0)[1:] & (ids[0].diff() >= 0)).all()):
        return None
    lengths = ids[0].unique_consecutive(return_counts=True)[1]
    return () if len(lengths) == 1 else (Documents(lengths),)


def _chunks(size: int, left_padding: Tensor, frame: Frame) -> tuple[Mask, ...] | None:
    if bool(left_padding.any()):
        return None  # chunks that start elsewhere in each batch entry
    whole, rest = divmod(frame.kv_len, size)
    return (Documents([size] * whole + [rest] * (rest > 0)),) if whole + (rest > 0) > 1 else ()


# -- which modules ----------------------------------------------------------------------------------------------------


def find(model: nn.Module, seen: Seen | None = None) -> list[Found]:
    """Every attention module of transformers' in the model, once, with all its paths."""
    del seen  # a class says enough
    if "transformers.modeling_utils" not in sys.modules:
        return []
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    owners = _owners(model)
    found = [
        Found(name, module, KIND, _why_not(module, owners.get(module)), tuple(aliases))
        for module, (name, *aliases) in paths.items()
        if _calls_interface(type(module))  # type: ignore[arg-type]  # classes are hashable
    ]
    taken = {site.module for site in found}
    found += [
        Found(name, module, KIND, _by_hand(type(module)), tuple(aliases))
        for module, (name, *aliases) in paths.items()
        if module in owners and _looks_like_attention(module) and not _has_below(module, taken)
    ]
    order = {module: index for index, module in enumerate(paths)}
    return sorted(found, key=lambda site: order[site.module])


def _owners(model: nn.Module) -> dict[nn.Module, Any]:
    """The innermost model of transformers' that each module is in."""
    base = sys.modules["transformers.modeling_utils"].PreTrainedModel
    owners: dict[nn.Module, Any] = {}
    for module in model.modules():  # outer before inner
        if isinstance(module, base):
            owners.update(dict.fromkeys(module.modules(), module))
    return owners


def _codes(cls: Any) -> Iterator[CodeType]:
    """The code of the methods that objects of a class run, also through super()."""
    covered: set[str] = set()
    for home in cls.__mro__:
        if home.__module__.startswith(("torch.", "transformers.modeling_utils", "transformers.integrations")):
            continue
        for name, value in vars(home).items():
            function = getattr(value, "__func__", value)
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            code = getattr(function, "__code__", None)
            if name in covered or not isinstance(code, CodeType):
                continue
            if "__class__" not in code.co_freevars:
                covered.add(name)
            yield from _nested(code)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _nested(const)


@functools.cache
def _calls_interface(cls: Hashable) -> bool:
    return any(_INTERFACE in code.co_names for code in _codes(cls))


@functools.cache
def _strings(cls: Hashable) -> frozenset[str]:
    """The strings in the code that calls the interface."""
    consts = (c for code in _codes(cls) if _INTERFACE in code.co_names for c in code.co_consts)
    flat = (one for const in consts for one in (const if isinstance(const, tuple | frozenset) else (const,)))
    return frozenset(one for one in flat if isinstance(one, str))


_FLAGS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")


def _why_not(module: nn.Module, owner: Any) -> str:
    """Why a module with the interface has to keep its attention, or ''."""
    cls = type(module)
    config = module.__dict__.get("config")
    if config is None or _INTERNAL not in getattr(config, "__dict__", {}):
        return f"{cls.__name__} holds no config that says which attention to use"
    strings = _strings(cls)  # type: ignore[arg-type]  # classes are hashable
    if "sdpa" in strings:
        return f"{cls.__name__} treats 'sdpa' apart from any other attention"
    for name in ("indices", "block_indices", "sinks"):
        if name in strings:
            return f"{cls.__name__} hands {name}= to its attention, which no backend of Headway takes"
    if owner is not None and not any(getattr(owner, flag, False) for flag in _FLAGS):
        return f"{type(owner).__name__} says that it supports eager attention only ({', '.join(_FLAGS)} are False)"
    return ""


def _by_hand(cls: type) -> str:
    where = "remote code" if cls.__module__.startswith("transformers_modules") else cls.__module__
    return f"{cls.__name__} ({where}) does not go through transformers' AttentionInterface"


def _looks_like_attention(module: nn.Module) -> bool:
    """A class of that name that holds projections, and no other such class inside."""
    inner = [other for other in module.modules() if other is not module]
    return (
        not isinstance(module, nn.MultiheadAttention)
        and _is_named_attention(module)
        and not any(_is_named_attention(other) for other in inner)
    )


def _is_named_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    part = re.search("output|norm|mask|embed|pool", name)
    return re.search("attention|attn", name) is not None and not part and any(p.ndim > 1 for p in module.parameters())


def _has_below(module: nn.Module, taken: Collection[nn.Module]) -> bool:
    return any(other in taken for other in module.modules())


def notes(found: Iterable[Found]) -> Iterator[str]:
    """Attention of others whose models make no masks for it, as transformers does where it knows of none."""
    masking = sys.modules.get("transformers.masking_utils")
    if masking is None:
        return
    configs = (site.module.__dict__.get("config") for site in found if site.kind == KIND)
    used = {getattr(_plain(config), _INTERNAL, None): None for config in configs}
    for name in used:
        if name is None or name in masking.ALL_MASK_ATTENTION_FUNCTIONS:
            continue
        yield (
            f"attn_implementation {name!r} was registered without a mask function, so the model makes no masks for it,"
            " and padding is lost; swapped it makes them: register one with AttentionMaskInterface, or"
            " model.set_attn_implementation('sdpa') first, to compare with that"
        )


# -- the swap ---------------------------------------------------------------------------------------------------------


class _View:
    """What the class of a view starts with: a config, the very same attributes, but attention is Headway's.

    All swapped modules of a model that share a config share its view.
    """

    __slots__ = ()
    _of: Any
    """The config itself."""
    _on: bool
    """False once another attention is set through this view, which has the last word, or the swap is undone."""
    _makes_masks: bool
    """True if the models that hold this config see it through the view as well."""


@functools.cache
def _view_class(cls: Hashable) -> type:
    own: Any = cls

    def implementation(self: Any) -> str | None:
        now: str | None = self._attn_implementation_internal
        return NAME if self._on else now

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == _INTERNAL:
            if self._on and value == NAME:
                return  # a new model of this config writes what it read: that would outlive the swap
            object.__setattr__(self, "_on", False)
        own.__setattr__(self, name, value)

    def deep_copied(self: Any, memo: dict[int, Any]) -> Any:
        # With a model comes its view; a config copied alone is for another model, which is not swapped.
        with_model = bool(memo)
        of = copy.deepcopy(self._of, memo)
        return _view(of, self._on, self._makes_masks) if with_model else of

    return type(
        own.__name__,
        (_View, own),
        {
            "__slots__": ("_makes_masks", "_of", "_on"),
            "__module__": own.__module__,
            "__init__": own.__init__,  # or their metaclass would write another
            "__copy__": lambda self: copy.copy(self._of),
            "__deepcopy__": deep_copied,
            "__reduce_ex__": lambda self, protocol: (_loaded, (self._of, self._on, self._makes_masks)),
            "__eq__": lambda self, other: bool(self._of == _plain(other)),
            "__hash__": own.__hash__,
            "__setattr__": set_attribute,
            "_attn_implementation": property(implementation, own._attn_implementation.fset),
        },
    )


def _view(config: Any, on: bool = True, makes_masks: bool = False) -> Any:
    """`config` as swapped modules see it. It has no attributes of its own: what changes there, changes here."""
    made: Any = _view_class(type(config))  # type: ignore[arg-type]  # classes are hashable
    view = object.__new__(made)
    object.__setattr__(view, "__dict__", config.__dict__)
    for slot, value in (("_of", config), ("_on", on), ("_makes_masks", makes_masks)):
        object.__setattr__(view, slot, value)
    return view


def _loaded(*view: Any) -> Any:
    """A view out of a pickle, maybe in a process where nothing was swapped yet."""
    register()
    return _view(*view)


def _plain(config: Any) -> Any:
    return config._of if isinstance(config, _View) else config


def _views(model: nn.Module) -> dict[int, Any]:
    """The views that the swapped modules of a model see, by the config they are of."""
    seen = [module.__dict__["config"] for module in model.modules() if HELD in module.__dict__ and _is_viewed(module)]
    return {id(view._of): view for view in seen if view._on}


def _is_viewed(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("config"), _View)


def set_aside(module: nn.Module) -> str:
    """The attention that was set by name since a module was swapped, which runs in the site's place; or ''."""
    view = module.__dict__.get("config")
    if HELD not in module.__dict__ or not isinstance(view, _View) or view._on:
        return ""
    return str(view.__dict__[_INTERNAL])


class _Loads:
    """Stands for the method that loads a swapped module's weights: with others every kind of call is a new one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if (site := site_of(self.module)) is not None:
            site.ticket.decisions.clear()
        type(self.module)._load_from_state_dict(self.module, *args, **kwargs)


def apply(model: nn.Module, sites: Mapping[str, Site]) -> Callable[[], None]:
    """Give each named module its site and its view of the config, or none of them; returns the undo."""
    register()
    modules = dict(model.named_modules(remove_duplicate=False))
    swapped = [modules[name] for name in sites]
    views = _views(model)
    try:
        for module, site in zip(swapped, sites.values(), strict=True):
            config = _plain(module.__dict__["config"])
            module.__dict__["config"] = views.setdefault(id(config), _view(config))
            module.__dict__[HELD] = site
            module.__dict__[_LOAD] = _Loads(module)
        _settle(model)
    except BaseException:
        _put_back(model, swapped)
        raise
    return functools.partial(_put_back, model, swapped)


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give back the configs, of all sites or of the named; the very objects are as before."""
    named = model.named_modules(remove_duplicate=names is None)
    _put_back(model, [module for name, module in named if names is None or name in names])


def _put_back(model: nn.Module, modules: Collection[nn.Module]) -> None:
    changed = [module for module in modules if _is_viewed(module)]
    of_sites = [module.__dict__["config"] for module in changed if HELD in module.__dict__]
    for module in changed:
        module.__dict__["config"] = _plain(module.__dict__["config"])
        module.__dict__.pop(HELD, None)
        module.__dict__.pop(_LOAD, None)
    if changed:
        _settle(model)
    left = [id(view) for view in _views(model).values()]
    for view in of_sites:
        # Other models that were made of a swapped model's config hold its view too.
        object.__setattr__(view, "_on", view._on and id(view) in left)


def _settle(model: nn.Module) -> None:
    """Models make their masks for Headway once nobody is left in them who could not read those."""
    owners, views = _owners(model), _views(model)
    left = {at for at, view in views.items() if view.__dict__.get("_output_attentions")}
    for site in find(model):
        if HELD not in site.module.__dict__:
            configs = site.module.__dict__.get("config"), getattr(owners.get(site.module), "config", None)
            left |= {id(_plain(config)) for config in configs}
    for at, view in views.items():
        object.__setattr__(view, "_makes_masks", at not in left)
    for owner in {*owners.values()}:
        if HELD not in owner.__dict__:
            config = _plain(owner.__dict__["config"])
            owner.__dict__["config"] = config if id(config) in left else views.get(id(config), config)
