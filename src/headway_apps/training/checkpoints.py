"""A folder of checkpoints: each is whole or not seen, few are kept, and a damaged one is refused by name.

    FOLDER/step-000000100/model.safetensors, average.safetensors, ..., state.json

state.json says of every file how long it is and what its hash is, and carries a hash of itself. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from headway import RequestError
from headway_apps.training import folders
from headway_apps.training.errors import CheckpointError
from headway_apps.training.tensors import write

STATE = "state.json"
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """One that was opened: its state is whole, and its files are as long as they were written."""

    folder: Path
    step: int
    score: float | None
    """Lower is better."""
    state: dict[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    """Bytes and hash of each."""

    def tensors(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """One of the mappings that were saved, after its hash was compared."""
        if name not in self.files:
            raise CheckpointError(f"got {name!r} of {self.folder}, takes one of {', '.join(self.files)}")
        with _refused(self.folder):
            _compare(self.folder, name, self.files[name])
        return load_file(_file(self.folder, name), str(device))


class Checkpoints:
    """Those of one run. One process writes; where there are several, it is given gathered tensors."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        """The last `keep` are kept, and the best."""
        if keep < 1:
            raise RequestError(f"got keep={keep}, takes 1 or more")
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        score: float | None = None,
    ) -> Path:
        """Write one, then delete those that need not be kept. `state` must be what JSON gives back unchanged."""
        self._must_come_next(step)
        _must_be_exact(files, state, score)
        path = self._path(step)
        with _done("write", path):
            for each in folders.unfinished(self.folder):
                shutil.rmtree(each)
            with folders.appearing(path) as partial:
                written = {name: _write(_file(partial, name), tensors) for name, tensors in files.items()}
                told = {"version": VERSION, "step": step, "score": score, "state": dict(state), "files": written}
                (partial / STATE).write_text(json.dumps(told | {"sha256": _fingerprint(told)}, indent=1) + "\n")
        self._retain()
        return path

    def steps(self) -> list[int]:
        """Those that can be seen, ascending."""
        return sorted(_step(each) for each in self.folder.glob("step-*") if re.fullmatch(r"step-\d{9,}", each.name))

    def at(self, step: int) -> Checkpoint:
        if step not in (steps := self.steps()):
            raise CheckpointError(f"got step {step} of {self.folder}, takes one of {steps or 'none: it has no step'}")
        with _refused(self._path(step)):
            return _open(self._path(step))

    def latest(self) -> Checkpoint | None:
        steps = self.steps()
        return self.at(steps[-1]) if steps else None

    def best(self) -> Checkpoint | None:
        """The one of the lowest score, the first of those that share it; None where none has a score."""
        return _best([self.at(step) for step in self.steps()])

    def rewind(self, step: int) -> None:
        """Delete what came after a step, as the run goes on from there."""
        for later in self.steps():
            if later > step:
                self._delete(later)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _must_come_next(self, step: int) -> None:
        if step < 0:
            raise RequestError(f"got step {step}, takes 0 or more")
        if (steps := self.steps()) and step <= steps[-1]:
            raise CheckpointError(
                f"got step {step} for {self.folder}, which has step {steps[-1]}, takes a later one; `rewind` to a step"
                " that the run went back to, or give another folder"
            )

    def _retain(self) -> None:
        readable = []
        for step in self.steps():
            try:
                readable.append(_open(self._path(step)))
            except _Damage:
                continue  # it stays for its owner to look at, and is refused as soon as anybody opens it
        best = _best(readable)
        for each in readable[: -self.keep]:
            if each is not best:
                self._delete(each.step)

    def _delete(self, step: int) -> None:
        with _done("delete", self._path(step)):
            folders.vanish(self._path(step))


def _best(those: list[Checkpoint]) -> Checkpoint | None:
    scored = [(each.score, each.step, each) for each in those if each.score is not None]
    return min(scored)[2] if scored else None


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _done(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"cannot {what} {path}: {why}; the other checkpoints are untouched, so make room there and resume"
        ) from error


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is tied is written for each of its names, as safetensors has no sharing."""
    apart: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().resolve_neg().contiguous()
        storage = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    write(path, apart)
    return {"bytes": path.stat().st_size, "sha256": folders.sha256(path)}


def _must_be_exact(files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], score: float | None) -> None:
    """Nothing is written that would come back as something else."""
    if score is not None and math.isnan(score):
        raise RequestError("got score nan, takes a number, or None where there is none")
    for key, value in state.items():
        try:
            same = isinstance(key, str) and json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise RequestError(
                f"got {key!r} of {type(value).__name__} in the state, takes what JSON gives back unchanged: dicts"
                " with str keys, lists, str, numbers but nan, bool, None; make tuples lists, and give tensors as a file"
            )
    for name, tensors in files.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RequestError(f"got a file named {name!r}, takes letters, digits, '_', '-' and '.'")
        for key, tensor in tensors.items():
            if why := _unwritable(tensor):
                raise RequestError(
                    f"got {key!r} of {name!r}, {why}, takes real, dense, whole tensors; convert it first"
                )


def _unwritable(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):  # a shard, say, whose rest other processes hold
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return f"which is {'on meta' if tensor.is_meta else f'{tensor.layout} of {tensor.dtype}'}"
    return ""


# -- reading ----------------------------------------------------------------------------------------------------------


class _Damage(Exception):
    """What is wrong with a checkpoint, before it is known what to do about it."""


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Damage becomes a refusal that names the step to go back to."""
    try:
        yield
    except (_Damage, OSError) as error:
        raise CheckpointError(f"got {folder}, which is damaged: {error}; {_remedy(folder)}") from error


def _remedy(folder: Path) -> str:
    there = Checkpoints(folder.parent)
    for earlier in reversed(there.steps()):
        if earlier < _step(folder) and _is_whole(there._path(earlier)):
            return f"step {earlier} before it is whole: delete this one to go on from there, or copy it again"
    return "no step before it is whole: copy it again, or begin anew in another folder"


def _is_whole(folder: Path) -> bool:
    try:
        for name, told in _open(folder).files.items():
            _compare(folder, name, told)
    except (_Damage, OSError):
        return False
    return True


def _open(folder: Path) -> Checkpoint:
    try:
        told = json.loads((folder / STATE).read_text())
        if told.pop("sha256") != _fingerprint(told):
            raise _Damage(f"{STATE} changed since it was written")
        version, step = told.pop("version"), told["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damage(f"{STATE} cannot be read ({error})") from error
    if version != VERSION:
        raise _Damage(f"it is of version {version}, not {VERSION}")
    if folder.name != f"step-{step:09d}":
        raise _Damage(f"it was written as step {step}")
    for name, file in told["files"].items():
        path = _file(folder, name)
        size = path.stat().st_size if path.is_file() else 0
        if size != file["bytes"]:
            raise _Damage(f"{path.name} has {size:,} bytes, not {file['bytes']:,}")
    return Checkpoint(folder, **told)


def _compare(folder: Path, name: str, told: Mapping[str, Any]) -> None:
    if folders.sha256(_file(folder, name)) != told["sha256"]:
        raise _Damage(f"{name}.safetensors changed since it was written")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _fingerprint(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
