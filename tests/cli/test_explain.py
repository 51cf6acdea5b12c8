"""headway explain: the decision for a call that is described and not made."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from headway.cli import app

RUN = CliRunner()


def explain(*arguments: str) -> tuple[int, str]:
    done = RUN.invoke(app, ["explain", *arguments])
    return done.exit_code, done.output


def test_the_chosen_backend_comes_first() -> None:
    code, text = explain("--dtype", "bfloat16", "--mask", "causal & padding", "--backward")
    assert code == 0
    assert text.splitlines()[0].startswith("sdpa-")
    assert "got" in text
    assert "takes" in text


def test_a_refusal_is_exit_code_1() -> None:
    code, text = explain("--backend", "sdpa-flash", "--softcap")
    assert code == 1
    assert "sdpa-flash  got softcap" in text


def test_it_obeys_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "sdpa-math")
    assert explain()[1].startswith("sdpa-math: asked for by name")
    monkeypatch.setenv("HEADWAY_BACKEND", "fastest")
    code, text = explain()
    assert code == 2
    assert "HEADWAY_BACKEND" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "int8"), "int8"),
        (("--mask", "casual"), "casual"),
        (("--device", "gpu"), "gpu"),
        (("--require", "fast"), "fast"),
        (("--q-len", "1", "--kv-len", "9", "--mask", "causal"), "causal-lower-right"),
    ],
)
def test_what_it_does_not_know_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    code, text = explain(*arguments)
    assert code == 2
    assert said in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--mask", "causal and padding"), "takes terms joined by &: 'causal & padding'"),
        (("--mask", "cusal"), "did you mean 'causal'?"),
        (("--dtype", "bfloat61"), "did you mean 'bfloat16'?"),
    ],
)
def test_a_slip_is_told_what_was_meant(arguments: tuple[str, ...], says: str) -> None:
    done = RUN.invoke(app, ["explain", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert says in " ".join(done.output.replace("│", " ").split())


def test_dtypes_have_short_names() -> None:
    assert explain("--dtype", "bf16") == explain("--dtype", "bfloat16")
