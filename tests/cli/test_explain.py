"""headway explain: the decision for a call that is described and not made."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import headway
from headway import Causal, Documents, Full, Mask, Padding, Prefix, Window
from headway.cli import app
from headway.cli.masks import ALIGNED, SAMPLES

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
        (("--mask", "causal and padding"), "takes kinds joined by &, | and ~, such as 'causal & padding'"),
        (("--mask", "causal &"), "takes kinds joined by &, | and ~, such as"),
        (("--mask", "and"), "takes kinds joined by &, | and ~, such as"),
        (("--mask", "causal # & documents"), "takes kinds joined by &, | and ~, such as"),
        (("--mask", "~" * 5000 + "causal"), "takes kinds joined by &, | and ~, such as"),
        (("--mask", " & ".join(["causal"] * 3000)), "takes kinds joined by &, | and ~, such as"),
        (("--mask", "causal.align"), "takes kinds joined by &, | and ~, such as"),
        (("--q-len", "5", "--kv-len", "2", "--mask", "tree-lower-right"), "got 5 queries for a tree of 2 tokens"),
        (("--mask", "causal + prefix"), "takes kinds joined by &, | and ~, such as"),
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


@pytest.mark.parametrize("batch", ["0", "2"])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_of_mask_can_be_said(name: str, batch: str) -> None:
    code, text = explain("--q-len", "6", "--kv-len", "8", "--batch", batch, "--mask", name)
    if name in ALIGNED:
        assert code == 2
    else:
        assert code == 0, text


@pytest.mark.parametrize(
    ("words", "mask"),
    [
        ("causal | prefix", Causal() | Prefix(1)),
        ("~causal", ~Causal()),
        ("causal & ~(documents | padding)", Causal() & ~(Documents([8, 8]) | Padding([8]))),
        ("causal & window & documents", Causal() & Window(0, 0) & Documents([8, 8])),
        ("documents-cross", Documents([8, 8], [11, 5])),
        ("documents & ~full", Documents([8, 8]) & ~Full()),
    ],
)
def test_words_are_the_call_that_they_describe(words: str, mask: Mask) -> None:
    q = torch.empty(1, 8, 16, 64)
    assert explain("--q-len", "16", "--mask", words)[1].strip() == str(headway.explain(q, q, q, mask)).strip()


def test_a_device_that_is_not_here_is_no_unknown_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = RUN.invoke(app, ["explain", "--device", "cuda"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "got the device 'cuda', which is not on this machine; takes cpu" in done.output
