"""A trained model from what people name: its own folder, or a run's, of which it is the last checkpoint."""

from __future__ import annotations

from pathlib import Path

from headway_apps.proteins.errors import WeightsError
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.trained import FILE, Trained
from headway_apps.training.checkpoints import Checkpoint, Checkpoints


def opened(path: Path) -> tuple[Trained, str]:
    """The model, and what it is called; of a run, with the averaged weights where there are any."""
    if (path / FILE).is_file():
        return Trained.load(path), path.name
    kept = Checkpoints(path / "checkpoints").latest() if (path / "checkpoints").is_dir() else None
    if kept is None:
        raise WeightsError(
            f"got {path}, which has neither {FILE} nor a checkpoint, takes a folder of a trained model, or of a run"
        )
    return of_checkpoint(kept), f"{path.name}, step {kept.step:,}"


def of_checkpoint(kept: Checkpoint) -> Trained:
    from headway_apps.proteins.config import Config

    model = DiT(Config.model_validate(kept.state["config"]).network)
    weights = kept.tensors("model")
    if "average" in kept.files:
        weights |= kept.tensors("average")
    model.load_state_dict(weights)
    return Trained.of(model, kept.state["trained"])
