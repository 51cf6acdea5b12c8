"""Processes that begin as a fresh one does, but for torch, which takes long to import: each is forked from one that has
it, with this process's import path."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

SECONDS = 300
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp"]
"""Nothing of Headway's. Tests of what is imported with torch's compiler need a process of their own."""
Ended = tuple[int, str]
"""Exit status, and all that was told."""


def fresh(code: str, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs code with arguments in a folder."""
    given = (code, [str(each) for each in arguments], folder)
    (ended,) = _run([(_execute, given, dict(os.environ if environment is None else environment))])
    return ended


def together(work: Callable[..., object], *arguments: Any, processes: int = 2) -> list[Ended]:
    """`work(*arguments)` in several, as torchrun starts them: if one fails the others are stopped."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    where |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} if processes > 1 else {}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    return _run([(work, arguments, {**os.environ, **where, **each}) for each in own])


def _run(each: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, str]]]) -> list[Ended]:
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder, str(number)) for number in range(len(each))]
        begun = [_forked().Process(target=_begin, args=(*one, path)) for one, path in zip(each, told, strict=True)]
        for process in begun:
            process.start()
        _wait(begun)
        return [(int(process.exitcode or 0), path.read_text()) for process, path in zip(begun, told, strict=True)]


def _wait(begun: Sequence[BaseProcess]) -> None:
    """Until all have ended, or one has failed."""
    until = time.monotonic() + SECONDS
    while running := [each for each in begun if each.exitcode is None]:
        wait([each.sentinel for each in running], until - time.monotonic())
        late = time.monotonic() > until
        if late or any(each.exitcode for each in begun):
            for each in running:
                each.kill()
                each.join()
        if late:
            raise TimeoutError(f"a process took more than {SECONDS} s")


@functools.cache
def _forked() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _begin(work: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str], told: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with told.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    work(*arguments)


def _execute(code: str, arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
