"""The error tree: what can be caught as what, and how errors read and travel."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import headway
from headway import errors

BUILTIN = {
    errors.HeadwayError: Exception,
    errors.RequestError: ValueError,
    errors.MaskError: ValueError,
    errors.UnknownNameError: ValueError,
    errors.NoBackendError: RuntimeError,
    errors.RecompileBudgetError: RuntimeError,
    errors.SwapError: RuntimeError,
    errors.CertificateError: ValueError,
}


def test_one_tree() -> None:
    declared = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}
    assert declared == set(BUILTIN)
    for kind, builtin in BUILTIN.items():
        assert issubclass(kind, errors.HeadwayError)
        assert issubclass(kind, builtin)  # so that code which knows nothing of Headway catches it as it would torch's


def test_all_are_public() -> None:
    assert {kind.__name__ for kind in BUILTIN} <= set(headway.__all__)


@pytest.mark.parametrize(
    "error, said",
    [
        (
            errors.UnknownNameError("backend", "flsh", ("auto", "flash2")),
            "unknown backend 'flsh'; known: auto, flash2; did you mean 'flash2'?",
        ),
        (
            errors.UnknownNameError("contract", "fast", ("maps",), where="the environment variable X"),
            "unknown contract 'fast' (from the environment variable X); known: maps",
        ),
    ],
)
def test_an_unknown_name_is_told_the_known_ones(error: errors.UnknownNameError, said: str) -> None:
    assert str(error) == said
    assert error.name in ("flsh", "fast")


@pytest.mark.parametrize("kind", BUILTIN)
def test_errors_come_back_from_a_worker_process(kind: type[errors.HeadwayError]) -> None:
    error = kind("backend", "flsh", ("auto",)) if kind is errors.UnknownNameError else kind("got a, takes b; do c")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)


def test_an_unknown_environment_is_an_error_and_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "flsh")
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(
        errors.UnknownNameError, match=r"'flsh' \(from the environment variable HEADWAY_BACKEND\); known:"
    ):
        headway.attention(q, q, q)


def test_the_environment_names_the_backend_of_calls_that_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "flash4")
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(errors.NoBackendError, match="flash4 was asked for by name and does not take it"):
        headway.attention(q, q, q)
    assert headway.attention(q, q, q, backend="reference").shape == q.shape
