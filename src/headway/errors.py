"""Every error Headway raises on purpose, as one tree."""

from __future__ import annotations

import difflib


class HeadwayError(Exception):
    """Root of all errors raised by Headway on purpose."""


class RequestError(HeadwayError, ValueError):
    """The call itself makes no sense: shapes, dtypes or values that no backend could honour."""


class MaskError(HeadwayError, ValueError):
    """A mask does not fit the call, or cannot be turned into what was asked of it."""


class UnknownNameError(HeadwayError, ValueError):
    """A backend or contract was asked for by a name that Headway does not know."""

    def __init__(self, what: str, name: str, known: tuple[str, ...], where: str = "") -> None:
        self.name = name
        self._given = (what, name, known, where)
        source = f" (from {where})" if where else ""
        close = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {what} {name!r}{source}; known: {', '.join(known)}{meant}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, tuple[str, ...], str]]:
        return type(self), self._given  # or it could not come back from a worker process


class NoBackendError(HeadwayError, RuntimeError):
    """No backend takes this request; the message lists every refusal with its remedy."""


class RecompileBudgetError(HeadwayError, RuntimeError):
    """A compiled kernel would be compiled more often than its budget allows."""


class SwapError(HeadwayError, RuntimeError):
    """A model cannot be swapped, or put back, as asked."""


class CertificateError(HeadwayError, ValueError):
    """A file is no certificate, or one that contradicts itself."""
