"""A trained model from what people name: its own folder, or a run's, of which it is the last checkpoint or the best."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from headway import RequestError
from headway_apps.proteins.errors import WeightsError
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.trained import FILE, Trained
from headway_apps.training.checkpoints import Checkpoint, Checkpoints


class Opened(NamedTuple):
    trained: Trained
    name: str
    """What to call it."""
    data: str | None
    """The fingerprint of the part that it was trained on, where that is known."""


def opened(path: Path, *, best: bool = False) -> Opened:
    """The model; of a run, with the averaged weights where there are any.

    `best` is of a run whose checkpoints have scores.
    """
    if not path.is_dir():
        raise WeightsError(f"got {path}, which is no folder, takes that of a trained model, or of a run")
    if (path / FILE).is_file():
        if best:
            raise RequestError(f"got --best for {path}, one trained model, takes it with a run's folder; leave it out")
        return Opened(Trained.load(path), path.name, None)
    found = Checkpoints(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    kept = None if found is None else found.best() if best else found.latest()
    if kept is None and found is not None and found.steps():
        raise WeightsError(f"got --best for {path}, of which no checkpoint was scored on held-out data; leave it out")
    if kept is None:
        raise WeightsError(
            f"got {path}, which has neither {FILE} nor a checkpoint, takes a folder of a trained model, or of a run"
        )
    return Opened(of_checkpoint(kept), f"{path.name}, step {kept.step:,}", kept.state.get("data"))


def of_checkpoint(kept: Checkpoint) -> Trained:
    from headway_apps.proteins.config import Config

    model = DiT(Config.model_validate(kept.state["config"]).network)
    weights = kept.tensors("model")
    if "average" in kept.files:
        weights |= kept.tensors("average")
    model.load_state_dict(weights)
    return Trained.of(model, kept.state["trained"])
