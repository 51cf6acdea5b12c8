"""examine: what this machine has and which backends really run on it, as data.

>>> report = examine(backends=("sage",), devices=("cpu",))
>>> report.devices[0].backends[0].state, report.failed
('refused', ('sage',))
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from headway import __version__
from headway.attention import ENVIRONMENT
from headway.backends.registry import NAMES, Backend, candidates
from headway.choice import here, memory
from headway.choice.choose import why_not
from headway.choice.quarantine import QUARANTINE, Quarantined
from headway.cli.settings import Setting, settings
from headway.errors import UnknownNameError
from headway.limits.limit import Devices
from headway.limits.machine import Machine, Package
from headway.limits.request import Request

SCHEMA = 1
"""Of the JSON; a field may be added under the same number, but not changed or taken away."""

AT_ONCE = 4
"""Children that run at the same time, at most."""

State = Literal["runs", "broken", "refused"]


@dataclasses.dataclass(frozen=True)
class BackendReport:
    """One backend on one device: it ran, or was tried and did not, or this machine rules it out."""

    name: str
    state: State
    package: str | None = None
    version: str | None = None
    why: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class DefectReport:
    """One quarantined defect that this device is known to have."""

    name: str
    backends: tuple[str, ...]
    thread: str
    defect: str
    acquitted: bool
    probe: str | None = None
    """What looking for it said just now; None where it was not looked for, or not found."""


@dataclasses.dataclass(frozen=True)
class DeviceReport:
    """One device, the software around it, and the backends on it."""

    device: str
    name: str
    capability: tuple[int, int] | None
    versions: dict[str, str]
    features: tuple[str, ...]
    backends: tuple[BackendReport, ...]
    quarantine: tuple[DefectReport, ...]
    memory: str
    """The folder that keeps what trials have shown."""

    def runs(self, name: str) -> bool:
        return any(backend.name == name and backend.state == "runs" for backend in self.backends)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that `headway doctor` finds out."""

    headway: str
    python: str
    platform: str
    devices: tuple[DeviceReport, ...]
    settings: tuple[Setting, ...]
    asked: tuple[str, ...]
    """Backends asked for by name, by the caller or HEADWAY_BACKEND."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Those asked for by name that run on no device here."""
        return tuple(name for name in self.asked if not any(device.runs(name) for device in self.devices))

    def json(self) -> dict[str, Any]:
        changed = [dataclasses.asdict(setting) | {"is_usual": setting.is_usual} for setting in self.settings]
        return {"schema": SCHEMA, **dataclasses.asdict(self), "settings": changed, "failed": list(self.failed)}


def examine(backends: Sequence[str] = (), devices: Sequence[str] = (), acquit: bool = False) -> Report:
    """Look at this machine, and run each backend once in a child process on each device that it is made for.

    `backends` and `devices` limit what is looked at; `acquit` looks for quarantined defects too.
    """
    asked = tuple(dict.fromkeys((*backends, *_asked_by_environment())))
    for name in backends:
        if name not in NAMES:
            raise UnknownNameError("backend", name, NAMES)
    found = tuple(_device(device, asked if backends else NAMES, acquit) for device in devices or all_devices())
    return Report(
        headway=__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        devices=found,
        settings=settings(),
        asked=asked,
    )


def all_devices() -> tuple[str, ...]:
    """Every device torch can use here."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found += ["mps"] if torch.backends.mps.is_available() else []
    found += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return tuple(found)


def _asked_by_environment() -> tuple[str, ...]:
    name = os.environ.get(ENVIRONMENT) or "auto"
    if name != "auto" and name not in NAMES:
        raise UnknownNameError("backend", name, ("auto", *NAMES), where=f"the environment variable {ENVIRONMENT}")
    return () if name == "auto" else (name,)


def _device(device: str, names: Sequence[str], acquit: bool) -> DeviceReport:
    where = torch.device(device)
    versions = here.installed()
    untried = tuple((name, Package(version, tried=False)) for name, version in versions.items())
    machine = dataclasses.replace(here.bare(where.type, where.index), packages=untried)
    wanted = [backend for backend in candidates(machine.device) if backend.name in names]
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        found = tuple(pool.map(lambda backend: _backend(backend, machine, device), wanted))
    running = {backend.name for backend in found if backend.state == "runs"}
    held = [entry for entry in QUARANTINE if entry.on(machine) and running & set(entry.backends)]
    return DeviceReport(
        device=device,
        name=machine.name,
        capability=machine.capability,
        versions=dict(machine.versions),
        features=tuple(sorted(machine.features)),
        backends=found,
        quarantine=tuple(_defect(entry, machine, device, acquit) for entry in held),
        memory=str(memory.folder(machine)),
    )


def _backend(backend: Backend, machine: Machine, device: str) -> BackendReport:
    version = machine.package(backend.package).version if backend.package else None
    request = Request(device=torch.device(device).type)
    stops = [refusal for refusal in why_not(backend, request, machine) if refusal.machine_wide]
    devices = (limit for limit in backend.all_limits if isinstance(limit, Devices))
    # Of a backend made for another device, what else it lacks here is no help to know.
    stops = [refusal for limit in devices for refusal in limit.refusals(request, machine)] or stops
    if stops:
        why = "; ".join(f"got {refusal.got}, takes {refusal.takes}" for refusal in stops)
        remedy = "; ".join(refusal.remedy for refusal in stops)
        return BackendReport(backend.name, "refused", backend.package, version, why, remedy)
    broken = here.trial(backend.name, machine, device)
    if broken is None:
        return BackendReport(backend.name, "runs", backend.package, version)
    remedy = f"reinstall {backend.package} for this torch and CUDA" if backend.package else "report it to Headway"
    return BackendReport(backend.name, "broken", backend.package, version, broken, remedy)


def _defect(entry: Quarantined, machine: Machine, device: str, acquit: bool) -> DefectReport:
    said = here.probe(entry.name, machine, device) if acquit else None
    acquitted = said is None if acquit else entry.name in here.acquitted(machine)
    return DefectReport(entry.name, entry.backends, entry.thread, entry.defect, acquitted, said)
