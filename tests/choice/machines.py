"""Machines nobody here owns, described as data."""

from __future__ import annotations

import dataclasses

from headway.backends.registry import BACKENDS
from headway.choice.here import ATEN
from headway.limits.machine import Machine, Package

EVERYTHING = frozenset({*ATEN, "flex", "varlen", "triton", "c++"})
CUDA = (("torch", "2.13.0+cu130"), ("cuda", "13.0"), ("cudnn", "9.20.0"), ("driver", "13.0"))
TORCH = (("torch", "2.13.0"),)

# Named so that no shipped table of measured times speaks for them.
V100 = Machine("cuda", "V100", (7, 0), EVERYTHING, versions=CUDA)
T4 = Machine("cuda", "T4", (7, 5), EVERYTHING, versions=CUDA)
A100 = Machine("cuda", "A100", (8, 0), EVERYTHING, versions=CUDA)
A10 = Machine("cuda", "A10", (8, 6), EVERYTHING, versions=CUDA)
H100 = Machine("cuda", "H100", (9, 0), EVERYTHING, versions=CUDA)
H200 = Machine("cuda", "H200", (9, 0), EVERYTHING, versions=CUDA)
B200 = Machine("cuda", "B200", (10, 0), EVERYTHING, versions=CUDA)
RTX5090 = Machine("cuda", "RTX 5090", (12, 0), EVERYTHING, versions=CUDA)
MI300 = Machine("rocm", "MI300", None, EVERYTHING, versions=TORCH)
MPS = Machine("mps", "MPS", None, EVERYTHING, versions=TORCH)
CPU = Machine("cpu", "CPU", None, EVERYTHING, versions=TORCH)

MACHINES = {machine.name: machine for machine in (V100, T4, A100, A10, H100, H200, B200, RTX5090, MI300, MPS, CPU)}

VERSIONS = {
    "flash-attn": "2.8.3",
    "flash-attn-3": "3.0.0",
    "flash-attn-4": "4.0.0b36",
    "xformers": "0.0.35",
    "sageattention": "2.2.0",
}
PACKAGES = tuple(dict.fromkeys(backend.package for backend in BACKENDS if backend.package))


def with_packages(machine: Machine, *, broken: tuple[str, ...] = (), only: tuple[str, ...] = PACKAGES) -> Machine:
    """The machine with kernel packages installed, which run but for those that are broken."""
    packages = tuple(
        (name, Package(VERSIONS[name], broken="ImportError: undefined symbol" if name in broken else None))
        for name in only
    )
    return dataclasses.replace(machine, packages=packages)


def with_version(machine: Machine, **versions: str) -> Machine:
    return dataclasses.replace(machine, versions=tuple({**dict(machine.versions), **versions}.items()))
