"""Processes that begin as a fresh one does, but for what takes long to import: each is forked from one that has it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

SECONDS = 120
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp"]
"""Nothing of Headway's, nor anything that tests watch its imports for."""
Ended = tuple[int, str]
"""Exit status, and all that was told."""


def fresh(code: str, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """`python -c code arguments`, in a folder."""
    given = (code, [str(each) for each in arguments], folder)
    (ended,) = _run([(_execute, given, dict(os.environ if environment is None else environment))])
    return ended


def together(work: Callable[..., object], *arguments: Any, processes: int = 2) -> list[Ended]:
    """`work(*arguments)` in several, as torchrun starts them. It is a function of a module, as pickles want."""
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
        for process in begun:
            process.join(SECONDS)
            process.kill()
            process.join()
        return [(int(process.exitcode or 0), path.read_text()) for process, path in zip(begun, told, strict=True)]


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
