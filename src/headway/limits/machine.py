"""Machine: what is really here, as seen from one device."""

from __future__ import annotations

import dataclasses
import re
from typing import TypeAlias

Release: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

_VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:[.-]?(?:dev|a|b|rc)(\d*))?")


def release(version: str) -> Release:
    """A version that compares as versions do: a pre-release comes before its release.

    >>> release("4.0.0b9") < release("4.0.0b36") < release("4.0.0") < release("4.0.0.post1")
    True
    >>> release("2.9") < release("2.13.0+cu130") == release("2.13")
    True
    """
    found = _VERSION.match(version)
    if found is None:
        return (), ()
    numbers = tuple(int(part) for part in found[1].split("."))
    post = re.search(r"post(\d+)", version)
    stage = (0, int(found[2] or 0)) if found[2] is not None else (1, int(post[1]) if post else 0)
    return (*numbers, 0, 0, 0, 0)[:4], stage


@dataclasses.dataclass(frozen=True)
class Package:
    """A kernel package's state: absent (no version), or present and either running or broken for a reason."""

    version: str | None = None
    broken: str | None = None
    tried: bool = True
    """False where nobody has run it, as on a device it was not made for: then it is not said to run."""

    @property
    def runs(self) -> bool:
        return self.version is not None and self.tried and self.broken is None


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device and the software around it. Machines nobody owns can be described too:

    >>> print(Machine(device="cuda", name="V100", capability=(7, 0)))
    V100, cuda 7.0
    """

    device: str = "cpu"
    """cpu, cuda, rocm, mps or another torch device type; AMD's GPUs are 'rocm', though torch says cuda."""
    name: str = "CPU"
    capability: tuple[int, int] | None = None
    features: frozenset[str] = frozenset()
    """What this torch can do, probed: aten operators by name, 'flex', 'varlen', 'triton', 'c++'."""
    packages: tuple[tuple[str, Package], ...] = ()
    acquitted: frozenset[str] = frozenset()
    """Quarantined defects that a probe has shown to be absent here."""
    versions: tuple[tuple[str, str], ...] = ()
    """torch, cuda, cudnn, driver, for records."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms is on."""

    def __str__(self) -> str:
        return self.name if self.name.lower() == self.device else f"{self.name}, {self.kind}"

    @property
    def kind(self) -> str:
        """The device's kind, with its generation where that has a number.

        >>> Machine(device="cuda", capability=(9, 0)).kind
        'cuda 9.0'
        """
        return self.device if self.capability is None else f"{self.device} {dotted(self.capability)}"

    def package(self, distribution: str) -> Package:
        return dict(self.packages).get(distribution, Package())

    def version(self, of: str) -> str | None:
        """The version of torch, cuda, cudnn or a kernel package, None if unknown or not here."""
        return dict(self.versions).get(of) or self.package(of).version


def dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
