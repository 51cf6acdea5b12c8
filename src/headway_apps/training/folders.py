"""A folder or a file that appears under its name once it is whole and on the disk, or not at all."""

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


def replace(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file to write, which takes its name all at once: nobody sees half of it, and a process that fails or is
    killed meanwhile leaves the old one."""
    partial = hidden(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(parent: Path) -> list[Path]:
    """What killed processes left of what was appearing or vanishing here."""
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
