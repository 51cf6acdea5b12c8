"""Finds out what this machine really is: devices, versions, and which kernel packages run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypedDict, cast

import platformdirs
import torch

from headway.backends.registry import BACKENDS
from headway.limits.machine import Machine, Package

ATEN = (
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)

TRIAL_SECONDS = 300


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
    packages = tuple((name, tried(name, version, machine)) for name, version in installed().items())
    return dataclasses.replace(machine, packages=packages, acquitted=frozenset(_memory(machine)["acquitted"]))


def bare(kind: str, index: int | None = None) -> Machine:
    """The device and this torch, without any kernel package."""
    versions = {"torch": str(torch.__version__)}
    name, device, capability = kind.upper(), kind, None
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index or 0)
        name = properties.name
        if torch.version.hip is not None:
            device = "rocm"
        else:
            capability = (properties.major, properties.minor)
            versions["cuda"] = torch.version.cuda or ""
            cudnn = torch.backends.cudnn.version() or 0
            versions["cudnn"] = f"{cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}"
    return Machine(device, name, capability, features(kind), versions=tuple(versions.items()))


def installed() -> dict[str, str]:
    """Kernel distributions that are installed, whether or not they run, with their versions.

    By distribution and not by import name: two of them share the import name flash_attn.
    """
    found = {}
    for name in dict.fromkeys(backend.package for backend in BACKENDS if backend.package):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def features(kind: str) -> frozenset[str]:
    """What this torch can do on that kind of device, asked of torch itself and not of its version text."""
    found = {name for name in ATEN if hasattr(torch.ops.aten, name)}
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is not None:
        found.add("flex")
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in (varlen_attn.__annotations__ or {}):
            found.add("varlen")
    if importlib.util.find_spec("triton") is not None:
        found.add("triton")
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        found.add("c++")
    if kind == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        found.discard("_scaled_dot_product_flash_attention")
    return frozenset(found)


def tried(distribution: str, version: str, machine: Machine) -> Package:
    """Whether a package runs here: remembered on disk, as trying takes seconds and its answer lasts."""
    if machine.device not in ("cuda", "rocm"):
        return Package(version)  # its backends refuse this device, so there is nothing to try
    memory = _memory(machine)
    key = f"{distribution} {version}"
    if key not in memory["broken"]:
        memory["broken"][key] = _try_in_child(distribution)
        _remember(machine, memory)
    return Package(version, broken=memory["broken"][key])


def _try_in_child(distribution: str) -> str | None:
    """None if the package's backend computes attention, else what went wrong. A child, as it may crash."""
    (name,) = (backend.name for backend in BACKENDS if backend.package == distribution)
    command = [sys.executable, "-m", "headway.backends.trial", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {TRIAL_SECONDS} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def acquit(machine: Machine, names: frozenset[str]) -> None:
    """Remember that these quarantined defects were looked for and not found here."""
    memory = _memory(machine)
    memory["acquitted"] = sorted({*memory["acquitted"], *names})
    _remember(machine, memory)
    _here.cache_clear()


class Memory(TypedDict):
    """What trials on this machine, with these versions, have shown."""

    broken: dict[str, str | None]
    """By package and version: None if it runs, else why not."""
    acquitted: list[str]


def _memory_file(machine: Machine) -> Path:
    words = [machine.name, *(version for _, version in machine.versions)]
    slug = "".join(c if c.isalnum() or c in ".+-" else "-" for c in "_".join(words))
    return platformdirs.user_cache_path("headway") / f"{slug}.json"


def _memory(machine: Machine) -> Memory:
    file = _memory_file(machine)
    if not file.exists():
        return Memory(broken={}, acquitted=[])
    return cast(Memory, json.loads(file.read_text()))


def _remember(machine: Machine, memory: Memory) -> None:
    file = _memory_file(machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(memory, indent=1))
    scratch.replace(file)  # whole or not at all, for processes beside this one
