"""A folder that appears under its name once it is whole and on the disk, or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, which takes its name after all files in it are on the disk.

    What a killed process had begun stays beside it, under a name that `unfinished` finds.
    """
    partial = hidden(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        for each in (*partial.iterdir(), partial):
            sync(each)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def vanish(folder: Path) -> None:
    """Delete a folder, which is no longer seen under its name before the first file of it goes."""
    going = hidden(folder)
    folder.rename(going)
    shutil.rmtree(going)


def hidden(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.{secrets.token_hex(6)}.partial"


def unfinished(parent: Path) -> list[Path]:
    """What killed processes left of folders that were appearing or vanishing here."""
    return sorted(parent.glob(".*.partial"))


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file, in constant memory."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 16):
            found.update(block)
    return found.hexdigest()
