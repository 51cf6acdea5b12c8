"""flash_attn.modules.{block, mlp, embedding}: against what they are made of, under flash-attn's names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deck import Source
from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.flash_attn.modules.block import Block, ParallelBlock
from headway.shims.flash_attn.modules.embedding import (
    BertEmbeddings,
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)
from headway.shims.flash_attn.modules.mha import MHA
from headway.shims.flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp, ParallelGatedMlp, ParallelMLP
from headway.shims.flash_attn.ops.triton.layer_norm import RMSNorm

BATCH, LENGTH, DIM = 2, 5, 64
MADE = {"dtype": torch.float64}


def drawn(*shape: int, name: str = "x") -> Tensor:
    return Source(name).normal(*shape).requires_grad_()


def close(mine: Tensor, truth: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(mine, truth)
    push = drawn(*truth.shape, name="cotangent").detach()
    for one, other in zip(*(torch.autograd.grad(end, inputs, push) for end in (mine, truth)), strict=True):
        torch.testing.assert_close(one, other)


# -- MLPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("biases", "activation"), [((True, True), F.gelu), ((False, True), F.silu)], ids=["gelu", "silu"]
)
def test_the_mlp(biases: tuple[bool, bool], activation: Callable[[Tensor], Tensor], residual: bool) -> None:
    mlp, x = Mlp(6, 10, 5, activation, *biases, residual, **MADE), drawn(3, 6)
    out = mlp(x)
    if residual:
        out, same = out
        assert same is x
    hidden = activation(x @ mlp.fc1.weight.T + (mlp.fc1.bias if biases[0] else 0))
    close(out, hidden @ mlp.fc2.weight.T + mlp.fc2.bias, [x, *mlp.parameters()])
    assert (Mlp(6).fc1.out_features, Mlp(6).fc2.out_features) == (24, 6)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [F.sigmoid, F.silu, F.gelu])
def test_the_gated_mlp(activation: Callable[[Tensor], Tensor], residual: bool) -> None:
    mlp, x = GatedMlp(6, 10, 5, activation, multiple_of=8, return_residual=residual, **MADE), drawn(3, 6)
    assert [tuple(each.shape) for each in mlp.parameters()] == [(32, 6), (32,), (5, 16), (5,)]
    out = mlp(x)
    if residual:
        out, same = out
        assert same is x
    y, gate = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(16, -1)
    close(out, (y * activation(gate)) @ mlp.fc2.weight.T + mlp.fc2.bias, [x, *mlp.parameters()])
    assert GatedMlp(48).fc1.out_features == 2 * 128
    assert GatedMlp(49).fc1.out_features == 2 * 256


# -- embeddings -------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 2, 3], [3, 0, 4]])
PLACES = torch.tensor([[5, 0, 1], [2, 3, 4]])


@pytest.mark.parametrize("projected", [None, 3])
@pytest.mark.parametrize("positions", [0, 6])
@pytest.mark.parametrize("places", [None, PLACES], ids=["", "places"])
def test_tokens_and_positions(places: Tensor | None, positions: int, projected: int | None) -> None:
    layer = GPT2Embeddings(4, 9, positions, padding_idx=0, word_embed_proj_dim=projected, **MADE)
    weights = dict(layer.named_parameters())
    names = {"word_embeddings.weight"} | ({"project_in.weight"} if projected else set())
    assert weights.keys() == names | ({"position_embeddings.weight"} if positions else set())
    truth = weights["word_embeddings.weight"][IDS]
    truth = truth @ weights["project_in.weight"].T if projected else truth
    if positions:
        truth = truth + weights["position_embeddings.weight"][torch.arange(3) if places is None else places]
    torch.testing.assert_close(layer(IDS, places), truth)
    assert layer.word_embeddings.padding_idx == 0


@pytest.mark.parametrize("types", [0, 2])
@pytest.mark.parametrize("positions", [0, 6])
@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
def test_tokens_positions_and_types(given: bool, positions: int, types: int) -> None:
    layer = BertEmbeddings(4, 9, positions, types, padding_idx=0, **MADE)
    weights = dict(layer.named_parameters())
    names = ["word_embeddings", *["position_embeddings"] * bool(positions), *["token_type_embeddings"] * bool(types)]
    assert list(weights) == [f"{name}.weight" for name in names]
    truth = weights["word_embeddings.weight"][IDS]
    if positions:
        truth = truth + weights["position_embeddings.weight"][PLACES if given else torch.arange(3)]
    if types:
        truth = truth + weights["token_type_embeddings.weight"][IDS % 2 if given else 0 * IDS]
    torch.testing.assert_close(layer(IDS, *((PLACES, IDS % 2) if given else ())), truth)


def test_embeddings_of_one_process_are_embeddings() -> None:
    assert VocabParallelEmbedding(9, 4, padding_idx=0)(IDS).shape == (2, 3, 4)
    assert ColumnParallelEmbedding(9, 4)(IDS).shape == (2, 3, 4)


# -- blocks -----------------------------------------------------------------------------------------------------------

NORMS: dict[str, Any] = {"layer": nn.LayerNorm, "rms": RMSNorm}
MIXER = functools.partial(MHA, num_heads=4, causal=True, use_flash_attn=True, **MADE)
MLP = functools.partial(Mlp, hidden_features=16, **MADE)


def built(kind: Any, norm: str, **options: Any) -> Any:
    torch.manual_seed(3)
    made = kind(DIM, MIXER, options.pop("mlp_cls", MLP), functools.partial(NORMS[norm], **MADE), **options)
    with torch.no_grad():
        for name, each in made.named_parameters():
            if "norm" in name:
                each.copy_(Source(name).normal(DIM))
    return made


def normed(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    out = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return out if norm.bias is None else out + norm.bias


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
EACH_NORM = pytest.mark.parametrize("norm", NORMS)


@FUSED
@EACH_NORM
@pytest.mark.parametrize("mlp_cls", [MLP, nn.Identity], ids=["mlp", "no mlp"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_block_with_norms_before_its_branches(first: bool, mlp_cls: Any, norm: str, fused: bool) -> None:
    block = built(Block, norm, mlp_cls=mlp_cls, fused_dropout_add_ln=fused)
    x, before = drawn(BATCH, LENGTH, DIM), None if first else drawn(BATCH, LENGTH, DIM, name="residual")
    out, residual = block(x, before)
    total = x if before is None else x + before
    branch = block.mixer(normed(block.norm1, total))
    if mlp_cls is MLP:
        total = total + branch
        branch = block.mlp(normed(block.norm2, total))
    inputs = [each for each in (x, before) if each is not None]
    close(torch.stack((out, residual)), torch.stack((branch, total)), inputs)
    names = {name.split(".")[0] for name in block.state_dict()}
    assert names == ({"mixer", "mlp", "norm1", "norm2"} if mlp_cls is MLP else {"mixer", "norm1"})


@FUSED
@EACH_NORM
@pytest.mark.parametrize("hands_on", [False, True], ids=["", "residuals returned"])
@pytest.mark.parametrize("mlp_cls", [MLP, nn.Identity], ids=["mlp", "no mlp"])
def test_a_block_with_norms_after_the_sums(mlp_cls: Any, hands_on: bool, norm: str, fused: bool) -> None:
    plain = built(Block, norm, mlp_cls=mlp_cls, prenorm=False, fused_dropout_add_ln=fused)
    block = plain
    if hands_on:
        given = functools.partial(mlp_cls, return_residual=True) if mlp_cls is MLP else mlp_cls
        block = Block(
            DIM, functools.partial(MIXER, return_residual=True), given, functools.partial(NORMS[norm], **MADE),
            prenorm=False, fused_dropout_add_ln=fused, return_residual=True,
        )  # fmt: skip
        block.load_state_dict(plain.state_dict())
    x = drawn(BATCH, LENGTH, DIM)
    truth = normed(plain.norm1, x + plain.mixer(x))
    truth = normed(plain.norm2, truth + plain.mlp(truth)) if mlp_cls is MLP else truth
    close(block(x), truth, [x])


@FUSED
@EACH_NORM
@pytest.mark.parametrize("tied", [False, True], ids=["two norms", "one norm"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_block_of_parallel_branches(first: bool, tied: bool, norm: str, fused: bool) -> None:
    block = built(ParallelBlock, norm, tied_norm=tied, fused_dropout_add_ln=fused)
    inputs = [drawn(BATCH, LENGTH, DIM, name=name) for name in (("x",) if first else ("x", "x1", "residual"))]
    total = sum(inputs[1:], inputs[0])
    norm2 = block.norm1 if tied else block.norm2
    truth = (block.mixer(normed(block.norm1, total)), block.mlp(normed(norm2, total)), total)
    close(torch.stack(block(*inputs)), torch.stack(truth), inputs)
    assert ("norm2.weight" in block.state_dict()) is not tied


@FUSED
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_the_residual_is_kept_in_float32(kind: Any, fused: bool) -> None:
    half = {"dtype": torch.bfloat16}
    block = kind(
        DIM, functools.partial(MHA, num_heads=4, **half), functools.partial(Mlp, **half),
        functools.partial(nn.LayerNorm, **half), residual_in_fp32=True, fused_dropout_add_ln=fused,
    )  # fmt: skip
    out = block(drawn(BATCH, LENGTH, DIM).detach().bfloat16())
    assert out[-1].dtype == torch.float32
    assert block(*out)[-1].dtype == torch.float32
    assert out[0].dtype == torch.bfloat16


@FUSED
@pytest.mark.parametrize("share", ["resid_dropout1", "resid_dropout2", "drop_path1", "drop_path2"])
def test_branches_are_dropped_in_training_alone(share: str, fused: bool) -> None:
    rows = 4000
    identity = {
        "norm_cls": functools.partial(nn.LayerNorm, elementwise_affine=True),
        "mixer_cls": lambda dim: nn.Identity(),
    }
    block = Block(8, mlp_cls=lambda dim: nn.ReLU(), fused_dropout_add_ln=fused, **identity, **{share: 0.25})
    block.norm1.weight.data.zero_(), block.norm1.bias.data.fill_(1.0)
    _, residual = block(torch.ones(rows, 2, 8))  # dropout(1) + dropout(1)
    dropped = (residual < 1.5).float()
    torch.testing.assert_close(residual, torch.where(dropped.bool(), 1.0, 1 + 1 / 0.75))
    assert abs(dropped.mean() - 0.25) < 0.03
    rowwise = bool((dropped.amax((1, 2)) == dropped.amin((1, 2))).all())
    assert rowwise is share.startswith("drop_path")
    torch.testing.assert_close(block.eval()(torch.ones(3, 2, 8))[1], torch.full((3, 2, 8), 2.0))


def test_all_rows_dropped_leave_zeros() -> None:
    block = Block(8, lambda dim: nn.Identity(), lambda dim: nn.Identity(), drop_path1=1.0)
    assert not block(torch.ones(3, 2, 8))[1].any()


def test_some_tokens_go_on() -> None:
    cross = functools.partial(MHA, num_heads=4, cross_attn=True, **MADE)
    block = Block(DIM, cross, MLP, functools.partial(nn.LayerNorm, **MADE))
    x, some, options = drawn(BATCH, LENGTH, DIM), torch.tensor([0, 2]), {"x_kv": drawn(BATCH, 3, DIM, name="kv")}
    torch.testing.assert_close(
        block(x, mixer_subset=some, mixer_kwargs=options),
        tuple(each[:, some] for each in block(x, mixer_kwargs=options)),
    )
    assert options.keys() == {"x_kv"}


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_norms_are_marked_for_training_over_processes(kind: Any) -> None:
    block = kind(DIM, MIXER, MLP, sequence_parallel=True)
    marked = {name for name, each in block.named_parameters() if getattr(each, "_sequence_parallel", False)}
    assert marked == {f"norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert not any(hasattr(each, "_shared_params") for each in block.parameters())
    assert kind(DIM, MIXER, MLP, mark_shared_params=True).norm1.weight._shared_params


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_defaults_are_heads_of_64_and_four_times_the_size(kind: Any) -> None:
    block = kind(128)
    assert (block.mixer.num_heads, block.mlp.fc1.out_features) == (2, 512)
    assert block.allocate_inference_cache(3, 7).shape == (3, 7, 2, 2, 64)


def test_blocks_with_fused_parts_compile_whole() -> None:
    torch._dynamo.reset()
    block = Block(
        DIM, MIXER, functools.partial(FusedMLP, **MADE), functools.partial(RMSNorm, **MADE), fused_dropout_add_ln=True
    )
    x = drawn(BATCH, LENGTH, DIM)
    mine = torch.compile(block, fullgraph=True, backend="aot_eager")(x, x)
    close(torch.stack(mine), torch.stack(block(x, x)), [x])
    torch._dynamo.reset()


X = torch.zeros(BATCH, LENGTH, DIM)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a residual after norms": (lambda: Block(DIM, prenorm=False)(X, X), "got a residual or mixer_subset with"),
    "a subset after norms": (lambda: Block(DIM, prenorm=False)(X, mixer_subset=0), "got a residual or mixer_subset"),
    "no residual to keep wide": (lambda: Block(DIM, prenorm=False, residual_in_fp32=True), "got residual_in_fp32 with"),
    "another norm to fuse": (
        lambda: Block(DIM, norm_cls=nn.RMSNorm, fused_dropout_add_ln=True), "got fused_dropout_add_ln with RMSNorm",
    ),
    "another dropout to fuse": (
        lambda: ParallelBlock(DIM, dropout_cls=nn.AlphaDropout, fused_dropout_add_ln=True), "and AlphaDropout",
    ),
    "two dropouts to fuse": (
        lambda: ParallelBlock(DIM, resid_dropout1=0.1, fused_dropout_add_ln=True), "got resid_dropout1=0.1 and",
    ),
    "a share of rows": (lambda: Block(DIM, drop_path2=1.5), "got drop_path=1.5"),
    "ParallelMLP": (lambda: ParallelMLP(6), "got ParallelMLP"),
    "ParallelGatedMlp": (lambda: ParallelGatedMlp(6, object()), "got ParallelGatedMlp"),
    "ParallelGPT2Embeddings": (lambda: ParallelGPT2Embeddings(6, 9, 0, object()), "got ParallelGPT2Embeddings"),
    "a group of rows": (lambda: VocabParallelEmbedding(9, 4, process_group=object()), "got VocabParallel"),
    "a group of columns": (lambda: ColumnParallelEmbedding(9, 4, process_group=object()), "got ColumnParallel"),
}  # fmt: skip


@pytest.mark.parametrize(("run", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_words(run: Callable[[], Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        run()
    assert words in str(refusal.value)
