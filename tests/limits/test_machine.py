"""Versions that compare, and machines that say what they are."""

from __future__ import annotations

import pytest
from choice.machines import CPU, H100, MI300, MPS, with_packages

from headway.limits.machine import Machine, Package, release

IN_ORDER = [
    "2.9.1",
    "2.13.0.dev20260612",
    "2.13.0a0+git1234",
    "2.13.0",
    "2.13.0.post1",
    "2.13.1rc2",
    "2.13.1",
    "4.0.0b9",
]


def test_versions_compare_as_versions_do() -> None:
    found = [release(version) for version in [*IN_ORDER, "4.0.0b36", "4.0.0"]]
    dev, alpha = found[1], found[2]
    assert sorted(found) == [
        found[0],
        alpha,
        dev,
        *found[3:],
    ]  # both come before the release, which is all that matters


@pytest.mark.parametrize("same", ["2.13", "2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_local_versions_are_the_same_release(same: str) -> None:
    assert release(same) == release("2.13.0")


def test_what_is_no_version_is_older_than_all() -> None:
    assert release("unknown") < release("0.0.1dev")


@pytest.mark.parametrize(
    "machine, said", [(CPU, "CPU"), (MPS, "MPS"), (H100, "H100, cuda 9.0"), (MI300, "MI300, rocm"), (Machine(), "CPU")]
)
def test_says_what_it_is(machine: Machine, said: str) -> None:
    assert str(machine) == said


def test_knows_versions_of_torch_and_of_packages() -> None:
    machine = with_packages(H100, only=("xformers",))
    assert [machine.version(of) for of in ("cudnn", "xformers", "flash-attn")] == ["9.20.0", "0.0.35", None]


@pytest.mark.parametrize(
    "package, runs",
    [
        (Package(), False),
        (Package("2.8.3"), True),
        (Package("2.8.3", broken="it crashed"), False),
        (Package("2.8.3", tried=False), False),
    ],
)
def test_only_what_was_tried_and_is_not_broken_runs(package: Package, runs: bool) -> None:
    assert package.runs is runs
