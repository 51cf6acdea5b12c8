"""headway try: every kind of MODEL, what is written, and the exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from headway.cli import app
from headway.cli.built_in import BUILT_IN
from headway.swap.judge import errors_of
from headway.swap.verify import read

RUN = CliRunner()
ROOT = Path(__file__).parents[2]

MODELS = """
import torch
from torch import nn

class NoAttention(nn.Linear):
    pass

def none():
    return NoAttention(4, 4), torch.randn(2, 4)

def pair():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(1, 6, 16)

def alone():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

def wrong_example():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(1, 6, 7)

def odd():
    class Odd(nn.Module):
        def forward(self, *, name): return name
    return Odd()

def three():
    return 3

def breaks():
    raise ValueError("no such thing")

ready = alone()
"""


def attempt(*arguments: object) -> tuple[int, str]:
    done = RUN.invoke(app, ["try", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.replace("│", " ").split())


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "my_models.py"
    path.write_text(MODELS)
    return path


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_are_proven(name: str) -> None:
    code, text = attempt(name, "--rounds", 0)
    assert code == 0, text
    assert "proven: " in text
    assert "0 failed" not in text


def test_the_captioner_has_a_site_of_each_kind() -> None:
    _, text = attempt("captioner", "--rounds", 0)
    assert "proven: 6 of 7 sites swapped" in text
    for kind in ("nn.MultiheadAttention", "F.scaled_dot_product_attention", "written by hand"):
        assert kind in text


def test_writes_page_json_and_certificate(tmp_path: Path) -> None:
    page, data, certificate = (tmp_path / name for name in ("out.html", "out.json", "c.json"))
    options = ("--report", page, "--json", data, "--certificate", certificate)
    code, text = attempt("decoder", "--backward", "--rounds", 5, *options)
    assert code == 0, text
    assert "forward and backward:" in text
    assert page.read_text("utf-8").startswith("<!doctype html>")
    report = json.loads(data.read_text("utf-8"))
    assert report["title"] == "decoder"
    assert len(report["census"]["sites"]) == 4
    assert [one["name"] for one in report["times"]["passes"]] == ["forward", "forward and backward"]
    assert report["masks"][0]["words"] == "causal"
    assert read(certificate).passed


def test_the_same_seed_is_the_same_run(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.json"
        attempt("vit", "--rounds", 0, "--seed", seed, "--certificate", path)
        found.append([e.rms for e in read(path).proofs[0].errors])
    assert found[0] == found[1] != found[2]


def test_sites_and_backends_can_be_chosen() -> None:
    code, text = attempt("decoder", "--rounds", 0, "--only", "blocks.[01].*", "--backend", "blocks.1.*=sdpa-math")
    assert code == 0
    assert "proven: 2 of 4 sites swapped" in text
    assert "sdpa-math sdpa-math" in text  # asked and chosen
    code, text = attempt("decoder", "--rounds", 0, "--skip", "*")
    assert code == 1
    assert "nothing swapped: every site is left alone" in text


def test_dtype_is_of_model_and_example(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert attempt("vit", "--rounds", 0, "--dtype", "bfloat16", "--certificate", path)[0] == 0
    assert read(path).facts["dtype"] == "bfloat16"


def test_a_failed_proof_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def worse(what: str, truth: torch.Tensor, before: torch.Tensor, now: torch.Tensor, *rest: object) -> object:
        return errors_of(what, truth, before, now + 1, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["headway.swap.proof"], "errors_of", worse)
    code, text = attempt("vit", "--rounds", 0, "--report", tmp_path / "r.html")
    assert code == 1
    assert "4 failed the proof" in text
    assert re.search(r"blocks\.0\.attention: \S.* errs \S+ at worst", text)
    assert "Not proven" in (tmp_path / "r.html").read_text("utf-8")


def test_a_refused_backend_is_exit_code_1() -> None:
    code, text = attempt("decoder", "--rounds", 0, "--backend", "flash4")
    assert code == 1
    assert "decoder is left as it was: NoBackendError" in text
    assert "pip install flash-attn-4" in text


def test_models_from_a_file(models: Path) -> None:
    assert attempt(f"{models}:pair", "--rounds", 0)[0] == 0
    assert attempt(f"{models}:alone", "--rounds", 0)[0] == 0
    assert attempt(f"{models}:ready", "--rounds", 0)[0] == 0
    code, text = attempt(f"{models}:none", "--rounds", 0)
    assert (code, text.endswith("nothing swapped: no attention was found")) == (1, True)


@pytest.mark.parametrize(
    "function, says",
    [
        ("wrong_example", "does not run with its example: "),
        ("odd", "without an example, and cannot guess one"),
        ("three", "made a int; takes an nn.Module"),
        ("breaks", "raised ValueError: no such thing"),
        (
            "missing",
            "a class of one, or a model; the file has: NoAttention, none, pair, alone, wrong",
        ),
    ],
)
def test_a_file_that_does_not_help_is_exit_code_2(models: Path, function: str, says: str) -> None:
    code, text = attempt(f"{models}:{function}")
    assert code == 2
    assert says in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "built-in models:"),
        (("encodr",), "did you mean encoder?"),
        (("nonsense",), "path/to/file.py:function"),
        (("no/such.py:model",), "there is no file no/such.py"),
        (("encoder", "--device", "nowhere"), "got device 'nowhere', which is not here"),
        (("encoder", "--dtype", "int8"), "got dtype 'int8', takes float32"),
        (("encoder", "--backend", "fastest"), "unknown backend 'fastest'"),
        (("encoder", "--only", "head"), "got only='head', which matches no site"),
        (("encoder", "--report", "no/such/folder/r.html"), "there is no folder no/such/folder"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    code, text = attempt(*arguments)
    assert code == 2
    assert says in text


def test_lists_what_there_is() -> None:
    code, text = attempt("--list")
    assert code == 0
    assert all(name in text for name in (*BUILT_IN, "hf:", "timm:", "file.py:function"))


# -- packages that may be missing -------------------------------------------------------------------------------------


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in (("timm", "timm:vit_tiny"), ("transformers", "hf:llama")):
        monkeypatch.setitem(sys.modules, package, None)
        code, text = attempt(name)
        assert code == 2
        assert f"pip install {package}" in text


def test_models_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with the three functions that are called."""

    class Timm:
        @staticmethod
        def list_models() -> list[str]:
            return ["vit_tiny"]

        @staticmethod
        def is_model(name: str) -> bool:
            return name == "vit_tiny"

        @staticmethod
        def create_model(name: str, pretrained: bool) -> torch.nn.Module:
            assert not pretrained
            model = BUILT_IN["vit"][0]()[0]
            model.pretrained_cfg = {"input_size": (3, 64, 64)}  # type: ignore[assignment]
            return model

    monkeypatch.setitem(sys.modules, "timm", Timm)  # type: ignore[arg-type]
    code, text = attempt("timm:vit_tiny", "--rounds", 0)
    assert code == 0, text
    code, text = attempt("timm:vit_tny")
    assert (code, "did you mean vit_tiny?" in text) == (2, True)


# -- for real ---------------------------------------------------------------------------------------------------------

LEAN = """
import sys
for name in ("numpy", "matplotlib", "transformers", "timm", "PIL", "pytest"):
    sys.modules[name] = None
sys.argv[0] = "headway"
from headway.cli import app
app(prog_name="headway")
"""


def test_the_demo_needs_no_other_package_and_is_quick(tmp_path: Path) -> None:
    page = tmp_path / "demo.html"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", LEAN, "demo", "--report", str(page)],
        capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "proven: 6 of 7 sites swapped" in done.stdout
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith("report:"))
    assert "headway demo --report" in page.read_text("utf-8")
