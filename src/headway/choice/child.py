"""Runs a module of Headway's in a child process, which may hang or crash, and says what went wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

LONGEST = 300
"""Characters of a reason that are kept."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a child process showed."""

    broken: str | None
    """None if it ended well, else why not."""
    lasting: bool = True
    """False if another try may well end otherwise, as when a machine was busy."""


def run(module: str, *arguments: str, seconds: float) -> Outcome:
    """`python -m module arguments`, with this process's own import path."""
    command = [sys.executable, "-m", module, *arguments]
    own_group = os.name == "posix"
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(),
        start_new_session=own_group,
    ) as child:
        try:
            _, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # With all its own children: a compiler left behind would hold the pipe open, and this process with it.
            _kill(child, own_group)
            child.communicate()
            return Outcome(f"no answer within {seconds:g} s", lasting=False)
    return _outcome(child.returncode, errors)


def _environment() -> dict[str, str]:
    path = dict.fromkeys(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _kill(child: subprocess.Popen[str], own_group: bool) -> None:
    if own_group:
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()


def _outcome(code: int, errors: str) -> Outcome:
    if code == 0:
        return Outcome(None)
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return Outcome(f"crashed with {name}", lasting=name != "SIGKILL")  # SIGKILL is the system's, short of memory
    lines = errors.strip().splitlines() or [f"exit code {code}"]
    return Outcome(lines[-1].strip()[:LONGEST], lasting="out of memory" not in errors.lower())
