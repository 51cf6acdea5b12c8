"""A trial passes a kernel that is right and says what is wrong with another."""

from __future__ import annotations

from typing import Any

import pytest

from headway.backends import reference, sdpa_flash, sdpa_math
from headway.backends.trial import in_a_line, trial


@pytest.mark.parametrize("name", ["reference", "sdpa-math", "sdpa-flash"])
def test_passes_what_runs(name: str) -> None:
    assert trial(name, "cpu") is None


def test_says_what_the_kernel_raises() -> None:
    assert in_a_line(trial, "flash2", "cpu") == "ModuleNotFoundError: No module named 'flash_attn'"
    said = in_a_line(trial, "sdpa-cudnn", "cpu")
    assert said is not None
    assert said.startswith("NotImplementedError: Could not run 'aten::_scaled_dot_product_cudnn_attention'")
    assert "\n" not in said


def test_an_answer_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = sdpa_flash.attend
    monkeypatch.setattr(sdpa_flash, "attend", lambda *given: (attend(*given)[0] * 1.2, None))
    said = trial("sdpa-flash", "cpu")
    assert said is not None
    assert said.startswith("its answer is off by ")


PARTS = ["gradient of q", "gradient of k", "gradient of v"]


@pytest.mark.parametrize("which, part", list(enumerate(PARTS)), ids=PARTS)
def test_a_gradient_that_is_off(which: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, k: Any, v: Any, mask: Any, extras: Any) -> Any:
        inputs = [q, k, v]
        inputs[which] = inputs[which].clone()
        inputs[which].register_hook(lambda grad: grad * float("nan"))
        return reference.attend(*inputs, mask, extras)

    monkeypatch.setattr(sdpa_math, "lower", reference.lower)
    monkeypatch.setattr(sdpa_math, "attend", attend)
    assert trial("sdpa-math", "cpu") == f"its {part} is off by nan"
