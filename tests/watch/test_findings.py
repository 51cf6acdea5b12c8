"""What is planted is found where it was planted, and a sound fresh model gives no alarm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from watch.models import MODELS, Mixed, tensors

from headway.watch import Recording, watch


def train_step(model: nn.Module, *inputs: Tensor) -> None:
    sum(one.float().square().mean() for one in tensors(model(*inputs))).backward()


def said(recording: Recording, severity: str = "") -> list[str]:
    return [f"{one.module}: {one.what}" for one in recording.report() if severity in ("", one.severity)]


class Planted(nn.Module):
    """Three layers; between them, in a module of its own, something is done to x."""

    def __init__(self, harm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), Harm(harm), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Harm(nn.Module):
    def __init__(self, harm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.harm = harm

    def forward(self, x: Tensor) -> Tensor:
        return self.harm(x)


NAN_FROM_FINITE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sqrt": (lambda x: (x - 100).sqrt(), "sqrt"),
    "log": (lambda x: (x - 100).log(), "log"),
    "0 / 0": (lambda x: (x * 0) / (x * 0), "div"),
    "in place": (lambda x: x.clone().sub_(100).sqrt_(), "sqrt_"),
    "in one number": (lambda x: torch.where(torch.arange(4) == 2, x - 100, x.abs()).sqrt(), "sqrt"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAN_FROM_FINITE)
def test_a_planted_nan_is_found_at_its_origin(name: str, dtype: torch.dtype) -> None:
    harm, operator = NAN_FROM_FINITE[name]
    model = Planted(harm).to(dtype)
    with watch(model) as recording:
        train_step(model, torch.randn(3, 4, dtype=dtype))
    first = recording.report()[0]
    assert (first.severity, first.module) == ("error", "middle.1")
    assert f"made by {operator} of finite numbers" in first.what
    assert next(one.path for one in recording.origins if one.what == "NaN") == "middle.1"


def test_a_row_masked_entirely_is_named_as_such() -> None:
    model = Planted(lambda x: x.masked_fill(torch.arange(3)[:, None] == 1, -math.inf).softmax(-1))
    with watch(model) as recording:
        model(torch.randn(3, 4))
    (origin,) = recording.origins  # the mask's own -inf is no origin
    assert (origin.what, origin.op, origin.path, origin.inputs) == ("NaN", "_softmax", "middle.1", "Inf")
    assert "masked entirely" in recording.report()[0].do


def test_a_nan_of_an_overflow_names_both() -> None:
    model = Planted(lambda x: (x * 1e30 * 1e30) * 0)
    with watch(model) as recording:
        model(torch.randn(3, 4))
    assert [(one.what, one.op) for one in recording.origins] == [("Inf", "mul#2"), ("NaN", "mul#3")]
    assert [one.severity for one in recording.report()][:2] == ["error", "warning"]


def test_an_inf_that_no_module_hands_on_is_only_a_note() -> None:
    model = Planted(lambda x: torch.where(x > -100, x, (x * 0).log()))
    with watch(model) as recording:
        model(torch.randn(3, 4))
    assert [one.what for one in recording.origins] == ["Inf"]
    assert {one.severity for one in recording.report()} == {"note"}


def test_overflow_of_half() -> None:
    model = Planted(lambda x: x * 60000 * 100)
    with watch(model.half()) as recording:
        model(torch.ones(3, 4).half())
    assert (recording.origins[0].what, recording.origins[0].path) == ("Inf", "middle.1")


def test_masks_are_no_alarm() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    with watch(layer) as recording:
        x = torch.randn(2, 5, 8)
        filler = torch.zeros(2, 5).masked_fill(torch.arange(5) > 2, -math.inf)
        layer(x, src_mask=mask, src_key_padding_mask=filler).square().mean().backward()
    assert said(recording) == []


def test_a_nan_in_the_input_or_in_a_parameter_is_no_operators() -> None:
    model = Planted(lambda x: x)
    x = torch.randn(3, 4)
    x[1, 2] = math.nan
    with watch(model) as recording:
        model(x)
    assert "held by the model's input" in said(recording)[0]
    with torch.no_grad():
        model.middle[0].bias[1] = math.nan
    with watch(model) as recording:
        model(torch.randn(3, 4))
    assert said(recording)[0].startswith("middle.0: the first NaN arrived at addmm, held by parameter middle.0.bias")


def test_a_nan_made_in_backward() -> None:
    model = Planted(lambda x: (x * 0).norm(dim=-1, keepdim=True) + (x * 0).abs().sqrt())
    with watch(model) as recording:
        model(torch.randn(3, 4)).sum().backward()
    origin = next(one for one in recording.origins if one.what == "NaN")
    assert (origin.phase, origin.path) == ("backward", "middle.1")
    assert "its gradient held" in " ".join(said(recording, "error"))


def test_a_nan_made_by_the_loss() -> None:
    model = nn.Linear(4, 1)
    with watch(model) as recording:
        (model(torch.randn(3, 4)) - 100).log().sum().backward()
    origin = next(one for one in recording.origins if one.what == "NaN")
    assert (origin.phase, origin.op, origin.path) == ("outside", "log", "(outside the model)")


def test_memory_that_nobody_filled_is_no_alarm() -> None:
    class Fills(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            filler = torch.full((3, 4), math.nan)
            del filler  # the next empty memory likely holds it
            return torch.empty(3, 4).copy_(x)

    model = Fills()
    with watch(model) as recording:
        model(torch.randn(3, 4))
    assert not recording.origins


class Dead(nn.Module):
    """One part of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.detached = nn.Linear(4, 4)
        self.overwritten = nn.Linear(4, 4)
        self.silenced = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {"y": self.overwritten(x)}
        outputs["y"] = self.used(x) + self.detached(x).detach() + 0 * self.silenced(x) + self.frozen(x)
        return outputs


def test_dead_parameters_of_each_kind() -> None:
    model = Dead()
    with watch(model) as recording:
        train_step(model, torch.randn(3, 4))
    assert said(recording) == [
        "unused: unused: no forward took 4 parameters, 40 numbers",
        "detached: no gradient path: forward used 2 parameters, 20 numbers, and no backward reached it",
        "overwritten: no gradient path: forward used 2 parameters, 20 numbers, and no backward reached it",
        "silenced: gradient exactly 0: 2 parameters, 20 numbers",
    ]


def test_an_optimizers_step_uses_nothing() -> None:
    model = Dead()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    with watch(model) as recording:
        train_step(model, torch.randn(3, 4))
        optimizer.step()
    assert not recording.parameters["unused.0.weight"].used
    assert recording.parameters["detached.weight"].used


def test_without_backward_nothing_is_called_dead() -> None:
    model = Dead()
    with torch.no_grad(), watch(model) as recording:
        model(torch.randn(3, 4))
    assert said(recording) == [": no gradients were seen: gradients were off (no_grad)"]
    with watch(model) as recording:
        model(torch.randn(3, 4))
    assert said(recording) == [": no gradients were seen"]
    with watch(model) as recording:
        pass
    assert said(recording) == [": no forward pass ran"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_fresh_sound_models_give_no_alarm(name: str, training: bool) -> None:
    """The seed's debugger had 247 of them: each bias that begins at 0."""
    make, shape = MODELS[name]
    model = make().train(training)
    for path, parameter in model.named_parameters():
        if "bias" in path:
            nn.init.zeros_(parameter)
    with watch(model) as recording:
        train_step(model, torch.randn(shape))
    assert said(recording) == []
    assert any(one.zeros_only for one in recording.parameters.values())


def test_fresh_low_rank_adapters_are_a_note_that_says_why() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = Adapted()
    with watch(model) as recording:
        train_step(model, torch.randn(3, 4))
    (only,) = recording.report()
    assert (only.severity, only.module) == ("note", "down")
    assert "all zeros" in only.do


def test_collapsed_predictions() -> None:
    class Collapsed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(x), self.head(x * 1e-6)

    model = Collapsed()
    with torch.no_grad(), watch(model) as recording:
        model(torch.randn(8, 4))
    (found,) = said(recording, "warning")
    assert "predictions collapsed: output[1] [3] differs between 8 examples" in found
    with torch.no_grad(), watch(model) as one_by_one:
        for _ in range(8):
            model(torch.randn(1, 4))
    assert len(said(one_by_one, "warning")) == 1
    spread = one_by_one.outputs["output[0] [3]"]
    assert (spread.examples, spread.share > 0.1) == (8, True)
    with torch.no_grad(), watch(model) as alike:
        model(torch.ones(8, 4))  # one input eight times: one answer is right
    assert said(alike, "warning") == []


def test_vanishing_gradients_and_silent_modules() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.off = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = 1e-9 * self.parts[0](x)
            for part in self.parts[1:]:
                y = y + part(x)
            return y + self.off(x)

    model = Faint()
    nn.init.constant_(model.off[0].bias, -100.0)
    with watch(model) as recording:
        train_step(model, torch.randn(3, 4))
    found = said(recording)
    assert any(one.startswith("parts.0.weight: vanishing gradient") for one in found)
    assert any(one.startswith("off.1: its output ReLU is 0 everywhere") for one in found)
    assert any(one.startswith("off: gradient exactly 0") for one in found)


def test_one_output_of_zeros_beside_others_is_no_silence() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), torch.zeros(1, 4)

    model = nn.ModuleDict({"pair": Pair()})
    with watch(model) as recording:
        model["pair"](torch.randn(3, 4))[0].sum().backward()
    assert said(recording) == []


def test_a_sharp_softmax_elsewhere_is_no_entropy_collapse() -> None:
    model = nn.Linear(4, 4)
    with watch(model) as recording:
        F.cross_entropy(model(torch.randn(3, 4)) * 100, torch.tensor([0, 1, 2])).backward()
    assert said(recording) == []


def test_the_report_reads_as_plain_text() -> None:
    with watch(Mixed()) as recording:
        pass
    assert str(recording.report()) == (
        "note     (model): no forward pass ran\n         → call the model inside the block, on the block's own thread"
    )
    assert recording.report().worst == "note"
