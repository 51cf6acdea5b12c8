"""Weights on disk: our own as safetensors, and those of the original SEDD and of the V100 model, by a map of names.

Nothing is loaded that could run code. Nothing is left out or made up: what does not fit is refused, all of it named.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headway_apps.proteins.errors import WeightsError
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT, rotations
from headway_apps.proteins.model.presets import SEDD, V100
from headway_apps.training import folders, tensors

CONFIG = "headway.proteins.config"
"""Where a file of ours keeps its config, among the metadata."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How an implementation names its weights, and what it computes with them that no weight shows."""

    name: str
    modules: Mapping[str, str]
    """Our names of modules, or of single weights, to theirs; those within a block without its number."""
    computes: Mapping[str, Any]
    """Fields of a config."""

    def name_of(self, ours: str) -> str:
        """Their name of one of our weights.

        >>> FORMATS["sedd"].name_of("blocks.7.mlp_in.bias")
        'blocks.7.mlp.0.bias'
        """
        stem, rest = re.fullmatch(r"((?:blocks\.\d+\.)?)(.+)", ours).groups()  # type: ignore[union-attr]
        module, _, leaf = rest.rpartition(".")
        return stem + (self.modules.get(rest) or f"{self.modules.get(module, module)}.{leaf}")


_SHARED = {
    "time.inner": "sigma_map.mlp.0",
    "time.outer": "sigma_map.mlp.2",
    "attention_norm": "norm1",
    "qkv": "attn_qkv",
    "out": "attn_out",
    "mlp_norm": "norm2",
    "modulation": "adaLN_modulation",
    "head.linear": "output_layer.linear",
    "head.modulation": "output_layer.adaLN_modulation",
}
_OF_SEDD = {
    "embed.weight": "vocab_embed.embedding",
    "mlp_in": "mlp.0",
    "mlp_out": "mlp.2",
    "head.norm": "output_layer.norm_final",
}
_OF_V100 = {"embed": "vocab_embed", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2", "head.norm": "output_layer.norm"}

FORMATS = {
    "ours": Format("ours", {}, {}),
    "sedd": Format("the original SEDD", {**_SHARED, **_OF_SEDD}, SEDD),
    "v100": Format("the V100 model", {**_SHARED, **_OF_V100}, V100),
}

ROTARY = "rotary_emb.inv_freq"
"""A table that both others save among their weights; ours is worked out where it is used."""


# -- to and from a model ----------------------------------------------------------------------------------------------


def save(model: DiT, path: str | os.PathLike[str]) -> None:
    """Write weights and config as safetensors: whole, or not at all."""
    path = Path(path)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with folders.replacing(path) as partial:
        tensors.write(partial, weights, {CONFIG: json.dumps(dataclasses.asdict(model.config))})


def load(path: str | os.PathLike[str], *, ema: bool = False, **unseen: Any) -> DiT:
    """A model with the weights of a file, in float32 and set to evaluate.

    `ema` takes the moving averages of a checkpoint of the original SEDD. `unseen` are fields of a config that another
    implementation's weights do not show, such as `heads` where the file has no rotary table, or `scale_by_sigma`.
    """
    weights, config = read(path, ema=ema)
    if config is None:
        config = config_of(weights, **unseen)
    elif unseen:
        raise WeightsError(f"got {', '.join(unseen)} for {path}, which says so itself; leave it out")
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device="cpu")
    load_into(model, weights)
    return model.eval()


def load_into(model: DiT, weights: Mapping[str, Tensor] | str | os.PathLike[str], *, ema: bool = False) -> None:
    """Give a model the weights of a file, or weights read from one; it is left as it was if any does not fit."""
    if not isinstance(weights, Mapping):
        weights, config = read(weights, ema=ema)
        said = {} if config is None else dataclasses.asdict(config)
        said.pop("dropout", None)  # which is training's, and may change
        _must_compute_alike(model.config, said, "these weights")
    elif ema:
        raise WeightsError(
            "got ema=True with weights that have been read; takes it with the file: read(path, ema=True)"
        )
    format = _format_of(weights)
    _must_compute_alike(model.config, format.computes, format.name)
    names = {ours: format.name_of(ours) for ours in model.state_dict()}
    faults = [*_misfits(model, weights, names), *_foreign_rotations(model.config, weights)]
    if faults:
        raise WeightsError(f"weights of {format.name} do not fit this network: " + "; ".join(faults))
    model.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})


def config_of(weights: Mapping[str, Tensor], **unseen: Any) -> DiTConfig:
    """The config that another implementation's weights were made with, by their shapes and its habits."""
    format = _format_of(weights)

    def shape(ours: str) -> torch.Size:
        theirs = format.name_of(ours)
        if theirs not in weights or weights[theirs].ndim != 2:
            raise WeightsError(f"weights of {format.name} have no {theirs} of two axes; give a whole file")
        return weights[theirs].shape

    embedded, width = shape("embed.weight")
    if ROTARY in weights and "heads" not in unseen:
        unseen["heads"] = width // (2 * weights[ROTARY].numel())
    if "heads" not in unseen:
        raise WeightsError(f"got weights without {ROTARY}, which would tell the heads; takes heads=, as it was trained")
    found = {
        "width": width,
        "blocks": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "cond": shape("time.outer.weight")[0],
        "embedded": embedded,
        "scored": shape("head.linear.weight")[0],
        "mask": embedded - 1,
        "mlp_ratio": shape("blocks.0.mlp_in.weight")[0] // width,
        "final": "scale" if shape("head.modulation.weight")[0] == width else "shift and scale",
    }
    seen = (found.keys() | format.computes.keys()) & unseen.keys() - {"mask"}
    if seen:
        raise WeightsError(f"got {', '.join(sorted(seen))}, which weights of {format.name} show; leave it out")
    return DiTConfig(**{**found, **format.computes, **unseen})


def _format_of(weights: Mapping[str, Tensor]) -> Format:
    for format in FORMATS.values():
        if format.name_of("embed.weight") in weights:
            return format
    some = ", ".join(list(weights)[:3]) or "nothing"
    raise WeightsError(
        f"got weights named {some}, takes those of {', '.join(each.name for each in FORMATS.values())}: none has"
        f" {' or '.join(each.name_of('embed.weight') for each in FORMATS.values())}"
    )


def _must_compute_alike(config: DiTConfig, computes: Mapping[str, Any], whose: str) -> None:
    other = {name: value for name, value in computes.items() if getattr(config, name) != value}
    if other:
        raise WeightsError(
            f"{whose} were trained with "
            + ", ".join(f"{name}={value!r}" for name, value in other.items())
            + ", this network has "
            + ", ".join(f"{name}={getattr(config, name)!r}" for name in other)
            + "; give it their config, as load() does"
        )


def _misfits(model: DiT, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    faults = [f"no {theirs}" for theirs in names.values() if theirs not in weights]
    faults += [f"{theirs} is unknown" for theirs in weights if theirs not in {*names.values(), ROTARY}]
    for ours, wanted in model.state_dict().items():
        got = weights.get(names[ours])
        if got is not None and got.shape != wanted.shape:
            faults.append(f"{names[ours]} is {list(got.shape)}, not {list(wanted.shape)}")
        elif got is not None and not got.is_floating_point():
            faults.append(f"{names[ours]} is {got.dtype}, not floating-point")
    return faults


def _foreign_rotations(config: DiTConfig, weights: Mapping[str, Tensor]) -> list[str]:
    if ROTARY not in weights:
        return []
    _, ours = rotations(torch.ones(1), config.head_dim, torch.float64)
    theirs = weights[ROTARY].double().sin()
    if theirs.shape != ours[0].shape:
        return [f"{ROTARY} is for heads of {2 * theirs.numel()}, not {config.head_dim}"]
    return [] if torch.allclose(theirs, ours[0], rtol=1e-2) else [f"{ROTARY} turns at other speeds"]


# -- from a file ------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], *, ema: bool = False) -> tuple[dict[str, Tensor], DiTConfig | None]:
    """The tensors of a file by name, and their config if the file is ours.

    Takes safetensors, and checkpoints by torch.save that hold tensors and plain values alone, where weights may stand
    under 'model' or 'state_dict'.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"got {path}, takes a file of weights: there is none")
    if _is_torch(path):
        weights, config = _of_checkpoint(path, ema), None
    else:
        weights, config = _of_safetensors(path)
        if ema:
            raise WeightsError(f"got ema=True for {path}, takes it with a checkpoint of the original SEDD alone")
    # As DistributedDataParallel and torch.compile name what they wrap.
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in weights.items()}, config


def _is_torch(path: Path) -> bool:
    """By what it begins with: torch.save writes a zip file, or long ago a pickle."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _of_safetensors(path: Path) -> tuple[dict[str, Tensor], DiTConfig | None]:
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            said = (file.metadata() or {}).get(CONFIG)
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}); copy or download it again") from error
    if said is None:
        return weights, None
    try:
        return weights, DiTConfig(**json.loads(said))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a config that this version does not know: {error}") from error


def _of_checkpoint(path: Path, ema: bool) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds pickled objects beside tensors, which could run code, and is not loaded; where you trust it,"
            " write its weights alone: safetensors.torch.save_file(torch.load(path, weights_only=False)['model'], out)"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise WeightsError(f"{path} is no whole checkpoint ({error}); copy or download it again") from error
    if not isinstance(held, dict):
        raise WeightsError(f"{path} holds a {type(held).__name__}, takes tensors by name")
    inner = next((held[name] for name in ("model", "state_dict") if isinstance(held.get(name), dict)), held)
    weights = {name: tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    return _averaged(path, weights, held.get("ema")) if ema else weights


def _averaged(path: Path, weights: dict[str, Tensor], ema: Any) -> dict[str, Tensor]:
    """The moving averages, which are saved in the weights' order and without names."""
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    names = [name for name in weights if not name.endswith(ROTARY)]
    if not isinstance(shadow, list) or [x.shape for x in shadow] != [weights[name].shape for name in names]:
        raise WeightsError(f"got ema=True for {path}, which has no moving average of each weight; leave it out")
    return {**weights, **dict(zip(names, shadow, strict=True))}
