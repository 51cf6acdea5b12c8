"""headway doctor: what runs, what was left on, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from typer.testing import CliRunner

from headway.choice import child
from headway.cli import app
from headway.cli.doctor import settings

RUN = CliRunner()


def test_each_backend_is_run_or_refused_and_what_the_environment_asks_for_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "sage")
    done = RUN.invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1, done.output
    cpu = next(device for device in json.loads(done.stdout)["devices"] if device["device"] == "cpu")
    states = {backend["name"]: backend for backend in cpu["backends"]}
    assert {name for name, one in states.items() if one["state"] == "runs"} >= {"reference", "sdpa-math", "sdpa-flash"}
    assert states["sdpa-cudnn"]["state"] == "refused"
    assert states["sdpa-cudnn"]["why"]
    assert states["sdpa-cudnn"]["remedy"]


def test_a_name_that_does_not_run_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "run", lambda *_, **__: child.Outcome(None))  # which is seconds; the test above runs all
    assert RUN.invoke(app, ["doctor", "--backend", "reference"]).exit_code == 0
    done = RUN.invoke(app, ["doctor", "--backend", "sage"])
    assert done.exit_code == 1
    assert "sage was asked for by name and does not run here" in " ".join(done.stdout.split())


def test_the_environment_asks_for_no_such_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "fastest")
    done = RUN.invoke(app, ["doctor", "--json"])
    assert done.exit_code == 2
    assert "fastest" in done.output


def test_an_unknown_name_is_a_usage_error() -> None:
    assert RUN.invoke(app, ["doctor", "--backend", "flsh"]).exit_code == 2


def test_what_a_module_prints_is_not_the_report(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "import torch\nprint('noise')\ntorch.backends.cuda.enable_flash_sdp(False)\n"
        "import torch.nn.functional as F\nreal = F.scaled_dot_product_attention\n"
        "F.scaled_dot_product_attention = lambda *a, **k: real(*a, **k)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "headway", "doctor", "--json", "--after", "noisy", "--backend", "reference"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    changed = [one for one in json.loads(done.stdout)["settings"] if not one["is_usual"]]
    assert any("flash" in one["name"] for one in changed)
    assert any("scaled_dot_product_attention" in one["name"] for one in changed)
    assert "noise" in done.stderr


def test_a_patched_function_is_seen_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {one.name: one.is_usual for one in settings()}
    assert usual["F.scaled_dot_product_attention"]
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: None)
    assert not {one.name: one.is_usual for one in settings()}["F.scaled_dot_product_attention"]
