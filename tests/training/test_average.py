"""The average is the formula's in float64, goes into the model and out again to the bit, and resumes exactly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from forked import together
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from waiting import no_waiting

from headway import RequestError
from headway_apps.training.average import Average


class Odd(nn.Module):
    """Weights of every kind: tied, without axes, strided, frozen, of other dtypes; and a buffer of integers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, dtype=dtype)
        self.head = nn.Linear(4, 5, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.strided = nn.Parameter(torch.randn(3, 4, dtype=dtype).t())
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(2).half())
        self.ids = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("seen", torch.tensor(3))
        self.empty = nn.Parameter(torch.empty(0, 2))


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def same(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_it_is_the_formula_in_float64(decay: float, dtype: torch.dtype) -> None:
    model = Odd(dtype)
    average = Average(model, decay)
    truth = {name: each.detach().double() for name, each in model.named_parameters() if each.is_floating_point()}
    for n in range(1, 60):
        trained(model)
        average.update(model)
        d = min(decay, (1 + n) / (10 + n))
        for name, weight in model.named_parameters():
            if name in truth:
                truth[name] = truth[name] - (1 - d) * (truth[name] - weight.detach().double())
    assert average.count == 59
    assert (
        average.weights.keys()
        == truth.keys()
        == {"embed.weight", "scale", "strided", "frozen", "wide", "narrow", "empty"}
    )
    for name, shadow in average.weights.items():
        weight = model.get_parameter(name)
        assert shadow.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(shadow.double(), truth[name], rtol=1e-5, atol=1e-5)


def test_a_bfloat16_weight_is_averaged_in_steps_that_bfloat16_lacks() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    average = Average(model, 0.9999)
    average.count = 10**6
    model.weight.data.fill_(2.0)
    average.update(model)
    assert float(average.weights["weight"]) == pytest.approx(1.0001, abs=1e-6)


def test_a_frozen_weight_stays_what_it_is_to_the_bit() -> None:
    model = Odd()
    average = Average(model, 0.9)
    for _ in range(100):
        trained(model)
        average.update(model)
    assert torch.equal(average.weights["frozen"], model.frozen)


def test_the_model_has_the_averages_inside_and_its_own_tensors_after() -> None:
    model = Odd()
    average = Average(model, 0.9)
    trained(model)
    average.update(model)
    before, at = bits(model), {name: each.data_ptr() for name, each in model.named_parameters()}
    objects = dict(model.named_parameters())
    with average.applied(model):
        for name, weight in model.named_parameters():
            if name in average.weights:
                assert torch.equal(weight, average.weights[name].to(weight.dtype))
        assert model.head.weight is model.embed.weight
        assert not same(before, bits(model))
    assert same(before, bits(model))
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == at
    assert all(each is objects[name] for name, each in model.named_parameters())


def test_an_error_inside_gives_the_trained_weights_back() -> None:
    model = nn.Linear(3, 3)
    average = Average(model, 0.9)
    trained(model)
    before = bits(model)
    with pytest.raises(ZeroDivisionError), average.applied(model):
        raise ZeroDivisionError
    assert same(before, bits(model))
    average.update(model)  # and it goes on


def test_gradients_and_the_optimizer_do_not_notice() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)
    results = []
    for each, looks in ((model, True), (twin, False)):
        optimizer, average = torch.optim.AdamW(each.parameters()), Average(each, 0.9)
        for step in range(4):
            each(torch.full((2, 3), float(step))).square().sum().backward()
            if looks:
                with average.applied(each), torch.inference_mode():
                    each(torch.ones(2, 3))
            optimizer.step()
            optimizer.zero_grad()
            average.update(each)
        results.append({**bits(each), **{f"shadow {name}": value for name, value in average.weights.items()}})
    assert same(*results)


def test_it_goes_on_from_what_was_kept_as_if_it_had_never_stopped() -> None:
    model = Odd(torch.bfloat16)
    whole = Average(model, 0.99)
    for _ in range(3):
        trained(model)
        whole.update(model)
    resumed = Average(model, 0.99)
    resumed.load({name: each.clone() for name, each in whole.weights.items()}, whole.count)
    for _ in range(3):
        trained(model)
        whole.update(model)
        resumed.update(model)
    assert resumed.count == whole.count == 6
    assert same(whole.weights, resumed.weights)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"bias": None}, r"1 weights are not as averaged \(bias: got none, takes \(torch.float32, 2\)\)"),
        ({"bias": torch.zeros(3)}, r"bias: got \(torch.float32, 3\), takes \(torch.float32, 2\)"),
        ({"bias": torch.zeros(2).double()}, r"bias: got \(torch.float64, 2\)"),
        ({"other": torch.zeros(1)}, r"other: got \(torch.float32, 1\), takes none"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(
    change: dict[str, Tensor | None], says: str
) -> None:
    average = Average(nn.Linear(2, 2), 0.9)
    before = {name: each.clone() for name, each in average.weights.items()}
    given = {name: each + 1 for name, each in average.weights.items()} | change
    with pytest.raises(RequestError, match=says):
        average.load({name: each for name, each in given.items() if each is not None}, 3)
    assert same(before, average.weights)
    assert average.count == 0


def test_another_model_is_refused() -> None:
    average = Average(nn.Linear(2, 2), 0.9)
    wrapped = nn.Sequential(nn.Linear(2, 2))
    for use in (average.update, lambda model: average.applied(model).__enter__()):
        with pytest.raises(RequestError, match=r"got a model of which 4 weights .*\(weight: got none, takes \(2, 2\)"):
            use(wrapped)
    assert average.count == 0


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(RequestError, match="takes a number from 0 to less than 1"):
        Average(nn.Linear(2, 2), decay)


def test_while_it_is_applied_it_is_neither_updated_nor_applied_again() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    with average.applied(model):
        with pytest.raises(RequestError, match="got update"):
            average.update(model)
        with pytest.raises(RequestError, match="got applied"), average.applied(model):
            pass
    average.update(model)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu() -> None:
    model = Odd().to("cuda")
    average = Average(model, 0.9)
    with no_waiting():
        average.update(model)
        with average.applied(model):
            pass


def sharded() -> None:
    """Averages of a model and of the same one in shards."""
    dist.init_process_group("gloo")

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def whole(x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x

    plain, shards = made(), made()
    fully_shard(shards[2])
    fully_shard(shards, ignored_params={shards[0].bias})
    averages = []
    x = torch.linspace(-1, 1, 24).view(4, 6)
    for model in (plain, shards):
        optimizer, average = torch.optim.SGD(model.parameters(), 0.1), Average(model, 0.5)
        for step in range(3):
            model(x * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(x)  # which leaves the root of FSDP2 gathered
            average.update(model)
        with torch.no_grad():
            before = model(x)
            with average.applied(model):
                inside = model(x)
            after = model(x)
        averages.append((before, inside, after, *(whole(each) for each in average.weights.values())))
        assert torch.equal(before, after)
        assert not torch.allclose(before, inside)
    torch.testing.assert_close(*averages)
    shadows = [isinstance(each, DTensor) for each in average.weights.values()]
    assert shadows == [True, False, True, True]
    print("alike")
    dist.destroy_process_group()


def test_shards_of_fsdp2_are_averaged_as_the_whole_is() -> None:
    """Two processes. What is gathered when the averages are put in or taken out does not keep the others."""
    for code, told in together(sharded):
        assert (code, told) == (0, "alike\n")
