"""Modules that another tool put in an nn.MultiheadAttention's place: recognised by what they hold, and turned back.

Such a module keeps the weights under names of its own, and seldom the contract: masks are ignored, cross-attention
raises, an encoder does not find what it reads. Swapped, the very object is an nn.MultiheadAttention again: of the very
parameters, under PyTorch's names. That is done only where its own forward, run on a few tokens, agrees that they mean
what they would mean there. What it kept is held beside, and put back by undo.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import SwapError
from headway.sites import multihead
from headway.sites.copies import deep_copy
from headway.sites.seen import Seen
from headway.sites.site import Found, Site

KIND = "replaced attention"

WAS = "_headway_was"
"""The attribute of a module turned back that holds what it was: its class and its attributes."""

FUSED = ("qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv", "qkv_linear")
SPLIT = (("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("query", "key", "value"), ("wq", "wk", "wv"))
OUT = ("out_proj", "proj", "to_out", "o_proj", "out", "wo", "output")
WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
DROPOUTS = ("dropout", "dropout_p", "attn_drop", "attn_dropout", "attention_dropout")
PLACES = ("self_attn", "multihead_attn")
"""Where PyTorch's transformer layers keep their attention."""

LENGTHS = (5, 300)
"""Texts to compare on: a window must not be wider than the longer one to be seen."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention, that callers of what took its place may also call with the query alone."""

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        key = query if key is None else key
        return super().forward(query, key, key if value is None else value, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Held:
    """Where a module keeps what an nn.MultiheadAttention needs."""

    options: dict[str, Any]
    """Arguments of nn.MultiheadAttention."""
    parameters: dict[str, tuple[str, str]]
    """By PyTorch's name: the child, and its name there."""
    out: str
    """The child that projects the result."""


def find(model: nn.Module, seen: Seen | None) -> Iterator[Found]:
    """Every module in the place of an nn.MultiheadAttention, once, with all its paths."""
    del seen  # what a module holds says enough, and it may not even run
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.MultiheadAttention) and _in_its_place(model, name, module):
            paths.setdefault(module, []).append(name)
    for module, (name, *aliases) in paths.items():
        held = _held(module)
        because = multihead.patched(module) or (
            held if isinstance(held, str) else _unlike(module, held, in_a_layer=_in_a_layer(model, name))
        )
        yield Found(name, module, KIND, because, tuple(aliases))


def _in_its_place(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a layer of PyTorch calls it as its attention, or it takes that contract's arguments upon itself."""
    if _in_a_layer(model, name):
        return True
    if type(module).__module__.startswith(("torch.", "transformers.")) or not isinstance(_heads(module), int):
        return False
    forward = type(module).forward if multihead.patched(module) else module.forward
    return {"key_padding_mask", "attn_mask"} <= inspect.signature(forward).parameters.keys()


def _in_a_layer(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    layers = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    return last in PLACES and isinstance(model.get_submodule(path) if path else model, layers)


def _heads(module: nn.Module) -> Any:
    return getattr(module, "num_heads", getattr(module, "n_heads", None))


# -- what it holds ----------------------------------------------------------------------------------------------------


def _held(module: nn.Module) -> Held | str:
    """Where everything is, or why an nn.MultiheadAttention could not hold it."""
    name, children = type(module).__name__, dict(module.named_children())
    fused = next((each for each in FUSED if each in children), None)
    split = next((each for each in SPLIT if all(part in children for part in each)), None)
    out = next((each for each in OUT if each in children), None)
    inward = () if fused is None and split is None else (fused,) if fused is not None else split or ()
    if not inward or out is None or not isinstance(_heads(module), int):
        return f"{name} holds nothing that would be in_proj_weight, out_proj and num_heads; it holds {_list(children)}"
    for part in inward:
        if not multihead.is_plain(children[part]) or "weight" not in children[part]._parameters:
            return (
                f"its {part} is a {type(children[part]).__name__}, and in_proj_weight can only stand for a plain Linear"
            )
    spare = [each for each in children if each not in (*inward, out) and not _is_nothing(each, children[each])]
    spare += [*module._parameters, *module._buffers]
    if spare:
        return f"it holds {_list(spare)} too, for which nn.MultiheadAttention has no place"
    return _fused(module, inward[0], out) if fused is not None else _split(module, inward, out)


def _list(names: Collection[str]) -> str:
    return ", ".join(names) or "nothing"


def _is_nothing(name: str, child: nn.Module) -> bool:
    """Whether it does nothing, or is the dropout of weights."""
    if isinstance(child, nn.Dropout):
        return child.p == 0 or name in DROPOUTS
    return isinstance(child, nn.Identity)


def _fused(module: nn.Module, inward: str, out: str) -> Held | str:
    linear: Any = module.get_submodule(inward)
    if linear.out_features != 3 * linear.in_features:
        return f"its {inward} makes {linear.out_features} of {linear.in_features}; in_proj_weight makes 3 times as many"
    parameters = {"in_proj_weight": (inward, "weight"), "in_proj_bias": (inward, "bias")}
    return Held(_options(module, linear.in_features, linear.bias is not None), parameters, out)


def _split(module: nn.Module, inward: tuple[str, ...], out: str) -> Held | str:
    linears: list[Any] = [module.get_submodule(part) for part in inward]
    sizes = {size for linear in linears for size in (linear.in_features, linear.out_features)}
    if any(linear.bias is not None for linear in linears):
        return f"its {_list(inward)} have a bias each, and nn.MultiheadAttention holds the three as one parameter"
    if len(sizes) != 1:
        return f"its {_list(inward)} are of sizes {sorted(sizes)}; takes one size for all"
    parameters = {weight: (part, "weight") for weight, part in zip(WEIGHTS, inward, strict=True)}
    return Held(_options(module, sizes.pop(), bias=False), parameters, out)


def _options(module: nn.Module, size: int, bias: bool) -> dict[str, Any]:
    dropouts = (getattr(module, name, None) for name in DROPOUTS)
    dropout = next((each for each in dropouts if isinstance(each, float | nn.Dropout)), 0.0)
    return {
        "embed_dim": size,
        "num_heads": _heads(module),
        "bias": bias,
        "dropout": dropout.p if isinstance(dropout, nn.Dropout) else dropout,
        "batch_first": bool(getattr(module, "batch_first", True)),
    }


# -- whether it means the same ----------------------------------------------------------------------------------------


def _unlike(module: nn.Module, held: Held, *, in_a_layer: bool) -> str:
    """Why its parameters do not mean what nn.MultiheadAttention would take them for, by its own forward; or ''.

    Compared are copies with other parameters: of a projection that starts at 0 nothing could be seen.
    """
    size, heads = held.options["embed_dim"], held.options["num_heads"]
    if heads < 1 or size % heads:
        return f"its {heads} heads do not divide its size of {size}"
    itself = deep_copy(module).eval()
    if any(parameter.is_meta for parameter in itself.parameters()):
        return "its parameters are on the meta device, so its own forward cannot show what they mean"
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in itself.parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            parameter.copy_(drawn.div(drawn.shape[-1] ** 0.5 if drawn.dim() else 1.0).to(parameter))
        turned = copy.deepcopy(itself)
        turn(turned, held)
        vars(turned)["batch_first"] = True
        multihead.set_meant(turned)
        for length in LENGTHS:
            x = torch.randn(2, length, size, generator=random).to(next(itself.parameters()))
            because = _differs(itself, turned, x, in_a_layer)
            if because:
                return because
            if length == min(LENGTHS) and _inverts(itself, turned, x):
                return "its key_padding_mask says which keys are seen, where nn.MultiheadAttention's says which are not"
    return ""


def _differs(itself: nn.Module, turned: nn.Module, x: Tensor, in_a_layer: bool) -> str:
    """What is not the same for a text's attention to itself, without masks."""
    expected, _ = turned(x, x, x, need_weights=False)
    errors: list[str] = []
    ran = agrees = False
    for answer in _own_answers(itself, x, errors):
        ran = True
        if _is_near(answer, expected):
            agrees = True
            if in_a_layer or (isinstance(answer, tuple) and len(answer) == 2):
                return ""
    if agrees:
        return "its own forward returns no pair of result and weights, and its callers would get one"
    if ran:
        return "its own forward gives something else than nn.MultiheadAttention would with its weights"
    return f"its own forward does not run here, which would show how its weights are laid out: {errors[-1]}"


def _inverts(itself: nn.Module, turned: nn.Module, x: Tensor) -> bool:
    last = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    last[:, -1] = True
    inverted, _ = turned(x, x, x, key_padding_mask=~last, need_weights=False)
    return any(_is_near(answer, inverted) for answer in _own_answers(itself, x, [], key_padding_mask=last))


def _is_near(answer: Any, expected: Tensor) -> bool:
    out = answer[0] if isinstance(answer, tuple) else answer
    near = TOLERANCE.get(expected.dtype, 0.03) * max(expected.abs().max().item(), 1e-6)
    return isinstance(out, Tensor) and out.shape == expected.shape and bool((out - expected).abs().max() <= near)


def _own_answers(module: nn.Module, x: Tensor, errors: list[str], **masks: Tensor) -> Iterator[Any]:
    """What it makes of a text's attention to itself, called in each of the ways such modules are called."""
    across = x.transpose(0, 1)
    for inputs, back in (((x,), False), ((x, x, x), False), ((across,), True), ((across, across, across), True)):
        try:
            answer = module(*inputs, **masks)
            answer = (answer[0].transpose(0, 1), *answer[1:]) if back else answer
        except Exception as raised:  # what another's code raises may be anything; it ends in the census
            errors.append(f"{type(raised).__name__}: {raised}".partition("\n")[0])
            continue
        yield answer


# -- there and back ---------------------------------------------------------------------------------------------------


def turn(module: nn.Module, held: Held) -> None:
    """Make the very object an nn.MultiheadAttention of the very parameters; hooks and other attributes stay."""
    was = type(module), dict(vars(module))
    made = vars(nn.MultiheadAttention(**held.options, device="meta"))
    made["_modules"] = {"out_proj": module._modules[held.out]}
    made["_parameters"] = dict.fromkeys(made["_parameters"])
    made["_qkv_same_embed_dim"] = "in_proj_weight" in held.parameters
    for name, (child, inside) in held.parameters.items():
        made["_parameters"][name] = module.get_submodule(child)._parameters[inside]
    own = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}
    # Of both: what every module has is its own, and what the constructor worked out is the new one's.
    worked_out = {name: made[name] for name in made if name not in vars(nn.Module()) or name not in own}
    vars(module).clear()
    vars(module).update(own | worked_out | {WAS: (*was, held)})
    module.__class__ = Attention


def turn_back(model: nn.Module) -> None:
    """Make a copy of a model what it is meant to be: all that could be swapped is nn.MultiheadAttention for good."""
    for found in list(find(model, None)):
        held = _held(found.module)
        if not found.because and isinstance(held, Held):
            turn(found.module, held)
    settle(model)


def settle(model: nn.Module) -> None:
    """Forget, in a copy, what the modules turned back were: undo leaves them nn.MultiheadAttention."""
    multihead.restore(model, {name for name, _ in _turned(model)})
    for _, module in _turned(model):
        del vars(module)[WAS]


def _turned(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if WAS in vars(module)]


def notes(sites: Iterable[Found]) -> Iterator[str]:
    """What a swap changes that is no speed; of what was found, as to compare once more takes as long as to find."""
    places: dict[str, list[str]] = {}
    for found in sites:
        if found.kind == KIND and not found.because:
            places.setdefault(type(found.module).__name__, []).append(found.name or "the model")
    for kind, names in places.items():
        yield (
            f"{kind} took an nn.MultiheadAttention's place ({_few(names)}); swapped each is one again: masks, keys and"
            " values of their own, batch_first and need_weights act, and parameters have PyTorch's names; the proof"
            " compares with nn.MultiheadAttention"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}, {len(names)} of them"


def apply(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Turn the named modules back, and give each its site and its new class; or none of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        for name in sites:
            held = _held(modules[name])
            assert isinstance(held, Held), held  # `find` gave it no reason to be left alone
            turn(modules[name], held)
        multihead.apply(model, sites)
    except BaseException:
        restore(model, sites.keys())
        raise


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give back classes and attributes, of all sites or of the named; the very objects are as before."""
    turned = [(name, module) for name, module in _turned(model) if names is None or name in names]
    for name, module in turned:
        missing = vars(module)[WAS][2].parameters.keys() - module._parameters.keys()
        if missing:
            raise SwapError(
                f"got {name!r} with {_list(sorted(missing))} parametrized or pruned since the swap; takes plain"
                " parameters: remove that first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
            )
    multihead.restore(model, {name for name, _ in turned})
    for _, module in turned:
        _give_back(module)


def _give_back(module: nn.Module) -> None:
    now = dict(vars(module))
    kind, before, held = now.pop(WAS)
    for name, (child, inside) in held.parameters.items():
        before["_modules"][child]._parameters[inside] = now["_parameters"].pop(name)  # it may have been replaced since
    before["_modules"][held.out] = now["_modules"].pop("out_proj")
    if now["training"] != before["training"]:
        for child in before["_modules"].values():
            child.train(now["training"])  # those inside were out of reach
    for group in ("_parameters", "_buffers", "_modules"):  # what came while it was swapped stays
        before[group].update({name: each for name, each in now[group].items() if name not in _EMPTY})
    base = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
    added = {name: value for name, value in now.items() if name in base or (name not in before and name not in _MADE)}
    vars(module).clear()
    vars(module).update(before | added)
    module.__class__ = kind


_EMPTY = ("in_proj_weight", "in_proj_bias", *WEIGHTS)
"""Parameters that nn.MultiheadAttention lists whether it has them or not."""
_MADE = frozenset(vars(nn.MultiheadAttention(1, 1, device="meta")))
