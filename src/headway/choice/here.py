"""Finds out what this machine really is: devices, versions, and which kernel packages run."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.abc
import importlib.util
import logging
import platform
import shutil
from typing import cast

import torch

from headway import packages
from headway.backends.registry import BACKENDS
from headway.choice import child
from headway.choice.memory import recall, remember
from headway.choice.quarantine import QUARANTINE
from headway.limits.machine import Machine, Package

ATEN = (
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)

LOG = logging.getLogger(__name__)
TRIAL_SECONDS = 300.0


def here(device: torch.device) -> Machine:
    """This machine as seen from `device`. Kernel packages found installed are run once, in a child process."""
    index = device.index if device.index is not None or device.type != "cuda" else torch.cuda.current_device()
    machine = _here(device.type, index)
    if torch.are_deterministic_algorithms_enabled():
        return dataclasses.replace(machine, deterministic=True)
    return machine


@functools.cache
def _here(kind: str, index: int | None) -> Machine:
    machine = bare(kind, index)
    device = kind if index is None else f"{kind}:{index}"
    packages = tuple((name, tried(name, version, machine, device)) for name, version in installed().items())
    return dataclasses.replace(machine, packages=packages, acquitted=acquitted(machine))


# -- the device and its software --------------------------------------------------------------------------------------


def bare(kind: str, index: int | None = None) -> Machine:
    """The device and this torch, without any kernel package."""
    versions = {"torch": str(torch.__version__)}
    name, device, capability = kind.upper(), kind, None
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index or 0)
        name = properties.name
        if torch.version.hip is not None:
            device = "rocm"
            versions["rocm"] = torch.version.hip
        else:
            capability = (properties.major, properties.minor)
            versions |= _cuda_versions()
    if kind == "mps":
        versions["macos"] = platform.mac_ver()[0]
    return Machine(device, name, capability, features(kind), versions=tuple(versions.items()))


def _cuda_versions() -> dict[str, str]:
    cudnn = torch.backends.cudnn.version() or 0
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return {
        "cuda": torch.version.cuda or "",
        "cudnn": f"{cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}",
        "driver": f"{driver // 1000}.{driver % 1000 // 10}",
    }


def features(kind: str) -> frozenset[str]:
    """What this torch can do on that kind of device, asked of torch itself and not of its version text."""
    found = {name for name in ATEN if hasattr(torch.ops.aten, name)}
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is not None:
        found.add("flex")
    if "window_size" in _arguments("torch.nn.attention.varlen", "varlen_attn"):
        found.add("varlen")
    if importlib.util.find_spec("triton") is not None:
        found.add("triton")
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        found.add("c++")
    if kind == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        found.discard("_scaled_dot_product_flash_attention")
    return frozenset(found)


def _arguments(module: str, function: str) -> set[str]:
    """What a function of a module takes, read from its source: importing this one takes seconds, for torch.compile."""
    spec = importlib.util.find_spec(module)
    source = None if spec is None else cast(importlib.abc.InspectLoader, spec.loader).get_source(module)
    made = (node for node in ast.parse(source or "").body if isinstance(node, ast.FunctionDef))
    return {each.arg for node in made if node.name == function for each in (*node.args.args, *node.args.kwonlyargs)}


# -- kernel packages --------------------------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Kernel distributions that are installed, whether or not they run, with their versions.

    By distribution and not by import name: two of them share the import name flash_attn.
    """
    found = {}
    for name in dict.fromkeys(backend.package for backend in BACKENDS if backend.package):
        if (version := packages.version(name)) is not None:
            found[name] = version
    return found


def tried(distribution: str, version: str, machine: Machine, device: str) -> Package:
    """Whether a package runs here: remembered on disk, as trying takes seconds and its answer lasts."""
    if machine.device not in ("cuda", "rocm"):
        return Package(version, tried=False)  # its backends refuse this device, so there is nothing to try
    known, broken = recall(machine, f"{distribution} {version}")
    if not known:
        (name,) = (backend.name for backend in BACKENDS if backend.package == distribution)
        broken = trial(name, machine, device)
    return Package(version, broken=broken)


def trial(backend: str, machine: Machine, device: str) -> str | None:
    """Run a backend once in a child process, whatever was known before: None if it computes attention, else why not."""
    LOG.info("trying %s on %s", backend, device)
    outcome = child.run("headway.backends.trial", backend, device, seconds=TRIAL_SECONDS)
    package = next((one.package for one in BACKENDS if one.name == backend and one.package), None)
    version = package and installed().get(package)
    if version and outcome.lasting:
        remember(machine, f"{package} {version}", outcome.broken)
    return outcome.broken


# -- quarantine -------------------------------------------------------------------------------------------------------

PROBE_SECONDS = 600.0


def acquitted(machine: Machine) -> frozenset[str]:
    """Quarantined defects that were looked for on this machine and not found."""
    return frozenset(entry.name for entry in QUARANTINE if recall(machine, f"probe {entry.name}") == (True, None))


def probe(name: str, machine: Machine, device: str) -> str | None:
    """Look for a quarantined defect in a child process: None if it is not here, and calls run again; else why not."""
    LOG.info("looking for %s on %s", name, device)
    outcome = child.run("headway.choice.probes", name, device, seconds=PROBE_SECONDS)
    if outcome.lasting:
        remember(machine, f"probe {name}", outcome.broken)
        _here.cache_clear()
    return outcome.broken
