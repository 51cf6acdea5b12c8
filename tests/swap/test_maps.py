"""Attention maps on demand: the weights that attention uses, of the rows asked for alone, and nothing changed."""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

import headway
from headway.errors import RequestError, SwapError
from headway.sites.noted import noted
from headway.sites.site import site_of
from headway.swap import maps, swap, undo

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def textbook(q: Tensor, k: Tensor, keep: Tensor | None = None, added: Tensor | float = 0.0) -> Tensor:
    """Softmax in float64; 0 in rows that see nothing."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]) + added
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0)


def close(mine: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(mine.double(), truth.detach().double(), atol=2e-6, rtol=1e-5)


class Own(nn.Module):
    """Calls F.scaled_dot_product_attention with what it is given."""

    def __init__(self, **wants: Any) -> None:
        super().__init__()
        self.wants = wants

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = {key: value() if callable(value) else value for key, value in self.wants.items()}
        return F.scaled_dot_product_attention(q, k, v, **made)


def qkv(heads: int = 4, kv_heads: int = 4, queries: int = 5, keys: int = 7, size: int = 8) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    shapes = ((2, heads, queries, size), (2, kv_heads, keys, size), (2, kv_heads, keys, size))
    return tuple(2 * torch.randn(shape, generator=random) for shape in shapes)


def of(inputs: tuple[Tensor, ...], rows: Any = None, heads: Any = None, **wants: Any) -> Tensor:
    model = Own(**wants)
    swap(model, inputs)
    (found,) = maps(model, inputs, rows=rows, heads=heads)[""]
    return found.weights


def encoder(dropout: float = 0.0) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True), 2)


def batch() -> dict[str, Tensor]:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return {"src": torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)), "src_key_padding_mask": padding}


# -- the three kinds --------------------------------------------------------------------------------------------------


def test_encoder_maps_equal_need_weights_of_the_unswapped_module() -> None:
    model = encoder()
    truth, inputs = {}, []
    judge = copy.deepcopy(model).double()
    for name, layer in judge.layers.named_children():
        layer.self_attn.register_forward_pre_hook(lambda _, args, name=name: inputs.append((name, args)))
    judge(batch()["src"].double(), src_key_padding_mask=batch()["src_key_padding_mask"])
    for name, args in list(inputs):
        plain = judge.get_submodule(f"layers.{name}.self_attn")
        blocked = batch()["src_key_padding_mask"]
        truth[f"layers.{name}.self_attn"] = plain(*args, key_padding_mask=blocked, average_attn_weights=False)[1]
    swap(model, batch())
    found = maps(model, batch())
    assert found.keys() == truth.keys()
    for name, want in truth.items():
        (one,) = found[name]
        assert (one.site, one.rows, one.heads, one.mask) == (name, tuple(range(6)), (0, 1), "bias")
        close(one.weights, want)


@pytest.mark.parametrize("average", (True, False))
def test_a_call_that_asks_for_weights_itself_has_a_map_too(average: bool) -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)

    def run(model: nn.Module) -> None:
        model(x, x, x, average_attn_weights=average)

    want = model(x, x, x, average_attn_weights=False)[1]
    swap(model, run)
    (one,) = maps(model, run)[""]
    close(one.weights, want)


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")  # ours are zeros
@pytest.mark.parametrize("keys", (5, 7, 3))
@pytest.mark.parametrize("rows", (None, [1], [-1, 0], slice(1, None, 2)), ids=str)
def test_causal_keeps_its_place_when_rows_are_chosen(rows: Any, keys: int) -> None:
    q, k, v = qkv(keys=keys)
    keep = torch.ones(5, keys, dtype=torch.bool)
    chosen = slice(None) if rows is None else rows
    close(of((q, k, v), rows, is_causal=True), textbook(q, k, keep.tril())[:, :, chosen])
    lower = of((q, k, v), rows, attn_mask=lambda: causal_lower_right(5, keys))  # a CausalBias cannot be copied
    close(lower, textbook(q, k, keep.tril(keys - 5))[:, :, chosen])


def test_biases_scale_and_rows_that_see_nothing() -> None:
    q, k, v = qkv()
    bias = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(2))
    bias[..., 3:] = float("-inf")
    bias[1, 2, 4] = float("-inf")
    found = of((q, k, v), [4, 2], [3, 2], attn_mask=bias, scale=0.5)
    close(found, textbook(q * 0.5 * math.sqrt(8), k, added=bias.double())[:, [3, 2]][:, :, [4, 2]])
    assert (found[1, 1, 0] == 0).all()
    keep = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[2] = False
    found = of((q, k, v), slice(2, 4), attn_mask=keep)
    close(found, textbook(q, k, keep)[:, :, 2:4])
    assert (found[:, :, 0] == 0).all()


def test_grouped_heads_are_chosen_by_the_querys_number() -> None:
    q, k, v = qkv(heads=4, kv_heads=2)
    truth = textbook(q, k.repeat_interleave(2, 1))
    close(of((q, k, v), enable_gqa=True), truth)
    close(of((q, k, v), -1, [3, 0], enable_gqa=True), truth[:, [3, 0]][:, :, -1:])
    close(of((q, k, v), 0, 2, enable_gqa=True), truth[:, 2:3][:, :, :1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_weights_are_in_float32_at_least(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    found = of((q, k, v), is_causal=True)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    close(found, textbook(q, k, torch.ones(5, 7, dtype=torch.bool).tril()))


def test_under_autocast_they_are_of_what_the_kernel_saw() -> None:
    q, k, v = qkv()
    swap(model := Own(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        (one,) = maps(model, (q, k, v))[""]
    assert one.weights.dtype == torch.float32
    close(one.weights, textbook(q.bfloat16(), k.bfloat16()))


# -- transformers' ----------------------------------------------------------------------------------------------------


def hugging_face(name: str, **inputs: Any) -> tuple[Any, dict[str, Any]]:
    models = pytest.importorskip("sites.test_transformers_models")
    return models.decoder(name, "eager"), {"input_ids": models.ids(2, 9), **inputs}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*", "ignore::FutureWarning:transformers.*")
@pytest.mark.parametrize(("asks", "side"), ((True, "right"), (False, "right"), (False, "left")))
@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2", "gpt_oss"))
def test_maps_equal_those_of_eager_attention(name: str, asks: bool, side: str) -> None:
    """Grouped heads, sliding windows, softcap and sinks; also where the caller wants weights of its own."""
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, slice(0, 3) if side == "left" else slice(6, None)] = 0
    model, inputs = hugging_face(name, attention_mask=padding)
    # Its masks are made in float32, and in float64 rows of filler would be NaN, in the next layer all of them.
    judge = copy.deepcopy(model) if side == "left" else copy.deepcopy(model).double()
    truth = judge(**inputs, output_attentions=True).attentions
    swap(model, inputs)
    found = maps(model, {**inputs, "output_attentions": asks}, rows=[3, -1])
    assert len(found) == len(truth) == 2
    for (one,), want in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(one.weights.double(), want[:, :, [3, -1]].double(), atol=2e-5, rtol=1e-4)
        sums = one.weights.sum(-1)
        assert (sums < 0.99).any() == (name == "gpt_oss")
        assert (sums < 1.00001).all()
    assert any("window" in one.mask or "causal" in one.mask for (one,) in found.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*", "ignore::FutureWarning:transformers.*")
@pytest.mark.parametrize("name", ("bart", "t5"))
def test_encoder_decoder(name: str) -> None:
    """Position biases, cross-attention, and a length of its own at each site."""
    models = pytest.importorskip("sites.test_transformers_models")
    config, inputs = models.ENCODERS[name]
    model = models.filled(models.tf.AutoModel.from_config(config(), attn_implementation="eager"))
    want = copy.deepcopy(model).double()(
        **{key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}, output_attentions=True
    )
    done = swap(model, inputs)
    found = maps(model, inputs)
    assert len(found) == len(done.census.swapped)
    for key, part in (("encoder_attentions", "encoder."), ("decoder_attentions", "decoder."), ("cross_attentions", "")):
        cross = "EncDecAttention" if name == "t5" else "encoder_attn"
        mine = [v for k, v in found.items() if (cross in k) == (not part) and k.startswith(part)]
        assert len(mine) == len(want[key])
        for (one,), theirs in zip(mine, want[key], strict=True):
            torch.testing.assert_close(one.weights.double(), theirs.double(), atol=2e-5, rtol=1e-4)


# -- what is computed -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has, or could have in memory."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("causal", (True, False))
def test_only_chosen_rows_and_heads_are_computed(causal: bool) -> None:
    inputs = qkv(queries=512, keys=512)
    swap(model := Own(is_causal=causal), inputs)
    whole, taken = 2 * 4 * 512 * 512, max(x.numel() for x in inputs)
    with Largest() as seen:
        maps(model, inputs)
    assert seen.most == whole
    with Largest() as seen:
        maps(model, inputs, rows=[3, 500, -1])
    assert seen.most <= max(2 * 4 * 3 * 512, taken)
    with Largest() as seen:
        maps(model, inputs, heads=[1], rows=slice(0, 64))
    assert seen.most <= max(2 * 64 * 512, taken)


def test_a_chosen_site_alone_and_each_of_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            for attend in (self.one, self.two, self.one):
                x = attend(x, x, x, need_weights=False)[0]
                x = torch.cat((x, x))
            return x

    swap(model := Twice(), x := torch.randn(3, 1, 8))
    assert [one.weights.shape[2:] for one in maps(model, x, sites="one", rows=-1)["one"]] == [(1, 3), (1, 12)]
    assert [one.rows for one in maps(model, x, sites="one", rows=-1)["one"]] == [(2,), (11,)]
    assert maps(model, x, sites=["one", "t*"]).keys() == {"one", "two"}
    assert maps(model, x, sites=lambda name, module: name == "two").keys() == {"two"}
    assert maps(model, lambda model: model.one(x, x, x), sites="two") == {"two": []}
    assert maps(model, x, nn.MultiheadAttention, rows=[])["two"][0].weights.shape == (1, 2, 0, 6)


def test_without_keys_or_rows() -> None:
    q, k, v = qkv()
    swap(model := Own(), (q, k, v))
    assert maps(model, (q, k[:, :, :0], v[:, :, :0]))[""][0].weights.shape == (2, 4, 5, 0)
    assert maps(model, (q[:, :, :0], k, v))[""][0].weights.shape == (2, 4, 0, 7)


def test_a_swapped_part_of_a_model_goes_by_its_own_names() -> None:
    model = encoder()
    swap(model, batch())
    assert maps(model.layers[0], batch()["src"]).keys() == {"self_attn"}


# -- what stays -------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = encoder(0.5), nn.BatchNorm1d(16)

    def forward(self, src: Tensor, **masks: Tensor) -> Tensor:
        out: Tensor = self.norm(self.encoder(src, **masks).transpose(1, 2))
        return out


def told(model: nn.Module) -> dict[str, Any]:
    """All that a look must leave as it was."""
    found: dict[str, Any] = {"random": torch.get_rng_state().numpy().tobytes()}
    for name, module in model.named_modules():
        found[name] = type(module), module.training, {key: id(value) for key, value in vars(module).items()}
        found[f"{name} hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks)
        site = site_of(module)
        if site is not None:
            ticket = site.ticket
            found[f"{name} ticket"] = Counter(ticket.runs), ticket.in_full, set(ticket.decisions), vars(site).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} tensor"] = id(tensor), id(tensor.grad), tensor.detach().clone().numpy().tobytes()
    return found


@pytest.mark.parametrize("fails", (True, False))
@pytest.mark.parametrize("training", (True, False))
def test_nothing_changes(training: bool, fails: bool) -> None:
    model = Normed().train(training)
    model.encoder.layers[1].eval()
    swap(model, batch())
    model(**batch()).sum().backward()
    modes: list[bool] = []
    model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = told(model)

    def run(model: nn.Module) -> None:
        out = model(**batch())
        assert not out.requires_grad
        model.encoder.layers[0].self_attn(*[batch()["src"]] * 3)
        model.train()
        if fails:
            raise KeyError

    if fails:
        with pytest.raises(KeyError):
            maps(model, run)
    else:
        found = maps(model, run)
        assert [len(each) for each in found.values()] == [2, 1]
        assert all(torch.allclose(one.weights.sum(-1), torch.ones(())) for each in found.values() for one in each)
    assert modes == [training]
    assert told(model) == before


def test_the_output_is_the_kernels_and_not_computed_from_the_maps() -> None:
    model = encoder()
    swap(model, batch(), backend="sdpa-math")
    want, answers = model(**batch()), []
    maps(model, lambda model: answers.append(model(**batch())))
    assert torch.equal(answers[0], want)


def test_another_threads_calls_are_not_of_this_run() -> None:
    model = encoder()
    swap(model, batch())

    def run(model: nn.Module) -> None:
        other = threading.Thread(target=model, kwargs=batch())
        other.start()
        other.join()
        model(**batch())

    assert [len(each) for each in maps(model, run).values()] == [1, 1]
    assert [sum(site.ticket.runs.values()) for m in model.modules() if (site := site_of(m))] == [1, 1]


def test_in_inference_mode() -> None:
    model = encoder().eval()
    swap(model, batch())
    with torch.inference_mode():
        assert maps(model, batch()).keys() == {"layers.0.self_attn", "layers.1.self_attn"}


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_swapped() -> None:
    model = encoder()
    with pytest.raises(SwapError, match=r"got a model that is not swapped, takes one that is: headway\.swap\(model"):
        maps(model, batch())
    swap(model, batch())
    undo(model)
    with pytest.raises(SwapError, match="not swapped"):
        headway.maps(model, batch())


@pytest.mark.parametrize(
    ("asked", "match"),
    (
        ({"sites": "decoder*"}, r"got sites='decoder\*', which matches no site; the sites are: 'layers.0.self_attn'"),
        ({"rows": 6}, r"got rows=6 for a call of 'layers.0.self_attn' with 6 rows, takes -6 to 5"),
        ({"rows": [0, -7]}, "got rows=-7 for a call"),
        ({"heads": [2]}, r"got heads=2 for a call of 'layers.0.self_attn' with 2 heads, takes -2 to 1"),
        ({"rows": "all"}, "got rows='all', takes None, an int, a slice or a sequence of ints"),
        ({"rows": True}, "got rows=True, takes"),
        ({"heads": [0.5]}, "got heads="),
    ),
)
def test_what_cannot_be_chosen(asked: dict[str, Any], match: str) -> None:
    model = encoder()
    swap(model, batch())
    before = told(model)
    with pytest.raises((SwapError, RequestError), match=match):
        maps(model, batch(), **asked)
    assert told(model) == before


def test_a_site_left_alone_is_refused_with_its_reason() -> None:
    model = encoder()
    done = swap(model, batch(), skip="layers.1.*")
    with pytest.raises(SwapError, match=r"'layers.1.self_attn', left alone because .*print the Swap"):
        maps(model, batch(), sites="layers.1.*")
    with pytest.raises(SwapError, match=r"'layers.1.self_attn', left alone because it is left out by only= or skip="):
        maps(done, batch(), sites="layers.1.*")
    assert maps(done, batch(), sites="*").keys() == {"layers.0.self_attn"}


def test_no_example_and_compiled_models() -> None:
    model = encoder()
    swap(model, batch())
    with pytest.raises(RequestError, match="got no example"):
        maps(model, None)  # type: ignore[arg-type]
    with pytest.raises(SwapError, match="got a model compiled by torch.compile"):
        maps(torch.compile(model), batch())
    model.layers[0].compile()
    with pytest.raises(SwapError, match="got layers.0 compiled"):
        maps(model, batch())


@pytest.mark.parametrize("make", (torch.tensor, tuple, list), ids=lambda make: make.__name__)
def test_rows_by_any_sequence_of_numbers(make: Callable[..., Any]) -> None:
    inputs = qkv()
    close(of(inputs, make([1, 3]), torch.tensor(2)), textbook(*inputs[:2])[:, 2:3][:, :, [1, 3]])


def test_two_runs_at_once_leave_the_model_its_own_sites() -> None:
    """Each put back what it had found: the later one the stand-in of the earlier."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    swap(model, torch.randn(1, 4, 16))
    site = site_of(model.self_attn)
    first, second = (noted(model, lambda *_: None, counted=False) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert site_of(model.self_attn) is site
    first, second = (noted(model, lambda *_: None, counted=False) for _ in range(2))
    first.__enter__()
    second.__enter__()
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert site_of(model.self_attn) is site
