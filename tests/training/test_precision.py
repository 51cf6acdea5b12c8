"""What a device computes in is chosen from what it is, with a reason; what cannot be is refused with what can."""

from __future__ import annotations

import re

import pytest
import torch

from headway import UnknownNameError
from headway_apps.training import precision
from headway_apps.training.errors import DeviceError
from headway_apps.training.precision import choose, chosen, find

V100, TURING, A100, H100 = (7, 0), (7, 5), (8, 0), (9, 0)


@pytest.mark.parametrize(
    "kind, capability, dtype, scaled, why",
    [
        ("cuda", V100, torch.float16, True, "float16 with loss scaling: cuda 7.0 has no bfloat16 but an emulated"),
        ("cuda", TURING, torch.float16, True, "cuda 7.5"),
        ("cuda", A100, torch.bfloat16, False, "bfloat16: cuda 8.0 computes it natively"),
        ("cuda", H100, torch.bfloat16, False, "cuda 9.0"),
        ("cuda", (12, 0), torch.bfloat16, False, "cuda 12.0"),
        ("cuda", None, torch.bfloat16, False, "bfloat16"),  # AMD's
        ("mps", None, torch.float32, False, "float32: on mps nothing narrower"),
        ("cpu", None, torch.float32, False, "float32: on cpu nothing narrower"),
    ],
)
def test_auto_takes_what_the_device_computes_itself_and_says_why(kind, capability, dtype, scaled, why) -> None:
    found = choose(kind, capability)
    assert (found.dtype, found.scaled) == (dtype, scaled)
    assert re.search(why, found.why)


@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind, capability", [("cuda", V100), ("cuda", A100), ("mps", None), ("cpu", None)])
def test_by_name_it_is_that_or_a_refusal(kind, capability, asked) -> None:
    if (capability, asked) == (V100, "bfloat16"):
        with pytest.raises(
            DeviceError, match="got bfloat16 on cuda 7.0, which emulates it, .* ask for float16 or auto"
        ):
            choose(kind, capability, asked)
    elif (kind, asked) == ("cpu", "float16"):
        with pytest.raises(DeviceError, match="got float16 on cpu, takes a GPU .* ask for float32, bfloat16 or auto"):
            choose(kind, capability, asked)
    else:
        found = choose(kind, capability, asked)
        assert (found.dtype, found.scaled) == (getattr(torch, asked), asked == "float16")
        assert "asked for" in found.why


def test_what_a_refusal_names_is_taken() -> None:
    for asked in ("float16", "auto"):
        choose("cuda", V100, asked)
    for asked in ("float32", "bfloat16", "auto"):
        choose("cpu", None, asked)


def test_an_unknown_name_is_refused_with_those_known() -> None:
    with pytest.raises(UnknownNameError, match="unknown precision 'fp16'; known: auto, float32, float16, bfloat16"):
        choose("cpu", None, "fp16")


@pytest.mark.parametrize("says", ["7.0", "8.0"])
def test_a_gpu_is_asked_for_its_own_generation(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"cuda:1": tuple(map(int, says.split(".")))}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    monkeypatch.setattr(torch.version, "hip", None)
    assert chosen(torch.device("cuda:1")) == choose("cuda", capability["cuda:1"])


def test_amds_gpus_are_not_judged_by_nvidias_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert chosen(torch.device("cuda")).dtype is torch.bfloat16


MAC, PC, NODE = ({"cuda": 0, "mps": 1, "cpu": 1}, {"cuda": 0, "mps": 0, "cpu": 1}, {"cuda": 4, "mps": 0, "cpu": 1})


@pytest.mark.parametrize(
    "asked, here, found",
    [
        ("auto", NODE, "cuda"), ("auto", MAC, "mps"), ("auto", PC, "cpu"),
        ("cuda", NODE, "cuda"), ("cuda:3", NODE, "cuda:3"), ("cpu", NODE, "cpu"), ("mps", MAC, "mps"),
    ],
)  # fmt: skip
def test_the_device_is_the_best_that_is_here_or_the_one_asked_for(asked, here, found) -> None:
    assert find(asked, here) == torch.device(found)


@pytest.mark.parametrize(
    "asked, here, says",
    [
        ("cuda", PC, "got device cuda, takes what is here: 1 cpu; ask for one of these, or for auto"),
        ("cuda:4", NODE, "got device cuda:4, takes what is here: 4 cuda, 1 cpu"),
        ("mps", NODE, "got device mps"),
        ("cpu:1", PC, "got device cpu:1"),
        ("gpu:0", NODE, "got device gpu:0, which torch knows as cuda, or on a Mac as mps"),
    ],
)
def test_a_device_that_is_not_here_is_refused(asked, here, says) -> None:
    with pytest.raises(DeviceError, match=says):
        find(asked, here)


@pytest.mark.parametrize("asked", ["xpu", "meta", "", "cuda:x"])
def test_what_is_no_device_is_refused(asked: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown device .*; known: auto, cuda, mps, cpu"):
        find(asked, NODE)


def test_this_machine_has_one(device: str) -> None:
    assert precision.device(device).type == device
    chosen(precision.device())
