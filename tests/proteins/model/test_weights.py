"""Weights of the original SEDD and of the V100 model give their scores here; a file that does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from proteins.model import plain
from proteins.model.plain import Weights
from safetensors.torch import save_file
from shims.models.diffusion_transformer import DiffusionTransformer
from torch import Tensor, nn

from headway_apps.proteins.errors import WeightsError
from headway_apps.proteins.model import weights as room
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.model.weights import load, load_into, read, save
from headway_apps.training import tensors

HEADS, SIZES = 4, {"width": 32, "blocks": 2, "cond": 8, "symbols": 11}
SHAPES = {"sedd": plain.sedd_shapes(**SIZES), "v100": plain.v100_shapes(**SIZES)}


def theirs(name: str) -> Weights:
    return plain.drawn(SHAPES[name], SIZES["width"] // HEADS)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (3, 7), generator=generator), torch.tensor([0.01, 0.7, 6.0], dtype=torch.float64)


def as_safetensors(weights: Weights, path: Path) -> None:
    save_file(weights, path)


def as_checkpoint(weights: Weights, path: Path) -> None:
    torch.save({"model": weights, "step": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}, path)


def as_plain_dict(weights: Weights, path: Path) -> None:
    torch.save(weights, path)


def as_wrapped(weights: Weights, path: Path) -> None:
    torch.save({"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}}, path)


def as_old_pickle(weights: Weights, path: Path) -> None:
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)


WAYS: list[Callable[[Weights, Path], None]] = [as_safetensors, as_checkpoint, as_plain_dict, as_wrapped, as_old_pickle]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", SHAPES)
def test_it_scores_as_the_implementation_whose_weights_it_loads(
    name: str, way: Callable[[Weights, Path], None], tmp_path: Path
) -> None:
    weights = theirs(name)
    way(weights, tmp_path / "weights")
    model = load(tmp_path / "weights").double()
    assert model.config.head_dim == SIZES["width"] // HEADS
    torch.testing.assert_close(model(*inputs()), plain.scores(weights, *inputs(), HEADS))


@pytest.mark.parametrize("name", SHAPES)
def test_the_other_implementation_would_score_otherwise(name: str) -> None:
    """Or loading by the wrong map would go unseen: only the activations differ here."""
    model, (other,) = made(name), SHAPES.keys() - {name}
    computes = {**room.FORMATS[other].computes, "head_bias": model.config.head_bias}
    stranger = DiT(dataclasses.replace(model.config, **computes))
    stranger.load_state_dict(model.state_dict())
    assert float((stranger.double()(*inputs()) - model.double()(*inputs())).detach().abs().max()) > 0.01


def test_the_original_names_its_weights_so() -> None:
    """As another reading of the original does, whose own parameters load as they are."""
    model = DiffusionTransformer(
        lambda qkv, cos, sin: qkv, lambda qkv, starts, length: qkv, dim=SIZES["width"], heads=HEADS,
        blocks=SIZES["blocks"], cond_dim=SIZES["cond"], vocabulary=SIZES["symbols"],
    )  # fmt: skip
    named = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert named == {name: tensor.shape for name, tensor in theirs("sedd").items()}
    load_into(made("sedd"), model.state_dict())


def test_moving_averages_of_the_original_load_in_their_order(tmp_path: Path) -> None:
    weights = theirs("sedd")
    averages = {name: tensor + 0.1 for name, tensor in weights.items() if name in SHAPES["sedd"]}
    ema = {"decay": 0.9999, "num_updates": 5, "shadow_params": list(averages.values())}
    torch.save({"model": weights, "ema": ema}, tmp_path / "checkpoint.pth")
    model = load(tmp_path / "checkpoint.pth", ema=True).double()
    torch.testing.assert_close(model(*inputs()), plain.scores({**weights, **averages}, *inputs(), HEADS))


# -- our own ----------------------------------------------------------------------------------------------------------


def made(name: str = "sedd", **changes: Any) -> DiT:
    """A model of the sizes of these tests, with the habits of an implementation."""
    config = DiTConfig(width=32, blocks=2, heads=4, cond=8, embedded=11, scored=11, mask=10)
    model = DiT(dataclasses.replace(config, **{**room.FORMATS[name].computes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("changes", [{}, {"scored": 10, "final": "scale", "dropout": 0.0}], ids=["plain", "inferred"])
def test_what_is_saved_comes_back_whole(changes: dict[str, Any], tmp_path: Path) -> None:
    model = made("v100", **changes)
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors")
    assert back.config == model.config
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    again = made("v100", **changes, mlp_ratio=4)
    load_into(again, tmp_path / "model.safetensors")
    assert torch.equal(again.head.linear.weight, model.head.linear.weight)


def test_dropout_may_change_between_training_and_training(tmp_path: Path) -> None:
    save(made(dropout=0.1), tmp_path / "model.safetensors")
    load_into(made(dropout=0.3), tmp_path / "model.safetensors")


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    save(made(), tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    load(tmp_path / "model.safetensors")
    assert torch.equal(before, torch.get_rng_state())


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(made(), path)
    before = path.read_bytes()

    def fails(weights: Weights, to: str, metadata: dict[str, str]) -> None:
        Path(to).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(tensors, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        save(made(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# -- refusals ---------------------------------------------------------------------------------------------------------


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "one missing": (lambda w: without(w, "blocks.1.norm2.weight"), "no blocks.1.norm2.weight"),
    "a block missing": (
        lambda w: {name: x for name, x in w.items() if not name.startswith("blocks.1.")},
        "no blocks.1.norm1.weight; no blocks.1.attn_qkv.weight",
    ),
    "one too many": (lambda w: w | {"esm_proj.weight": torch.zeros(2)}, "esm_proj.weight is unknown"),
    "a block too many": (lambda w: w | {"blocks.2.norm1.weight": torch.ones(32)}, "blocks.2.norm1.weight is unknown"),
    "another shape": (
        lambda w: w | {"vocab_embed.embedding": torch.zeros(36, 32)},
        "vocab_embed.embedding is [36, 32], not [11, 32]",
    ),
    "transposed": (
        lambda w: w | {"blocks.0.mlp.0.weight": w["blocks.0.mlp.0.weight"].T},
        "blocks.0.mlp.0.weight is [32, 128], not [128, 32]",
    ),
    "integers": (lambda w: w | {"output_layer.linear.bias": torch.zeros(11, dtype=torch.long)}, "is torch.int64"),
    "other heads": (lambda w: w | {"rotary_emb.inv_freq": torch.ones(8)}, "is for heads of 16, not 8"),
    "other rotations": (
        lambda w: w | {"rotary_emb.inv_freq": 1 / 500_000 ** (torch.arange(0, 8, 2) / 8)},
        "turns at other speeds",
    ),
    "an axis too few": (lambda w: w | {"vocab_embed.embedding": torch.zeros(32)}, "is [32], not [11, 32]"),
    "of nobody": (lambda w: {"wte.weight": torch.zeros(11, 32)}, "got weights named wte.weight"),
    "none": (lambda w: {}, "got weights named nothing"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(name: str) -> None:
    change, words = MISFITS[name]
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as refusal:
        load_into(model, change(theirs("sedd")))
    assert words in str(refusal.value)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "trained, into, words",
    [
        ("sedd", "v100", "head_bias=True, gelu='tanh', silu_after_time=True, this network has head_bias=False"),
        ("v100", "sedd", "gelu='erf', silu_after_time=False, this network has head_bias=True, gelu='tanh'"),
    ],
)
def test_weights_that_fit_but_were_trained_to_compute_otherwise_are_refused(
    trained: str, into: str, words: str
) -> None:
    with pytest.raises(WeightsError) as refusal:
        load_into(made(into), theirs(trained))
    assert words in str(refusal.value)


def test_our_weights_for_another_scale_are_refused(tmp_path: Path) -> None:
    save(made(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="trained with scale_by_sigma=True, this network has scale_by_sigma=False"):
        load_into(made(scale_by_sigma=False), tmp_path / "model.safetensors")


class Runs:
    """What a pickle may hold: a call, made as it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(ran), "")


ran = ""


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ran", str(tmp_path / "ran"))
    torch.save({"model": theirs("v100"), "config": Runs()}, tmp_path / "best_checkpoint.pth")
    with pytest.raises(WeightsError, match="could run code"):
        load(tmp_path / "best_checkpoint.pth")
    assert not (tmp_path / "ran").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def page(path: Path) -> None:
    path.write_text("<html>404</html>")


def unknown_config(path: Path) -> None:
    save_file(made().state_dict(), path, {room.CONFIG: json.dumps({"width": 32, "depth": 2})})


def a_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def one_axis(path: Path) -> None:
    as_safetensors(theirs("sedd") | {"vocab_embed.embedding": torch.zeros(32)}, path)


SPOILT = [
    (as_safetensors, cut, "no whole safetensors file"),
    (as_checkpoint, cut, "no whole"),
    (as_old_pickle, cut, "no whole checkpoint"),
    (as_safetensors, empty, "no whole safetensors file"),
    (as_safetensors, page, "no whole safetensors file"),
    (as_safetensors, unknown_config, "a config that this version does not know"),
    (as_safetensors, one_axis, "vocab_embed.embedding of two axes"),
    (as_safetensors, a_list, "holds a list"),
    (as_safetensors, Path.unlink, "there is none"),
]


@pytest.mark.parametrize("way, spoil, words", SPOILT)
def test_a_file_that_is_not_whole_is_refused(
    way: Callable[[Weights, Path], None], spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    way(theirs("sedd"), path)
    spoil(path)
    with pytest.raises(WeightsError) as refusal:
        load(path)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value) or spoil is one_axis


def test_what_weights_do_not_show_must_be_said_and_what_they_show_must_not(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    as_safetensors(without(theirs("v100"), "rotary_emb.inv_freq"), path)
    with pytest.raises(WeightsError, match="takes heads="):
        load(path)
    assert load(path, heads=8).config.head_dim == 4
    assert load(path, heads=4, scale_by_sigma=False, dropout=0.2).config.scale_by_sigma is False
    with pytest.raises(WeightsError, match="got width, which weights of the V100 model show"):
        load(path, heads=4, width=64)
    as_safetensors(theirs("v100"), path)
    with pytest.raises(WeightsError, match="is for heads of 8, not 4"):
        load(path, heads=8)
    save(made(), path)
    with pytest.raises(WeightsError, match="which says so itself"):
        load(path, heads=4)


@pytest.mark.parametrize("way", [as_checkpoint, as_safetensors])
def test_averages_that_are_not_there_are_refused(way: Callable[[Weights, Path], None], tmp_path: Path) -> None:
    way(theirs("sedd"), tmp_path / "weights")
    with pytest.raises(WeightsError, match="got ema=True"):
        read(tmp_path / "weights", ema=True)
    with pytest.raises(WeightsError, match="takes it with the file"):
        load_into(made(), theirs("sedd"), ema=True)


def test_a_model_in_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    save(made(), tmp_path / "model.safetensors")
    model: nn.Module = made().to(torch.bfloat16)
    load_into(model, tmp_path / "model.safetensors")  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
