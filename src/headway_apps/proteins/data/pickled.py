"""Sequences out of a `processed_uniref50.pt`, a pickled list, without running any code that it may hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from headway_apps.proteins.data.fasta import Record
from headway_apps.proteins.errors import DataError

_KEYS = ("protein_seq", "sequence", "text")


def read_pickled(path: Path) -> Iterator[Record]:
    """Each sequence of a list of strings, or of dicts with one of the keys that the first protein SEDD looks for.

    Loads with `weights_only=True` and nothing else: numbers, strings, containers and tensors. Such a file has to be
    held whole, unlike those of `fasta.read` and `Shards`.
    """
    items = _load(path)
    if not isinstance(items, list):
        raise DataError(f"got a {type(items).__name__} in {path}, takes a list of strings or of dicts")
    for at, item in enumerate(items):
        yield Record(f"{path.stem}:{at}", _sequence(item, at, path))


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DataError(
            f"got {path}, which holds more than numbers, strings, lists, dicts and tensors, and is not loaded: what "
            f"such a pickle holds may be code; have its owner write the sequences as FASTA ({reason})"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # of any kind: what the unpickler meets first in a damaged file
        reason = str(error).partition("\n")[0]
        raise DataError(f"got {path}, which is damaged, or no file of torch.save ({reason}); fetch it again") from error


def _sequence(item: object, at: int, path: Path) -> str:
    if isinstance(item, str):
        return item
    found = [item[key] for key in _KEYS if key in item] if isinstance(item, dict) else []
    if found and isinstance(found[0], str):
        return found[0]
    has = f"a dict with {sorted(map(str, item))}" if isinstance(item, dict) else f"a {type(item).__name__}"
    raise DataError(f"got {has} as item {at} of {path}, takes a string, or a dict with one under {', '.join(_KEYS)}")
