"""The dtype that shims compute attention in."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

plain = importlib.import_module("headway.shims.plain")


@pytest.mark.parametrize("capability, emulated", [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus_without_bfloat16_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], emulated: bool
) -> None:
    monkeypatch.setattr(plain, "_TOLD", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    if emulated:
        with pytest.warns(RuntimeWarning, match="Tesla V100 has no bfloat16 arithmetic.* in float16"):
            assert plain.emulates_bfloat16(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain.emulates_bfloat16(0) is emulated
