"""Tests of `headway` as a backend in diffusers' registry: its arguments, its models, and what stays as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import fresh
from torch import Tensor, nn

import headway
from headway.errors import NoBackendError, RequestError, SwapError
from headway.sites import diffusers as ours

diffusers = pytest.importorskip("diffusers")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
]


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.2, 0.7]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model, inputs


def wan() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }  # fmt: skip
    return model, inputs


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    """With a padded prompt, hence a mask."""
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    real = torch.ones(2, 7, dtype=torch.long)
    real[1, 4:] = 0
    inputs = {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": real, "timestep": torch.tensor([1.0, 0.5]), "img_shapes": [(1, 4, 4)] * 2,
    }  # fmt: skip
    return model, inputs


MODELS = {"flux": flux, "wan": wan, "qwen": qwen}


def answers(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of a fixed mix of it."""
    model.zero_grad()
    out = model(**inputs).sample
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * mix.to(out.dtype)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each call that comes to Headway."""
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return headway.attention(*args, **kwargs)

    monkeypatch.setattr(ours, "attention", call)
    return calls


@pytest.fixture(autouse=True)
def _default_as_it_was():
    """diffusers' default backend, which nothing here may change."""
    active = dispatch._AttentionBackendRegistry._active_backend
    yield
    assert dispatch._AttentionBackendRegistry._active_backend is active


@pytest.mark.parametrize("name", MODELS)
def test_models_err_no_more_than_before(name):
    model, inputs = MODELS[name]()
    before = answers(model, inputs)
    used = ours.use(model)
    assert used.names, used
    assert not used.left_alone
    now = answers(model, inputs)
    used.undo()
    truth = answers(copy.deepcopy(model).double(), wide(inputs))
    assert len(before) == len(now) == len(truth)
    for b, n, t in zip(before, now, truth, strict=True):
        allowed = 3 * (b - t).abs().max().item() + 1e-6 * max(1.0, t.abs().max().item())
        assert (n - t).abs().max().item() <= allowed


def test_it_runs_by_headway_and_undo_puts_back(monkeypatch):
    model, inputs = flux()
    calls = []
    monkeypatch.setattr(
        ours, "attention", lambda *args, **kwargs: calls.append(1) or headway.attention(*args, **kwargs)
    )
    held = [dict(vars(m.processor)) for m in model.modules() if hasattr(m, "processor")]
    used = ours.use(model)
    assert used.names == ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
    model(**inputs)
    assert len(calls) == 2
    used.undo()
    model(**inputs)
    assert len(calls) == 2
    assert [dict(vars(m.processor)) for m in model.modules() if hasattr(m, "processor")] == held


def test_diffusers_own_reset_takes_it_out():
    model, _ = flux()
    ours.use(model)
    model.reset_attention_backend()
    assert all(m.processor._attention_backend is None for m in model.modules() if hasattr(m, "processor"))


def test_another_model_keeps_its_backend(monkeypatch):
    monkeypatch.setattr(ours, "attention", lambda *args, **kwargs: pytest.fail("another model's attention came here"))
    ours.use(flux()[0])
    model, inputs = flux()
    model(**inputs)


def test_undo_gives_back_a_chosen_backend():
    model, _ = flux()
    model.transformer_blocks[0].attn.set_attention_backend("_native_math")
    ours.use(model).undo()
    assert model.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    assert "_attention_backend" not in vars(model.single_transformer_blocks[0].attn.processor)


def test_register_changes_nothing_that_is_there(tmp_path):
    script = """
import sys, headway, headway.sites.diffusers as ours
assert "diffusers" not in sys.modules
from diffusers.models import attention_dispatch as d
registry, names = d._AttentionBackendRegistry, d.AttentionBackendName
members, lookup = dict(names.__members__), dict(names._value2member_map_)
before = {name: dict(getattr(registry, name)) for name in ("_backends", "_constraints", "_supported_arg_names")}
active = registry._active_backend
made = ours.register()
assert made is ours.register() and made == "headway" and isinstance(made, names), made
assert dict(names.__members__) == members and dict(names._value2member_map_) == lookup
for name, held in before.items():
    now = dict(getattr(registry, name))
    now.pop(made)
    assert now == held, name
assert registry._active_backend is active
assert not registry._is_context_parallel_available(made)
"""
    status, told = fresh(script, folder=tmp_path)
    assert status == 0, told


def test_as_the_default_of_a_block_of_code(monkeypatch):
    calls = []
    monkeypatch.setattr(
        ours, "attention", lambda *args, **kwargs: calls.append(1) or headway.attention(*args, **kwargs)
    )
    model, inputs = flux()
    with dispatch.attention_backend(ours.register()):
        model(**inputs)
    assert len(calls) == 2


def test_copies_and_pickles_keep_it():
    name = ours.register()
    assert copy.copy(name) is copy.deepcopy(name) is name
    assert all(pickle.loads(pickle.dumps(name, protocol)) is name for protocol in range(2, 6))
    model, inputs = flux()
    ours.use(model)
    again = pickle.loads(pickle.dumps(model))
    assert again.transformer_blocks[0].attn.processor._attention_backend is name
    assert torch.equal(again(**inputs).sample, model(**inputs).sample)


def test_a_pickle_registers_where_it_is_loaded(tmp_path):
    data = pickle.dumps(ours.register())
    script = f"""
import pickle
name = pickle.loads({data!r})
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
assert registry._backends[name].__module__ == "headway.sites.diffusers"
"""
    status, told = fresh(script, folder=tmp_path)
    assert status == 0, told


def test_compiles_in_one_graph():
    model, inputs = flux()
    plain = model(**inputs).sample
    ours.use(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).sample, plain, atol=1e-5, rtol=1e-5)


def test_a_model_that_does_not_ask_the_registry_is_refused():
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    with pytest.raises(SwapError, match=r"AttnProcessor2_0 does not ask diffusers' registry.*headway\.swap"):
        ours.use(unet)
    with pytest.raises(SwapError, match="it has no attention of diffusers"):
        ours.use(nn.Linear(2, 2))
    with pytest.raises(SwapError, match="got a object, takes a model of diffusers, such as pipe.transformer"):
        ours.use(object())


def test_some_processors_are_left_alone_with_the_reason():
    model, _ = flux()

    class Other:
        pass

    class Narrow:
        _attention_backend = "flex"
        _SUPPORTED_BACKENDS = ("flex",)

    model.transformer_blocks[0].attn.processor = Other()
    used = ours.use(model)
    assert used.left_alone == {"transformer_blocks.0.attn": "Other does not ask diffusers' registry"}
    model.transformer_blocks[0].attn.processor = Narrow()
    used = ours.use(model)
    assert used.left_alone == {"transformer_blocks.0.attn": "Narrow takes flex only"}
    assert model.transformer_blocks[0].attn.processor._attention_backend == "flex"


@pytest.mark.parametrize("name", MODELS)
def test_the_swap_takes_these_models_too(name):
    model, inputs = MODELS[name]()
    plain = model(**inputs).sample
    with headway.swap(model, inputs) as done:
        assert done.certificate.passed, str(done)
        assert done.census.swapped
        torch.testing.assert_close(model(**inputs).sample, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_set_to_flex_is_told_of_by_the_census():
    """There causal attention without a mask is not causal, and without a word; a swap had found no attention at all."""
    model, inputs = flux()
    model.set_attention_backend("flex")
    try:
        for name in ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"):
            tickets = {ticket.name: ticket for ticket in headway.inspect(model, inputs).tickets}
            assert tickets[name].kind == "flex_attention"
            assert "it calls flex_attention" in tickets[name].because
    finally:
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)


# -- the arguments ----------------------------------------------------------------------------------------------------


def call(*qkv: Tensor, backend: Any = None, **kwargs: Any) -> Any:
    return dispatch.dispatch_attention_fn(*qkv, backend=backend or ours.register(), **kwargs)


def qkv(batch: int = 2, queries: int = 5, keys: int = 7, heads: int = 4, key_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (queries, heads), (keys, key_heads), (keys, key_heads)
    return [torch.randn(batch, *shape, 16, requires_grad=True) for shape in shapes]


def masks() -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    may = torch.rand(2, 4, 5, 7) > 0.4
    may[..., 0] = True
    return {
        "none": None, "batch, keys": may[:, 0, 0], "queries, keys": may[0, 0], "all four": may,
        "shared": may[:, :1, :1], "numbers": torch.randn(2, 4, 5, 7), "numbers of keys": torch.randn(2, 7),
        "numbers of queries": torch.randn(5, 7),
    }  # fmt: skip


@pytest.mark.parametrize("checks", [False, True], ids=["", "checks"])
@pytest.mark.parametrize("mask", masks())
def test_as_the_native_backend(mask, checks, monkeypatch):
    monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_checks_enabled", checks)
    attn_mask = masks()[mask]
    for causal, gqa, scale in itertools.product((False, True), (False, True), (None, 0.7)):
        if causal and attn_mask is not None:
            continue
        inputs = qkv(key_heads=2 if gqa else 4)
        wants = {"attn_mask": attn_mask, "is_causal": causal, "enable_gqa": gqa, "scale": scale}
        mine, theirs = call(*inputs, **wants), call(*inputs, backend="native", **wants)
        torch.testing.assert_close(mine, theirs)
        mix = torch.randn_like(mine)
        pairs = zip(*(torch.autograd.grad((out * mix).sum(), inputs) for out in (mine, theirs)), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs)


def test_a_mask_of_batch_and_keys_is_that_also_where_it_could_be_of_queries():
    inputs = qkv(batch=5, queries=5, keys=7)
    attn_mask = torch.rand(5, 7) > 0.5
    attn_mask[:, 0] = True
    native = call(*inputs, backend="native", attn_mask=attn_mask)
    torch.testing.assert_close(call(*inputs, attn_mask=attn_mask), native)


def test_dropout_is_the_callers():
    torch.manual_seed(0)
    inputs = qkv()
    plain = call(*inputs)
    ones = torch.ones_like(inputs[2])
    dropped = call(inputs[0], inputs[1], ones, dropout_p=0.5)
    assert not torch.allclose(dropped, ones[:, :5])
    assert torch.equal(plain, call(*inputs, dropout_p=0.0))


def test_the_log_of_the_denominators():
    inputs = qkv()
    out, lse = call(*inputs, attention_kwargs={"return_lse": True})
    q, k = (x.double().transpose(1, 2) for x in inputs[:2])
    torch.testing.assert_close(lse.double(), (q @ k.mT / 4).logsumexp(-1).transpose(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, call(*inputs))


def test_a_window():
    inputs = qkv(queries=7)
    at = torch.arange(7)
    near = (at[:, None] - at).abs()
    native = call(*inputs, backend="native", attn_mask=near <= 2)
    torch.testing.assert_close(call(*inputs, attention_kwargs={"window_size": (2, 2)}), native)
    behind = (at[:, None] >= at) & (near <= 2)
    native = call(*inputs, backend="native", attn_mask=behind)
    torch.testing.assert_close(call(*inputs, is_causal=True, attention_kwargs={"window_size": (2, -1)}), native)
    with pytest.raises(headway.HeadwayError, match="align"):
        call(*qkv(), attention_kwargs={"window_size": (2, 2)})


REFUSED = {
    "got a parallel config": {"parallel_config": object()},
    "got attn_mask and is_causal=True": {"is_causal": True, "attn_mask": torch.ones(5, 7, dtype=torch.bool)},
    "got attn_mask bool[2, 5, 7], which": {"attn_mask": torch.ones(2, 5, 7, dtype=torch.bool)},
    "got attn_mask of type object": {"attn_mask": object()},
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_remedy(text):
    with pytest.raises(RequestError) as error:
        call(*qkv(), **REFUSED[text])
    assert str(error.value).startswith(text)


def test_heads_that_share_keys_have_to_say_so():
    with pytest.raises(RequestError, match="4 query heads and 2 key heads.*enable_gqa=True"):
        call(*qkv(key_heads=2))
    with pytest.raises(RequestError, match=r"takes \(batch, length, heads, head_dim\)"):
        ours.attend(*(x[0] for x in qkv()))


def test_a_contract_nobody_keeps_is_not_dropped(monkeypatch):
    monkeypatch.setenv("HEADWAY_BACKEND", "flash4")
    with pytest.raises(NoBackendError):
        call(*qkv())


def test_the_layout_is_batch_length_heads():
    q, k, v = qkv()
    out = call(q, k, v)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert out.shape == (2, 5, 4, 16)
    torch.testing.assert_close(out, theirs.transpose(1, 2))


def test_uses_of_one_model_are_undone_in_any_order_and_leave_later_choices() -> None:
    model, _ = flux()
    processors = [one.processor for one in model.modules() if hasattr(one, "processor")]
    before = [getattr(one, "_attention_backend", None) for one in processors]
    first, second = ours.use(model), ours.use(model)
    first.undo()
    second.undo()
    assert [getattr(one, "_attention_backend", None) for one in processors] == before
    third = ours.use(model)
    for one in processors:
        one._attention_backend = "native"
    third.undo()
    assert {one._attention_backend for one in processors} == {"native"}
