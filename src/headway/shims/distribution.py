"""The metadata that a shim shows to who asks `importlib.metadata`, where it was asked to."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any


class Distribution(importlib.metadata.Distribution):
    """Name, version and top-level module; it has no files."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self._name, self._module = name, module

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {self._module.__version__}\n"
        return f"{self._module.__name__.rpartition('.')[2]}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return Path(self._module.__path__[0]).parent / path


def is_same(asked: str | None, name: str) -> bool:
    """Whether a distribution is asked for, by its name in any spelling, or by none.

    >>> is_same("Flash_Attn", "flash-attn")
    True
    """
    return asked is None or re.sub(r"[-_.]+", "-", asked).lower() == name
