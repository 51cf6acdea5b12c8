"""headway support: what each backend takes, as Markdown printed from the declarations the choice itself goes by.

docs/support.md is this command's output; a test keeps it so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import typer

from headway.backends.registry import BACKENDS, Backend
from headway.choice.quarantine import NOT_OURS, QUARANTINE, Quarantined
from headway.limits.machine import dotted

HEAD = """\
# What each backend takes

Printed by `headway support` from the declarations in `headway.backends.registry`, in the order in which `auto` prefers
backends where nothing was measured. A call outside a limit is refused with what it got, what the backend takes, and a
remedy. `headway doctor` shows which of them run on your machine, `headway explain` which one takes a call.
"""


def command() -> None:
    """Print what each backend takes, as Markdown."""
    typer.echo(page(), nl=False)


def page() -> str:
    """The whole page."""
    parts = [HEAD, _overview(), *(_section(backend) for backend in BACKENDS), _quarantine(), _not_ours()]
    return "\n".join(parts)


def _overview() -> str:
    rows = [
        (
            f"[{title(backend)}](#{_anchor(backend)})",
            *(_first(backend, topic) for topic in ("devices", "dtypes", "head_dim")),
        )
        for backend in BACKENDS
    ]
    return _table(("backend", "devices", "dtypes", "head_dim"), rows)


def _first(backend: Backend, topic: str) -> str:
    words = [limit.takes for limit in backend.all_limits if limit.topic == topic]
    return words[0] if words else "any"


def _section(backend: Backend) -> str:
    exact = "" if backend.exact else " Never chosen by `auto`."
    rows = [(limit.topic, limit.takes) for limit in backend.all_limits]
    return f"## {title(backend)}\n\n{backend.summary}.{exact}\n\n" + _table(("topic", "takes"), rows)


def title(backend: Backend) -> str:
    """The name; with its device where one name stands for two kernels."""
    twins = [other for other in BACKENDS if other.name == backend.name]
    return backend.name if len(twins) == 1 else f"{backend.name} on {_first(backend, 'devices')}"


def _anchor(backend: Backend) -> str:
    return title(backend).replace(" ", "-")


def _quarantine() -> str:
    intro = (
        "## Quarantine\n\nKernels known to be wrong in some calls. Those calls are refused on the machines named, until"
        " `headway doctor --acquit` has looked for the defect on yours and not found it.\n\n"
    )
    rows = [
        (entry.name, ", ".join(entry.backends), _where(entry), f"{entry.defect} ([thread]({entry.thread}))")
        for entry in QUARANTINE
    ]
    return intro + _table(("name", "backends", "on", "defect"), rows)


def _where(entry: Quarantined) -> str:
    words = [entry.device]
    if entry.capability is not None:
        low, high = entry.capability
        words = [f"{entry.device} {dotted(low)}" + (f" to before {dotted(high)}" if high else " or newer")]
    return ", ".join((*words, *(str(versions) for versions in entry.versions)))


def _not_ours() -> str:
    intro = "## Looked into\n\nThreads about wrong kernels that no call of Headway's can meet.\n\n"
    return intro + _table(("thread", "why not"), [(thread, why) for thread, why in NOT_OURS])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"{line}\n" for line in _lines(head, rows))


def _lines(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
