"""Probes acquit a kernel that is right and find one that is not; the kernels that have the defects need their GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.backends import reference
from headway.choice import probes
from headway.choice.probes import PROBES, Call, wrong
from headway.choice.quarantine import QUARANTINE


class Kernel:
    """The reference, but for what a test breaks in it."""

    def __init__(self, forward: float = 0.0, backward: float = 0.0, nan_at: int | None = None) -> None:
        self.forward, self.backward, self.nan_at = forward, backward, nan_at

    def lower(self, *given: Any) -> Any:
        return reference.lower(*given)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, extras: Any) -> Any:
        if q.requires_grad and (self.backward or k.shape[2] == self.nan_at):
            by = float("nan") if k.shape[2] == self.nan_at else self.backward
            q = q.clone()
            q.register_hook(lambda grad: grad + by)
        out, lse = reference.attend(q, k, v, mask, extras)
        return out + self.forward, lse


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Stands in for every backend."""
    made = Kernel()
    monkeypatch.setattr(probes, "load", lambda backend, device: made)
    return made


def test_every_defect_has_a_probe() -> None:
    assert set(PROBES) == {entry.name for entry in QUARANTINE}


QUICK = ["cudnn-backward-half-tile", "cudnn-backward-one-query"]
LARGE = {
    "efficient-long-mask": lambda: probes.efficient_long_mask("cpu", length=300),
    "flash-long-gradient": lambda: probes.flash_long_gradient("cpu", batch=2, q_len=96),
    "mps-large-scores": lambda: probes.mps_large_scores("cpu", batch=3),
}
"""Those that need a large GPU, at sizes that run in a moment."""


@pytest.mark.parametrize("look", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("forward", [0.0, 0.1])
def test_large_ones_judge_a_part(look: Callable[[], str | None], forward: float, kernel: Kernel) -> None:
    kernel.forward = forward
    assert (look() is None) == (forward == 0.0)


def test_finds_a_nan_in_a_gradient(kernel: Kernel) -> None:
    kernel.nan_at = 192
    found = PROBES["cudnn-backward-half-tile"]("cpu")
    assert found is not None
    assert found.startswith("sdpa-cudnn errs by nan in the dq of Call(heads=2, kv_heads=None, q_len=192, kv_len=192")


@pytest.mark.parametrize(
    ("share", "rows", "found"),
    [(float, 1, None), (lambda p: round(16 * p) / 16, 1, "drops a share of 0."), (float, 4, "rows in ")],
    ids=["right", "rounded to sixteenths", "four rows alike"],
)
def test_finds_what_is_wrong_with_dropout(share: Callable[[float], float], rows: int, found: str | None) -> None:
    class Drops(Kernel):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, extras: Any) -> Any:
            extras = dataclasses.replace(extras, dropout=share(extras.dropout))
            out, lse = super().attend(q[:, :, ::rows], k, v, mask, extras)
            return out.repeat_interleave(rows, dim=2), lse

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(probes, "load", lambda backend, device: Drops())
        answer = probes.cudnn_dropout("cpu", [0.1, 0.3])
    assert (answer is None) if found is None else answer is not None and found in answer, answer


@pytest.mark.parametrize("broken, what", [({"forward": 0.05}, "result"), ({"backward": 0.05}, "dq")])
def test_finds_what_is_off(broken: dict[str, float], what: str, kernel: Kernel) -> None:
    vars(kernel).update(broken)
    calls = [Call(heads=4, kv_heads=2, q_len=9, kv_len=12, mask=mask) for mask in ("none", "causal", "dense")]
    found = wrong("flash4", "cpu", calls)
    assert found is not None
    assert f"in the {what} of" in found


@pytest.mark.parametrize("backward", [0.0, 0.5])
def test_finds_what_is_off_where_documents_have_no_keys(backward: float, kernel: Kernel) -> None:
    kernel.backward = backward
    found = PROBES["flash4-documents-without-keys"]("cpu")
    assert found is None if backward == 0.0 else found is not None and "in the dq of Documents(" in found


def test_judges_the_kernel_of_the_backend_itself() -> None:
    calls = [
        Call(heads=4, kv_heads=2, q_len=64, kv_len=64, mask=mask, logits=logits)
        for mask in ("causal", "documents")
        for logits in (0.0, -120.0)
    ]
    assert wrong("sdpa-flash", "cpu", calls) is None


def test_logits_lie_where_they_are_put() -> None:
    q, k, _, _ = Call(logits=-120.0).tensors("cpu")
    scores = (q.double() @ k.double().transpose(-1, -2)) * 64**-0.5
    assert torch.all((scores < -100) & (scores > -140))
