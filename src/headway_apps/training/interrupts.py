"""Interrupts: Ctrl-C or SIGTERM lets long work end in order, and another one ends it at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS = 2.0
"""In which several are one: a terminal sends Ctrl-C to all processes, and torchrun passes it on once more."""

Asked = Callable[[], "signal.Signals | None"]
"""Says None while the work is to go on."""


@contextmanager
def heard(told: str) -> Iterator[Asked]:
    """What asks whether the work should end, and by which signal; `told` goes to stderr as one arrives.

    For the main thread, which is the one that Python calls. A signal that is ignored stays so, as of a job in the
    background. On the way out each means what it meant before.
    """
    first: signal.Signals | None = None
    since = 0.0
    own = os.getpid()
    before: dict[signal.Signals, Any] = {}

    def hear(number: int, _: object) -> None:
        nonlocal first, since
        if os.getpid() != own or (first is not None and time.monotonic() - since > SECONDS):
            restore()
            signal.raise_signal(number)
        elif first is None:
            first, since = signal.Signals(number), time.monotonic()
            with suppress(OSError):  # who reads stderr may have ended by the same signal; print may be in use below us
                os.write(2, f"{first.name}: {told}; after {SECONDS:g} s another ends it at once\n".encode())

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for each in SIGNALS:
            if signal.getsignal(each) not in (signal.SIG_IGN, None):
                before[each] = signal.signal(each, hear)
        yield lambda: first
    finally:
        restore()
