"""What takes long, told on stderr while it is done: one line that changes on a terminal, a line each elsewhere."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.markup import escape


class _Tells(logging.Handler):
    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.getMessage())


@contextlib.contextmanager
def told(begin: str, *, lines: bool = False) -> Iterator[None]:
    """What the library logs inside. Where stderr is no terminal, only with `lines`."""
    console, log = Console(stderr=True), logging.getLogger("headway")
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            status = stack.enter_context(console.status(escape(begin)))
            tells = _Tells(lambda said: status.update(escape(said)))
        elif lines:
            typer.echo(begin, err=True)
            tells = _Tells(lambda said: typer.echo(said, err=True))
        else:
            yield
            return
        level = log.level
        log.addHandler(tells)
        log.setLevel(logging.INFO)
        stack.callback(log.setLevel, level)
        stack.callback(log.removeHandler, tells)
        yield
