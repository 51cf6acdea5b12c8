"""Numbers go to a file always and to what was asked for, each step once; nothing is asked of anybody."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway import RequestError, UnknownNameError
from headway_apps.training import trackers
from headway_apps.training.errors import TrackerError
from headway_apps.training.trackers import FILE, Trackers, read

ROOT = Path(__file__).parents[2]


def made(folder: Path, *names: str, after: int = 0) -> Trackers:
    return Trackers(names, folder, "proteins", "first", {"lr": 0.1, "some": [1, math.inf], "none": None}, after=after)


def lines(folder: Path) -> list[dict[str, Any]]:
    """As any JSON reader takes them: without Python's NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(each, parse_constant=refuse) for each in (folder / FILE).read_text().splitlines()]


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("jsonl",), ("jsonl", "jsonl")])
def test_the_file_is_always_there_and_each_line_is_out_at_once(names: tuple[str, ...], tmp_path: Path) -> None:
    told = {"train/loss": 0.1 + 0.2, "step/residues": 3, "done": True, "note": "a\nb", "samples": ["MK", ["T", 1.5]]}
    tracker = made(tmp_path / "run", *names)
    tracker.log(told, 4)
    assert [{**each, "seconds": 0} for each in lines(tmp_path / "run")] == [{"step": 4, "seconds": 0, **told}]
    tracker.log({"val/loss": 2.5}, 4)
    assert lines(tmp_path / "run")[1]["val/loss"] == 2.5
    tracker.close()
    assert [each.name for each in (tmp_path / "run").iterdir()] == [FILE]


def test_numbers_that_json_lacks_are_strings_that_float_turns_back(tmp_path: Path) -> None:
    tracker = made(tmp_path)
    tracker.log({"a": math.nan, "b": math.inf, "c": [1.0, -math.inf, [math.nan]], "d": np.float64("nan")}, 1)
    tracker.close()
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d"]) == ("NaN", "Infinity", [1.0, "-Infinity", ["NaN"]], "NaN")
    assert math.isnan(float(line["a"]))
    assert (float(line["b"]), float(line["c"][1])) == (math.inf, -math.inf)
    assert read(tmp_path / FILE) == [line]


def test_going_on_after_a_step_drops_what_was_told_of_later_ones(tmp_path: Path) -> None:
    first = made(tmp_path)
    for step in range(1, 6):
        first.log({"loss": float(step)}, step)
        first.log({"val": float(step)}, step)
    first.close()
    second = made(tmp_path, after=3)
    for step in (4, 5, 6):
        second.log({"loss": -float(step)}, step)
    second.close()
    told = lines(tmp_path)
    assert [each["step"] for each in told] == [1, 1, 2, 2, 3, 3, 4, 5, 6]
    assert [each["loss"] for each in told if "loss" in each] == [1, 2, 3, -4, -5, -6]


def test_seconds_go_on_from_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    first = made(tmp_path)
    now = 107.5
    first.log({}, 1)
    first.close()
    now = 5000.0
    second = made(tmp_path, after=1)
    now = 5001.0
    second.log({}, 2)
    second.close()
    assert [each["seconds"] for each in lines(tmp_path)] == [7.5, 8.5]


def test_a_run_that_begins_has_told_nothing_yet(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = made(tmp_path)
        tracker.log({"loss": 1.0}, 0)
        tracker.close()
    assert len(lines(tmp_path)) == 1


def test_a_line_cut_short_by_a_kill_is_dropped_and_one_damaged_otherwise_is_named(tmp_path: Path) -> None:
    whole = '{"step": 1, "seconds": 0.5, "loss": 1.0}\n'
    (tmp_path / FILE).write_text(whole + '{"step": 1, "seco')
    tracker = made(tmp_path, after=1)
    tracker.log({"loss": 2.0}, 2)
    tracker.close()
    assert [each["loss"] for each in lines(tmp_path)] == [1.0, 2.0]
    for damaged in ('{"step": 1, "seco\n', "[]\n", '{"seconds": 1}\n', '{"step": "x", "seconds": 1}\n', "\n"):
        (tmp_path / FILE).write_text(whole + damaged + whole)
        with pytest.raises(
            TrackerError, match=r"got line 2 of .*metrics\.jsonl, which is damaged .*; mend or delete that line"
        ):
            made(tmp_path, after=1)
        assert (tmp_path / FILE).read_text() == whole + damaged + whole


KILLED = """
import os
from pathlib import Path
from headway_apps.training.trackers import Trackers
tracker = Trackers([], Path(sys.argv[1]), "p", "n", {})
for step in range(1, 11):
    tracker.log({"loss": 1.0}, step)
os.kill(os.getpid(), 9)
"""


def test_what_was_told_before_a_kill_is_there(tmp_path: Path) -> None:
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}]\n" + KILLED
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    assert [each["step"] for each in lines(tmp_path)] == list(range(1, 11))


@pytest.mark.parametrize(
    "values, says",
    [
        ({"loss": torch.tensor(1.0)}, r"got 'loss' of Tensor, takes float, int, str or list .* call \.item\(\)"),
        ({"loss": np.float32(1)}, "got 'loss' of float32"),
        ({"loss": None}, "got 'loss' of NoneType"),
        ({"step": 3}, "got 'step' of int, .* that is not step or seconds"),
        ({"x": [torch.tensor(1.0)]}, "got a list in .*x that is not of float, int, str or list"),
    ],
)
def test_what_is_no_number_text_or_list_is_refused(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    tracker = made(tmp_path)
    with pytest.raises(RequestError, match=says):
        tracker.log(values, 1)
    tracker.close()
    assert lines(tmp_path) == []


# -- the others -------------------------------------------------------------------------------------------------------


class StandIn:
    """Of a package: notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.calls.append((name, *given, *([named] if named else [])))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """All three packages are here, and note their calls."""
    noted = StandIn()

    def begun(*given: Any, **named: Any) -> StandIn:
        noted.calls.append(("begun", *given, named))
        return noted

    entries = {"tensorboard": "x", "torch.utils.tensorboard": "SummaryWriter", "wandb": "init", "trackio": "init"}
    for name, entry in entries.items():
        module = types.ModuleType(name)
        setattr(module, entry, begun)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setattr(sys, "stdin", closed := io.StringIO())
    closed.close()
    return noted.calls


def test_tensorboard_gets_curves_and_texts_and_drops_what_came_after(calls: list[Any], tmp_path: Path) -> None:
    tracker = made(tmp_path, "tensorboard", after=7)
    tracker.log({"loss": 0.5, "note": "x", "samples": ["MK", math.nan]}, 8)
    tracker.close()
    begun, config, *rest = calls
    assert begun == ("begun", str(tmp_path / "tensorboard"), {"purge_step": 8})
    assert config[:2] == ("add_text", "config")
    assert json.loads(config[2]) == {"lr": 0.1, "some": [1, "Infinity"], "none": None}
    assert rest == [
        ("add_scalar", "loss", 0.5, 8), ("add_text", "note", "x", 8), ("add_text", "samples", '["MK", "NaN"]', 8),
        ("close",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "environment, mode",
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x"}, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "x"}, "online"),
        ({"NETRC": "there"}, "online"),
        ({"NETRC": "there", "WANDB_BASE_URL": "https://other.host"}, "offline"),
        ({"WANDB_MODE": "disabled"}, None),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "x"}, None),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "x"}, None),
    ],
)
def test_wandb_is_offline_unless_the_environment_says_otherwise(
    environment: dict[str, str], mode: str | None, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / "netrc") if name == "NETRC" else value)
    tracker = made(tmp_path, "wandb")
    tracker.log({"loss": math.nan}, 3)
    tracker.close()
    (_, how), (log, values, at), finish = calls
    assert how["mode"] == mode
    assert (how["project"], how["name"], how["group"], how["dir"]) == ("proteins", "first", "first", str(tmp_path))
    assert how["config"]["lr"] == 0.1
    assert (log, at, finish) == ("log", {"step": 3}, ("finish",))
    assert math.isnan(values["loss"])


def test_wandb_online_without_a_key_is_refused_as_it_would_ask_for_one(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(
        TrackerError, match="got WANDB_MODE=online and no key for https://api.wandb.ai; set WANDB_API_KEY"
    ):
        made(tmp_path, "wandb")
    assert not calls


def test_trackio_gets_a_run_of_its_own_when_it_goes_on(calls: list[Any], tmp_path: Path) -> None:
    for after, name in ((0, "first"), (5, "first-after-5")):
        calls.clear()
        tracker = made(tmp_path, "trackio", after=after)
        tracker.log({"loss": 1.0}, 6)
        tracker.close()
        (_, how), log, finish = calls
        assert (how["project"], how["name"], how["group"]) == ("proteins", name, "first")
        assert (log, finish) == (("log", {"loss": 1.0}, {"step": 6}), ("finish",))


def test_all_that_are_asked_for_are_told_beside_the_file(calls: list[Any], tmp_path: Path) -> None:
    tracker = made(tmp_path, "wandb", "trackio", "tensorboard")
    tracker.log({"loss": 1.0}, 6)
    tracker.close()
    assert [name for name, *_ in calls if name != "add_text"] == [
        "begun", "begun", "begun", "log", "log", "add_scalar", "close", "finish", "finish",
    ]  # fmt: skip
    assert [each["loss"] for each in lines(tmp_path)] == [1.0]


# -- what is not here -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_not_installed_is_refused_by_name_and_nothing_is_lost(
    name: str, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = '{"step": 1, "seconds": 0.5, "loss": 1.0}\n'
    (tmp_path / FILE).write_text(before)
    monkeypatch.setitem(sys.modules, name, None)
    others = [each for each in ("tensorboard", "wandb", "trackio") if each != name]
    with pytest.raises(TrackerError, match=f"got the tracker {name}, takes the package {name} .*pip install {name}"):
        made(tmp_path, *others, name)
    assert [each[0] for each in calls if each[0] in ("begun", "close", "finish")] == ["begun"] * 2 + [
        {"tensorboard": "close"}.get(each, "finish") for each in reversed(others)
    ]
    assert (tmp_path / FILE).read_text() == before


def test_an_unknown_one_is_refused_with_those_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown tracker 'mlflow'; known: jsonl, tensorboard, wandb, trackio"):
        made(tmp_path / "run", "mlflow")
    assert not (tmp_path / "run").exists()


def test_all_are_closed_even_where_one_fails(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(trackers.TensorBoard, "close", fails)
    tracker = made(tmp_path, "wandb", "tensorboard")
    with pytest.raises(ConnectionError):
        tracker.close()
    assert calls[-1] == ("finish",)


def test_no_tracker_is_imported_before_it_is_asked_for() -> None:
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}]\nimport headway_apps.training.trackers\n"
    code += "assert not {'wandb', 'trackio', 'tensorboard', 'requests'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
