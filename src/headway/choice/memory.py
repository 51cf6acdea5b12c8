"""What trials on this machine, with these versions, have shown: a small file for each fact, kept between processes.

One fact a file, written whole and then renamed, needs no lock: processes that run at once overwrite nothing of each
other's. What cannot be read counts as unknown and is tried again.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import platformdirs

from headway.limits.machine import Machine

KNOWN = "broken"


def folder(machine: Machine) -> Path:
    """Where facts about this machine lie; another driver, torch or GPU is another machine."""
    return platformdirs.user_cache_path("headway") / _slug(machine.name, *(version for _, version in machine.versions))


def recall(machine: Machine, fact: str) -> tuple[bool, str | None]:
    """Whether the fact is known, and what spoke against it (None: nothing did)."""
    try:
        held = json.loads(_file(machine, fact).read_text())
    except (OSError, ValueError):
        return False, None
    if not isinstance(held, dict) or not isinstance(held.get(KNOWN, 0), str | None):
        return False, None
    return True, held[KNOWN]


def remember(machine: Machine, fact: str, broken: str | None) -> bool:
    """Keep a fact; False where nothing can be kept, which costs another try in the next process."""
    file = _file(machine, fact)
    scratch = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({KNOWN: broken}))
        scratch.replace(file)  # whole or not at all, for processes beside this one
    except OSError:
        return False
    return True


def _file(machine: Machine, fact: str) -> Path:
    return folder(machine) / f"{_slug(fact)}.json"


def _slug(*words: str) -> str:
    return "".join(c if c.isalnum() or c in ".+-" else "-" for c in "_".join(words))
