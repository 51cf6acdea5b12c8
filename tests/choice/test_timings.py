"""Times: the shipped measurements, for calls of other sizes and by what the host takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from choice import machines

from headway.choice.choose import choose
from headway.choice.timings import Time, measured
from headway.limits.request import Request

H200 = dataclasses.replace(machines.H200, name="NVIDIA H200")
SMALL: dict[str, Any] = {"heads": 2, "kv_heads": 2, "q_len": 64, "kv_len": 64}
"""A device is done with it in a few microseconds."""


def ask(**given: Any) -> Request:
    return Request(**{"dtype": "bfloat16", "device": "cuda", **given})


def first(**wants: Any) -> str:
    return choose(ask(**wants), H200).accepted[0]


@pytest.mark.parametrize("learns", [False, True])
def test_a_call_for_which_the_device_waits_goes_to_what_the_host_asks_for_soonest(learns: bool) -> None:
    assert first(**SMALL, needs_grad=learns) == "sdpa-efficient"
    assert "which the host takes to ask" in choose(ask(**SMALL, needs_grad=learns), H200).why


def test_many_short_sequences_go_to_what_the_device_does_soonest() -> None:
    assert (
        first(**SMALL | {"batch": 256, "head_dim": 128, "value_dim": 128, "heads": 16, "kv_heads": 16}) == "sdpa-cudnn"
    )


def test_a_kernel_that_the_host_launches_slowly_is_for_large_calls() -> None:
    wide = {"heads": 16, "kv_heads": 16, "head_dim": 128, "value_dim": 128}
    sizes: dict[str, Any] = {**wide, "q_len": 512, "kv_len": 512, "mask": frozenset({"causal"}), "needs_grad": True}
    large, small = (measured(ask(**sizes, batch=batch), H200) for batch in (64, 1))
    assert large["flash4"] == min(large.values())
    assert small["flash4"] > sorted(small.values())[2]


def test_a_compiled_program_is_not_chosen_for_by_the_host() -> None:
    assert not any(time.host for time in measured(ask(**SMALL, compiled=True), H200).values())


def test_a_few_tiles_take_as_long_as_a_device_full_of_them() -> None:
    one, some = (measured(ask(batch=n, heads=1, kv_heads=1, compiled=True), H200) for n in (1, 8))
    assert one == some


def test_time_grows_with_the_batch() -> None:
    sizes: dict[str, Any] = {"heads": 16, "kv_heads": 16, "q_len": 2048, "kv_len": 2048}
    one, four = (measured(ask(**sizes, batch=n), H200)["sdpa-cudnn"] for n in (8, 32))
    assert four == Time(pytest.approx(4 * one.ms), False)


def test_a_cache_of_keys_is_compared_with_caches_alone() -> None:
    assert not measured(ask(q_len=1, kv_len=64), H200)
