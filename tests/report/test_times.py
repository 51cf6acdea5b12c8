"""Times: what is claimed of them, and that measuring leaves no trace."""

from __future__ import annotations

import time

import pytest
import torch
from report.made import Mixed, example, swapped
from torch import Tensor, nn

from headway.cli.example import why_not
from headway.report import Pass, Report, measure, page
from headway.report.times import twin
from headway.sites.site import site_of
from headway.swap import swap


@pytest.mark.parametrize(
    "before, now, claim",
    [
        ((2.0,) * 9, (1.0,) * 9, "faster: 2.00x"),
        ((1.0,) * 9, (2.0,) * 9, "slower: 0.50x"),
        ((1.0,) * 9, (1.0,) * 9, "no gain: 1.00x"),
        ((1.02,) * 9, (1.0,) * 9, "no gain: 1.02x"),
        # Medians far apart, but three rounds of nine say otherwise.
        ((3.0,) * 6 + (1.0,) * 3, (2.0,) * 9, "unclear: 1.50x, which may be noise"),
        # Too few rounds to tell from chance.
        ((2.0,) * 4, (1.0,) * 4, "unclear: 2.00x, which may be noise"),
    ],
)
def test_claims_what_the_rounds_bear_out(before: tuple[float, ...], now: tuple[float, ...], claim: str) -> None:
    assert Pass("forward", before, now).claim == claim


class Slow(nn.MultiheadAttention):
    """Takes long as it was, and not once it is swapped: our forward stands below its own."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if site_of(self) is None:
            time.sleep(0.01)
        return super().forward(*args, **kwargs)


def test_measures_the_model_before_and_after() -> None:
    model = Slow(8, 2, batch_first=True).eval()
    one = swap(model, (torch.randn(1, 4, 8),) * 3)
    (forward,) = measure(one, (torch.randn(1, 4, 8),) * 3, rounds=5).passes
    assert forward.verdict == "faster"
    assert forward.before >= 10
    assert len(forward.before_ms) == len(forward.now_ms) == 5


def test_measuring_leaves_no_trace() -> None:
    one = swapped()
    model = one.model.train()
    runs = [dict(ticket.runs) for ticket in one.census.tickets]
    state = torch.random.get_rng_state()
    both = measure(one, example(), backward=True, rounds=5)
    assert [one.name for one in both.passes] == ["forward", "forward and backward"]
    assert [dict(ticket.runs) for ticket in one.census.tickets] == runs
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert site_of(model.layer.self_attn) is not None


def test_sides_share_the_parameters_and_nothing_else() -> None:
    model = Mixed()
    model.register_buffer("table", torch.zeros(3))
    copied = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert copied.table is model.table
    assert copied.layer is not model.layer


def test_a_slow_model_gets_no_more_rounds_than_its_time() -> None:
    one = swapped()
    (forward,) = measure(one, example(), rounds=10_000, at_most_seconds=0.05).passes
    assert 5 <= len(forward.now_ms) < 10_000


def test_says_why_there_is_no_backward_pass() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    one = swap(model, (torch.randn(1, 4, 8),) * 3)
    times = measure(one, (torch.randn(1, 4, 8),) * 3, backward=True, rounds=5)
    assert [one.name for one in times.passes] == ["forward"]
    assert "no output of the model has a gradient" in times.notes[0]


def test_a_model_that_did_not_run_before_is_not_timed_and_the_report_says_so() -> None:
    """An encoder whose attention another tool replaced crashes, and runs once swapped: there is nothing to beat."""

    class Replacement(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.qkv, self.out_proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor, key_padding_mask: object = None) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
            return out

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer.self_attn = Replacement()  # type: ignore[assignment]
    model, x = layer.eval(), torch.randn(1, 4, 16)
    assert why_not(model, x) == "", "it would run if it did what it means"
    times = measure(swap(model, x), x)
    assert times.passes == ()
    assert "the model as it was does not run with the example: " in times.notes[0]
    assert "Nothing was timed" in page(Report.of(swap(model, x), title="replaced", times=times))
