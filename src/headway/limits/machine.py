"""Machine: what is really here, as seen from one device."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Package:
    """A kernel package's state: absent (no version), or present and either running or broken for a reason."""

    version: str | None = None
    broken: str | None = None

    @property
    def runs(self) -> bool:
        return self.version is not None and self.broken is None


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
        capability = "" if self.capability is None else f" {self.capability[0]}.{self.capability[1]}"
        return f"{self.name}, {self.device}{capability}"

    def package(self, distribution: str) -> Package:
        return dict(self.packages).get(distribution, Package())

    def version(self, of: str) -> tuple[int, ...]:
        """A version as numbers, empty if that software is not here."""
        text = dict(self.versions).get(of, "").split("+")[0]
        return tuple(int(part) for part in text.split(".") if part.isdigit())
