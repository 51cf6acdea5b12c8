"""Numbers out: a file of lines always, and TensorBoard, W&B or Trackio where they are asked for by name.

In metrics.jsonl each line is one object: step, seconds since the run began, and what was told. Numbers that JSON lacks
are the strings "NaN", "Infinity" and "-Infinity": every reader takes those, and `float` turns them back.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from headway import RequestError, UnknownNameError
from headway_apps.training import folders
from headway_apps.training.errors import TrackerError

FILE = "metrics.jsonl"
OWN = ("step", "seconds")
"""What every line has beside what is told."""

Value = float | str | list[Any]


class Tracker(Protocol):
    def log(self, values: Mapping[str, Value], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All that were asked for, as one. Only one process of a run makes it."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        project: str,
        name: str,
        config: Mapping[str, Any],
        after: int = 0,
    ) -> None:
        """`after` is the step that the run goes on from: what a file tells of later ones is dropped, of 0 all of it."""
        for each in names:
            if each not in KINDS:
                raise UnknownNameError("tracker", each, tuple(KINDS))
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as closing:  # what was begun before one is refused is closed again
            self._trackers: list[Tracker] = []
            for each in dict.fromkeys((*(name for name in names if name != "jsonl"), "jsonl")):
                tracker = KINDS[each](folder, project, name, dict(config), after)
                closing.callback(tracker.close)
                self._trackers.append(tracker)
            self._closing = closing.pop_all()

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Numbers, texts and lists of them, by name."""
        for key, value in values.items():
            if key in OWN or not isinstance(value, int | float | str | list):
                raise RequestError(
                    f"got {key!r} of {type(value).__name__}, takes float, int, str or list under a name that is not"
                    f" {' or '.join(OWN)}; call .item() on a tensor"
                )
        for each in self._trackers:
            each.log(values, step)

    def close(self) -> None:
        """All of them, even where one fails."""
        self._closing.close()


class JsonLines:
    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any], after: int) -> None:
        path = folder / FILE
        kept = [line for line in read(path) if line["step"] <= after] if after and path.exists() else []
        folders.replace(path, "".join(map(_line, kept)))
        self._began = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Value], step: int) -> None:
        self._file.write(_line({"step": step, "seconds": round(time.monotonic() - self._began, 3), **values}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that was cut short by the end of its process is left out."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            int(line["step"]), float(line["seconds"])
            lines.append(line)
        except (ValueError, TypeError, KeyError) as error:
            raise TrackerError(
                f"got line {number} of {path}, which is damaged ({error}); mend or delete that line"
            ) from error
    return lines


def _line(told: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_plain(told), allow_nan=False) + "\n"
    except TypeError as error:
        raise RequestError(
            f"got a list in {', '.join(told)} that is not of float, int, str or list ({error})"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class TensorBoard:
    """Events in `folder/tensorboard`; numbers as curves, the rest as text."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any], after: int) -> None:
        _imported("tensorboard", "tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=after + 1 if after else None)
        self._writer.add_text("config", json.dumps(_plain(config), indent=1, default=str), after)

    def log(self, values: Mapping[str, Value], step: int) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)
            else:
                self._writer.add_text(key, value if isinstance(value, str) else json.dumps(_plain(value)), step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Offline, unless WANDB_MODE or a key says otherwise. Going on is a run of its own, in the group of this name."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any], after: int) -> None:
        wandb = _imported("wandb", "wandb")
        self._run = wandb.init(
            project=project, name=name, group=name, config={**config, "after": after}, dir=str(folder), mode=_mode(),
            settings={"console": "off"},
        )  # fmt: skip

    def log(self, values: Mapping[str, Value], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _mode() -> str | None:
    """None leaves it to WANDB_MODE. Online without a key is refused, as W&B would ask for one at a terminal."""
    asked = os.environ.get("WANDB_MODE")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    known = any(os.environ.get(each) for each in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    known = known or importlib.import_module("requests.utils").get_netrc_auth(host) is not None
    if asked in ("online", "shared") and not known:
        raise TrackerError(f"got WANDB_MODE={asked} and no key for {host}; set WANDB_API_KEY, or WANDB_MODE=offline")
    return None if asked else "online" if known else "offline"


class Trackio:
    """In Trackio's own local folder. Going on is a run of its own, in the group of this name."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any], after: int) -> None:
        trackio = _imported("trackio", "trackio")
        own = f"{name}-after-{after}" if after else name
        self._run = trackio.init(project=project, name=own, group=name, config={**config, "after": after}, embed=False)

    def log(self, values: Mapping[str, Value], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, type[JsonLines] | type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackerError(
            f"got the tracker {module}, takes the package {package} ({error}): pip install {package}, or leave it out"
        ) from error
