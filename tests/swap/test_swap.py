"""The transaction: what stays the same, what comes back, and what a failure leaves behind."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deck import DEVICES
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import headway
from headway.errors import HeadwayError, RequestError, SwapError, UnknownNameError
from headway.sites import multihead, torch_calls
from headway.sites.site import HELD, Site, site_of
from headway.swap import Swap, inspect, swap, undo
from headway.swap import swap as swap_function

engine = sys.modules["headway.swap.swap"]  # `headway.swap` may also name the function
proof = sys.modules["headway.swap.proof"]

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


class Own(nn.Module):
    """Calls F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two kinds of sites, a decoder layer's cross-attention, a norm with buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), 2)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, 0.1, batch_first=True)
        self.own = Own()
        self.norm = nn.BatchNorm1d(16)

    def get_submodule(self, target: str) -> nn.Module:
        """Some models' own finds less than PyTorch's: here not the model itself."""
        return super().get_submodule(target or "nowhere")

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(x)
        x = self.own(self.decoder(x, memory))
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


SITES = [
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.self_attn",
    "decoder.multihead_attn",
    "own",
]


def made() -> Model:
    torch.manual_seed(0)
    return Model()


def batch() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def names(done: Swap) -> list[str]:
    return [ticket.name for ticket in done.census.swapped]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a swap must leave as it is, by identity where there is one."""
    told: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        told[f"{name} module"] = id(module)
        told[f"{name} class"] = type(module)
        told[f"{name} training"] = module.training
        for key, value in module.__dict__.items():
            plain = isinstance(value, str | int | float | bool | tuple | type(None))
            told[f"{name}.{key}"] = value if plain else id(value)
            if isinstance(value, dict):
                told[f"{name}.{key} items"] = [(k, id(v)) for k, v in value.items()]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        told[f"{name} tensor"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.dtype)
        told[f"{name} value"] = tensor.detach().clone().numpy().tobytes()
        told[f"{name} grad"] = id(tensor.grad)
    return told


def runs(model: nn.Module) -> dict[str, int]:
    sites = {name: site_of(module) for name, module in model.named_modules()}
    return {n: sum(s.ticket.runs.values()) + s.ticket.in_full for n, s in sites.items() if s and s.ticket.swapped}


# -- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("proven", (True, False))
def test_undo_gives_back_the_very_objects(training: bool, proven: bool) -> None:
    """Classes, every __dict__, hooks, flags, parameters, buffers and gradients are the same objects as before."""
    model = made().train(training)
    model.encoder.layers[1].eval()
    model.encoder.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    attention = model.decoder.self_attn
    attention.register_forward_hook(lambda *_: None)
    attention.register_forward_pre_hook(lambda *_: None)
    attention.register_full_backward_hook(lambda *_: None)
    attention.note = {"by": "the caller"}  # type: ignore[assignment]
    model(batch().requires_grad_()).sum().backward()
    before = state(model)
    done = swap(model, batch() if proven else None)
    assert len(names(done)) == (5 if proven else 4)
    during = state(model)
    changed = {key for key in before if before[key] != during.get(key)}
    assert all(key.endswith(" class") for key in changed), changed
    assert {key.rsplit(".", 1)[-1] for key in during.keys() - before.keys()} == {HELD}
    done.undo()
    assert state(model) == before


def test_names_keys_and_parameters_stay() -> None:
    """No key appears, vanishes or moves; a checkpoint crosses both ways; nothing is copied."""
    model, other = made(), made()
    keys, parameters = list(model.state_dict()), [(n, id(p)) for n, p in model.named_parameters()]
    swap(model, batch())
    assert list(model.state_dict()) == keys
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    model.eval(), other.eval()
    torch.testing.assert_close(model(batch()), other(batch()), atol=1e-5, rtol=1e-5)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Attention apart from the rest, with a rate of its own."""
    attention = {id(p) for name in SITES for p in model.get_submodule(name).parameters()}
    ours, rest = ([p for p in model.parameters() if (id(p) in attention) == of] for of in (True, False))
    return [{"params": ours, "lr": 1e-3}, {"params": rest}]


def test_an_optimizer_built_before_keeps_training() -> None:
    """Every parameter moves by its group's rate, as in the stock model, with no new optimizer; frozen ones do not."""
    stock, ours = made().eval(), made().eval()
    optimizers = [torch.optim.SGD(groups(m), 1e-2, momentum=0.9) for m in (stock, ours)]
    for model in (stock, ours):
        model.decoder.multihead_attn.in_proj_bias.requires_grad_(False)
    start = copy.deepcopy(ours.state_dict())
    swap(ours, batch())
    for model, optimizer in zip((stock, ours), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(batch()).square().sum().backward()
            optimizer.step()
    for name, parameter in ours.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == parameter.requires_grad, name
        torch.testing.assert_close(parameter, dict(stock.named_parameters())[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("first", ("average", "swap"))
def test_a_running_average_of_the_weights_goes_on(first: str) -> None:
    """Made before the swap or of the swapped model: names, values and buffers are those of the stock model's."""
    made_of = {"average": lambda m: (ema(m), swap(m, batch())), "swap": lambda m: (swap(m, batch()), ema(m))}
    stock, ours = made(), made()
    averages = [ema(stock), *(each for each in made_of[first](ours) if isinstance(each, AveragedModel))]
    for model, average in zip((stock, ours), averages, strict=True):
        model.eval()
        for _ in range(3):
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.add_(1)
            average.update_parameters(model)
    theirs, mine = (average.module.state_dict() for average in averages)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0, msg=name)
    torch.testing.assert_close(averages[1](batch()), averages[0](batch()), atol=1e-4, rtol=1e-4)
    undo(averages[1])
    assert [type(m) for m in averages[1].module.modules()] == [type(m) for m in stock.modules()]


def ema(model: nn.Module) -> AveragedModel:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.eval()
    return average


def test_hooks_fire_and_see_what_they_saw() -> None:
    stock, ours = made().eval(), made().eval()
    seen: dict[int, list[Any]] = {}
    for i, model in enumerate((stock, ours)):
        log = seen[i] = []
        attention = model.decoder.multihead_attn
        attention.register_forward_pre_hook(
            lambda _, args, kwargs, log=log: log.append(sorted(kwargs)), with_kwargs=True
        )
        attention.register_forward_hook(lambda _, args, out, log=log: log.append((len(out), out[0].shape, out[1])))
        attention.register_full_backward_hook(lambda _, grad, out, log=log: log.append(len(grad)))
    swap(ours)
    for model in (stock, ours):
        model(batch().requires_grad_()).sum().backward()
    assert seen[0] == seen[1] != []


@pytest.mark.parametrize("where", ("meta", *(pytest.param("cuda", marks=pytest.mark.cuda) for _ in DEVICES[1:])))
@pytest.mark.parametrize("first", ("swap", "device"))
def test_before_and_after_a_change_of_device(where: str, first: str) -> None:
    """No parameter stays behind or turns up elsewhere, and nothing that the swap keeps is bound to a device."""
    model, example = made().eval(), batch()
    if first == "device":
        model, example = model.to(where), example.to(where)
    swap(model, None if example.is_meta else example)
    model.to(where)
    assert {p.device.type for p in model.parameters()} == {where}
    assert model(example.to(where)).device.type == where
    undo(model)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {where}


def test_a_model_without_numbers_is_swapped_unproven_and_filled_later() -> None:
    stock = made().eval()
    model = made().eval().to("meta")
    before = [type(module) for module in model.modules()]
    with pytest.raises(SwapError, match="meta device.* takes it without example="):
        swap(model, batch().to("meta"))
    assert [type(module) for module in model.modules()] == before
    swap(model)
    model.load_state_dict(stock.state_dict(), assign=True)
    torch.testing.assert_close(model(batch()), stock(batch()), atol=1e-5, rtol=1e-5)
    assert all(runs(model).values())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("first", ("swap", "dtype"))
def test_before_and_after_a_change_of_dtype(dtype: torch.dtype, first: str) -> None:
    """A bf16 model stays one throughout: no float32 module turns up in it."""
    model = made().eval()
    if first == "swap":
        swap(model, batch())
        model.to(dtype)
    else:
        model.to(dtype)
        done = swap(model, batch().to(dtype))
        assert names(done) == SITES, str(done)
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(batch().to(dtype))
    assert out.dtype == dtype
    stock = made().eval().to(dtype)
    torch.testing.assert_close(out, stock(batch().to(dtype)), atol=0.1, rtol=0.1)
    assert all(runs(model).values())


def test_load_state_dict_after_the_swap_takes_effect() -> None:
    model, other = made().eval(), made().eval()
    swap(model, batch())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    was = model(batch())
    model.load_state_dict(other.state_dict())
    assert not torch.allclose(model(batch()), was)
    torch.testing.assert_close(model(batch()), other(batch()), atol=1e-5, rtol=1e-5)


def test_modes_are_each_modules_own() -> None:
    """Dropout stays off in an eval model, and on where a part is in training; nothing is left in training mode."""
    model = made().eval()
    swap(model, batch())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(batch()), model(batch()))
    model.train()
    assert not torch.equal(model(batch()), model(batch()))


def test_isinstance_and_names_of_classes() -> None:
    model = made()
    swap(model, batch())
    for name in SITES:
        module = model.get_submodule(name)
        assert type(module).__name__ in ("MultiheadAttention", "Own")
        assert isinstance(module, Own if name == "own" else nn.MultiheadAttention)
    assert "MultiheadAttention" in repr(model)


# -- shared, root, repeated -------------------------------------------------------------------------------------------


def test_a_shared_module_is_swapped_once_with_all_its_names() -> None:
    """One module under two parents: one ticket with its aliases, one object after as before."""
    shared = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": shared}), "b": shared, "c": nn.MultiheadAttention(16, 2)})
    done = swap(model)
    assert [(t.name, t.aliases) for t in done.census.swapped] == [("a.x", ("b",)), ("c", ())]
    assert model["b"] is model["a"]["x"] is shared
    assert "a.x = b" in str(done)
    done.undo()
    assert type(shared) is nn.MultiheadAttention
    assert len(names(swap(model, skip="b"))) == 1
    assert type(shared) is nn.MultiheadAttention


@pytest.mark.parametrize("root", (nn.MultiheadAttention(16, 2, batch_first=True), Own()), ids=("multihead", "sdpa"))
def test_the_root_is_a_site_itself(root: nn.Module) -> None:
    x = batch()
    was = type(root)
    done = swap(root, (x, x, x) if isinstance(root, nn.MultiheadAttention) else x)
    assert names(done) == [""]
    assert "(the model itself)" in str(done)
    assert done.certificate is not None
    assert done.certificate.passed
    done.undo()
    assert type(root) is was
    assert HELD not in root.__dict__


def test_the_census_tells_runs_of_a_kernel_from_runs_in_full() -> None:
    """A module that returns its weights uses no kernel, and to count modules would say that it does."""
    model = nn.ModuleDict({name: nn.MultiheadAttention(16, 2, batch_first=True) for name in ("fused", "asked")})

    def run(model: nn.Module) -> Any:
        return [model[name](batch(), batch(), batch(), need_weights=name == "asked")[0] for name in ("fused", "asked")]

    done = swap(model, run, backend="sdpa-math")
    assert str(done.census).splitlines()[1].endswith(": sdpa-math")  # the proof's runs are nobody's
    run(model)
    assert str(done.census).splitlines()[1].endswith("sdpa-math (1 run)")
    for _ in range(2):
        run(model)
    fused, asked = str(done.census).splitlines()[1:3]
    assert fused.endswith("sdpa-math (3 runs)")
    assert "sdpa-math" not in asked.partition(":")[2]
    assert asked.endswith(": in full for its weights (3 runs; a call that asks for none runs on a kernel)")


def test_a_proof_that_needed_no_kernel_says_so() -> None:
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    told = str(swap(model, (x, x, x)))
    assert "nn.MultiheadAttention: no call has run on a kernel yet" in told
    assert "edge deck: none, as the example needed no kernel" in told


def test_a_second_swap_replaces_the_first() -> None:
    """Not on top of it: one class deep, one census, and undo ends at the stock classes."""
    model = made().eval()
    before = state(model)
    first = swap(model, batch(), backend="reference")
    second = swap(model, batch(), backend="sdpa-math", skip="own")
    model(batch())
    for name, module in model.named_modules():
        site = site_of(module)
        if site is not None:
            assert set(site.ticket.runs) <= {"sdpa-math"}
            assert type(module).__dict__["_original"] in (nn.MultiheadAttention, Own)
            assert site.ticket in second.census.tickets
            assert name != "own"
    assert names(first) == SITES
    with pytest.raises(SwapError, match="a later one has replaced"):
        first.undo()
    assert site_of(model.get_submodule(SITES[0])) is not None
    second.undo()
    assert state(model) == before
    second.undo()
    first.undo()
    assert state(model) == before


def test_inspect_of_a_swapped_model_changes_nothing() -> None:
    """It says what a swap would do, and the swap that is there stays."""
    model = made()
    fresh = inspect(model, batch())
    before = state(model)
    assert [t.name for t in fresh.tickets] == SITES
    assert state(model) == before
    swap(model, batch())
    during = state(model)
    again = inspect(model, batch())
    assert [t.name for t in again.swapped] == SITES
    assert state(model) == during
    with pytest.raises(SwapError):
        inspect(model, batch(), only="nothing like it")
    assert state(model) == during


def test_as_a_context() -> None:
    model = made()
    before = state(model)
    with swap(model, batch()) as done:
        assert isinstance(done, Swap)
        assert names(done) == SITES
        assert type(model.own) is not Own
    assert state(model) == before
    with pytest.raises(KeyError), swap(model, batch()):
        raise KeyError
    assert state(model) == before


# -- copies -----------------------------------------------------------------------------------------------------------


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def _torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("again", (_deepcopy, _pickle, _torch_save))
def test_a_copy_is_swapped_on_its_own(again: Callable[[nn.Module], nn.Module]) -> None:
    """It computes by its own sites with a census of its own, and is undone by itself, as is the first."""
    model = made().eval()
    done = swap(model, batch())
    other = again(model)
    model_runs = runs(model)
    torch.testing.assert_close(other(batch()), model.eval()(batch()))
    for name, module in other.named_modules():
        site, mine = site_of(module), site_of(model.get_submodule(name) if name else model)
        assert (site is None) == (mine is None)
        if site is not None and mine is not None:
            assert site is not mine
            assert site.ticket is not mine.ticket
            assert sum(site.ticket.runs.values()) == model_runs[name] + 1
    undo(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in made().modules()]
    assert not any(HELD in m.__dict__ for m in other.modules())
    assert names(done) == SITES
    assert all(site_of(model.get_submodule(name)) for name in SITES)
    done.undo()
    torch.testing.assert_close(other(batch()), model(batch()))


def test_a_model_that_keeps_what_its_last_run_computed() -> None:
    """A tensor that belongs to a graph has no copy in PyTorch, and a swap looks at copies."""

    class Keeps(Own):
        last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.last, self.all = out, {"maps": [out * 2]}
            return out

    model = Keeps()
    out = model(batch())
    done = swap(model, batch())
    assert done.certificate is not None
    assert done.certificate.passed
    assert model.last is out
    out.sum().backward()
    assert model.qkv.weight.grad is not None


def test_a_model_whose_attributes_hold_each_other() -> None:
    model = Own()
    root: dict[str, Any] = {"children": [], "seen": torch.ones(1)}
    root["children"].append({"parent": root})
    model.tree = root
    assert swap(model, batch()).census.swapped
    assert model.tree is root


def test_safetensors_both_ways(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = made().eval(), made().eval()
    swap(model, batch())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    safetensors.save_model(model, tmp_path / "swapped.safetensors")
    assert safetensors.load_model(other, tmp_path / "swapped.safetensors") == (set(), [])
    torch.testing.assert_close(other(batch()), model(batch()), atol=1e-5, rtol=1e-5)
    safetensors.save_model(other, tmp_path / "stock.safetensors")
    assert safetensors.load_model(model, tmp_path / "stock.safetensors") == (set(), [])


# -- failures ---------------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def _boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom


def _steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every step of a swap, each with a way to make it fail."""
    for kind in engine.KINDS:
        yield f"finding {kind.KIND}", lambda kind=kind: monkeypatch.setattr(kind, "find", _boom)
        if kind in (multihead, torch_calls):  # of which the model has sites
            yield f"applying {kind.KIND}", lambda kind=kind: monkeypatch.setattr(kind, "apply", _boom)
    for name in ("see", "matching", "backends", "prove", "Site", "Census", "still", "_by_hand", "_notes"):
        yield name, lambda name=name: monkeypatch.setattr(engine, name, _boom)
    for name in ("_prove", "deal", "facts", "see", "copied", "answer", "errors_of", "_truth"):
        yield f"proof {name}", lambda name=name: monkeypatch.setattr(proof, name, _boom)


STEPS = [name for name, _ in _steps(pytest.MonkeyPatch())]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("earlier", (False, True), ids=("stock", "swapped before"))
def test_a_failure_at_any_step_leaves_the_model_as_it_was(
    step: str, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a model that was swapped before, which stays swapped as it was."""
    model = made()
    if earlier:
        swap(model, only="own", backend="reference", example=batch())
    before = state(model)
    rng = torch.get_rng_state()
    if step.startswith("applying"):
        # It works half, and fails once.
        kind = next(kind for kind in engine.KINDS if step == f"applying {kind.KIND}")
        real, left = kind.apply, [1]

        def once(model: nn.Module, sites: Any) -> None:
            real(model, dict(list(sites.items())[:1]))
            if left and left.pop():
                raise Boom

        monkeypatch.setattr(kind, "apply", once)
    else:
        dict(_steps(monkeypatch))[step]()
    with pytest.raises(Boom):
        swap(model, batch(), only=["*"])
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("nth", range(5))
def test_a_failure_at_each_site_in_turn(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the classes are given, site by site: none or all."""
    model = made()
    before = state(model)
    from headway.sites import roles

    real, count = roles.class_with, [0]

    def class_with(role: type, original: type) -> type:
        if role in (multihead.Multihead, torch_calls.Redirected):
            count[0] += 1
            if count[0] == nth + 1:
                raise Boom
        return real(role, original)

    monkeypatch.setattr(roles, "class_with", class_with)
    with pytest.raises(Boom):
        swap(model, batch())
    assert state(model) == before


def test_an_example_that_fails_leaves_the_model_as_it_was() -> None:
    model = made()
    before = state(model)
    for example in (torch.randn(2, 5, 7), (), {"nothing": 1}, lambda m: 1 / 0):
        with pytest.raises((RuntimeError, AssertionError, TypeError, ZeroDivisionError)):
            swap(model, example)
    assert state(model) == before


def test_a_keyboard_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    before = state(model)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "prove", stop)
    with pytest.raises(KeyboardInterrupt):
        swap(model, batch())
    assert state(model) == before


# -- asked for --------------------------------------------------------------------------------------------------------


def test_a_backend_asked_for_that_refuses_raises() -> None:
    """Every reason in the error, and the model as it was."""
    model = made()
    before = state(model)
    with pytest.raises(HeadwayError, match="flash2"):
        swap(model, batch(), backend={"decoder.*": "flash2"})
    assert state(model) == before
    with pytest.raises(UnknownNameError, match="flashy"):
        swap(model, batch(), backend="flashy")
    assert state(model) == before


def test_contracts_hold_at_every_site() -> None:
    model = made()
    done = swap(model, batch(), require=("double-backward",))
    assert names(done) == SITES
    for ticket in done.census.swapped:
        for decision in ticket.decisions.values():
            assert (
                decision.request.require == frozenset({"double-backward"})
                or "double-backward" in decision.request.require
            )
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(model.eval()(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    with pytest.raises(HeadwayError, match="no-such-contract"):
        swap(model, batch(), require=("no-such-contract",))


@pytest.mark.parametrize("wrap", ("DataParallel", "OptimizedModule", "an OptimizedModule inside", "FSDP"))
def test_wrapped_models_are_refused_with_a_remedy(wrap: str) -> None:
    """And the remedy works."""
    model = made()
    before = state(model)
    wrapped: nn.Module
    if wrap == "DataParallel":
        wrapped = nn.DataParallel(model)
        with pytest.raises(SwapError, match=r"got a DataParallel, takes the model inside: swap\(model.module\)"):
            swap(wrapped, batch())
        swap(wrapped.module, batch())
    elif wrap == "OptimizedModule":
        wrapped = torch.compile(model, backend="eager")  # type: ignore[assignment]
        before = state(model)
        with pytest.raises(SwapError, match=r"swap\(model._orig_mod\), or swap first and torch.compile it then"):
            swap(wrapped, batch())
        swap(wrapped._orig_mod, batch())  # type: ignore[arg-type]
    elif wrap == "FSDP":
        kind: Any = type("FullyShardedDataParallel", (nn.Sequential,), {})
        wrapped = nn.Sequential(kind(model))
        with pytest.raises(SwapError, match="swap first and wrap then"):
            swap(wrapped, batch())
        swap(model, batch())
    else:
        model.own = torch.compile(model.own, backend="eager")  # type: ignore[assignment]
        before = state(model)
        with pytest.raises(SwapError, match="swap first and compile then"):
            swap(model, batch())
        assert state(model) == before
        return
    undo(model)
    assert state(model) == before


def test_data_parallel_over_processes(tmp_path: Path) -> None:
    """DistributedDataParallel reads its model's parameters when it is made: around it or inside it, both train."""
    stock = made().eval()
    stock(batch()).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for first in ("swap", "wrap"):
            model = made().eval()
            if first == "swap":
                swap(model, batch())
            wrapped = nn.parallel.DistributedDataParallel(model)
            with pytest.raises(SwapError, match=r"got a DistributedDataParallel, takes the model inside"):
                swap(wrapped, batch())
            if first == "wrap":
                swap(wrapped.module, batch())
            wrapped(batch()).square().sum().backward()
            assert all(runs(model).values())
            for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
    finally:
        dist.destroy_process_group()


# -- the rest of the process ------------------------------------------------------------------------------------------


def process() -> dict[str, Any]:
    """What a swap might change outside of its model."""
    cuda, hooks = torch.backends.cuda, torch.nn.modules.module
    return {
        "sdpa": id(F.scaled_dot_product_attention),
        "functional": {name: id(value) for name, value in vars(F).items() if callable(value)},
        "tensor": {name: id(value) for name, value in vars(Tensor).items()},
        "multihead": {name: id(value) for name, value in vars(nn.MultiheadAttention).items()},
        "layer": {name: id(value) for name, value in vars(nn.TransformerEncoderLayer).items()},
        "encoder": {name: id(value) for name, value in vars(nn.TransformerEncoder).items()},
        "own": {name: id(value) for name, value in vars(Own).items()},
        "flags": (
            cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic,
            cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
        ),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "environment": dict(os.environ),
        "seeds": (torch.get_rng_state().numpy().tobytes(), random.getstate()),
        "hooks": [
            len(each)
            for each in (hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_backward_hooks)
        ],
        "talk": (list(warnings.filters), logging.root.level, list(logging.root.handlers), sys.stdout, sys.stderr),
        "paths": (list(sys.path), signal.getsignal(signal.SIGINT), sys.excepthook),
        "modes": len(torch.overrides._get_current_function_mode_stack()),
    }  # fmt: skip


def test_nothing_process_wide_changes(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither by a swap, nor while the model runs, nor by undo: flags, functions, classes, seeds, environment, talk."""
    model = made().eval()
    swap(made(), batch())  # what is imported on first use is here now
    before = process()
    done = swap(model, batch())
    assert process() == before
    model(batch())
    assert process() == before
    done.undo()
    assert process() == before
    assert capfd.readouterr() == ("", "")


def test_classes_are_not_touched_so_other_models_are_not() -> None:
    model, other = made(), made()
    swap(model, batch())
    assert type(other.own) is Own
    assert type(other.decoder.self_attn) is nn.MultiheadAttention
    assert type(nn.MultiheadAttention(16, 2)) is nn.MultiheadAttention
    assert runs(other) == {}


def test_differently_swapped_models_in_threads() -> None:
    models = [made().eval() for _ in range(3)]
    for model, backend in zip(models, ("reference", "sdpa-math", None), strict=True):
        if backend:
            swap(model, batch(), backend=backend)
    truth = models[2](batch())
    failures: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    torch.testing.assert_close(model(batch()), truth, atol=1e-5, rtol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for model, backend in zip(models, ("reference", "sdpa-math", None), strict=True):
        found = {name for module in model.modules() if (site := site_of(module)) for name in site.ticket.runs}
        assert found == ({backend} if backend else set())


# -- compiled, exported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", (False, True))
def test_torch_compile_in_one_graph(grad: bool) -> None:
    torch._dynamo.reset()
    stock, model = made().eval(), made().eval()
    swap(model, batch())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(batch()), stock(batch()), atol=1e-5, rtol=1e-5)
    if grad:
        compiled(batch()).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_compiles_itself_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.Module.compile keeps what it compiled: of the class that the module had then."""
    torch._dynamo.reset()
    stock, model = made().eval(), made().eval()
    model.compile(backend="eager")
    model(batch())
    done = swap(model, batch())
    attend = Site.attend
    with monkeypatch.context() as patch:
        patch.setattr(Site, "attend", lambda *args, **kwargs: attend(*args, **kwargs) * 2)
        assert not torch.allclose(model(batch()), stock(batch()), atol=1e-2), "our forward is not what runs"
    torch._dynamo.reset()
    torch.testing.assert_close(model(batch()), stock(batch()), atol=1e-5, rtol=1e-5)
    done.undo()
    torch.testing.assert_close(model(batch()), stock(batch()), atol=1e-5, rtol=1e-5)


def test_torch_compile_of_multihead_with_weights_and_masks() -> None:
    torch._dynamo.reset()
    stock = nn.MultiheadAttention(16, 2, batch_first=True)
    model = copy.deepcopy(stock)
    swap(model)
    x, filler = batch(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kwargs in ({}, {"key_padding_mask": filler}, {"attn_mask": causal, "key_padding_mask": filler}):
        for need_weights in (True, False):
            mine = compiled(x, x, x, need_weights=need_weights, **kwargs)
            theirs = stock(x, x, x, need_weights=need_weights, **kwargs)
            torch.testing.assert_close(mine[0], theirs[0], atol=1e-5, rtol=1e-5)
            assert (mine[1] is None) == (not need_weights)


def test_torch_export() -> None:
    """The exported program computes what the model does."""
    stock, model = made().eval(), made().eval()
    swap(model, batch())
    program = torch.export.export(model, (batch(),))
    torch.testing.assert_close(program.module()(batch()), stock(batch()), atol=1e-5, rtol=1e-5)
    assert list(program.state_dict) == list(stock.state_dict())


def test_the_public_names() -> None:
    assert swap_function is swap
    assert isinstance(headway.__version__, str)


# -- what is no model, and no example ----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", (swap, inspect))
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (nn.MultiheadAttention, "the class MultiheadAttention"),
        ([nn.Linear(2, 2)], "a list"),
        (None, "a NoneType"),
        (torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)), "a TopLevelTracedModule"),
    ],
    ids=("class", "list", "none", "traced"),
)
def test_what_is_no_model_is_refused(act: Callable[..., Any], wrong: Any, got: str) -> None:
    with pytest.raises(SwapError, match=f"got {got}, takes a model"):
        act(wrong, torch.randn(1, 2))


class Ten(torch.utils.data.Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(32)


@pytest.mark.parametrize("act", (swap, inspect))
@pytest.mark.parametrize(
    "wrong", ["hello", iter([batch()]), (x for x in [batch()]), torch.utils.data.DataLoader(Ten()), Ten()],
    ids=("str", "iterator", "generator", "loader", "dataset"),
)  # fmt: skip
def test_what_is_no_example_is_refused_with_what_is(act: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"as the example, takes one batch .* a dict .*next\(iter\(loader\)\)"):
        act(made(), wrong)
