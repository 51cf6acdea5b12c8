"""A trained model comes back from its folder with all that was known of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.schedules import Cosine, Geometric, LogLinear, Schedule
from headway_apps.proteins.errors import WeightsError
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.trained import FILE, Trained

CONFIG = DiTConfig(width=32, blocks=1, heads=2, cond=8, embedded=33, scored=33, mask=32)


@pytest.mark.parametrize("graph", [Absorbing(33, mask=32, ids=ESM.residues), Uniform(33, ids=ESM.residues)])
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(), Cosine(sigma_max=8.0), Cosine(0.5, reaches=0.3)])
def test_comes_back_as_it_was(tmp_path: Path, graph: Graph, schedule: Schedule) -> None:
    kept = Trained(DiT(CONFIG), ESM, graph, schedule, {30: 2, 31: 5})
    kept.save(tmp_path)
    back = Trained.load(tmp_path)
    assert (back.alphabet, back.graph, back.schedule, back.lengths) == (ESM, graph, schedule, {30: 2, 31: 5})
    for name, weight in kept.model.state_dict().items():
        assert torch.equal(weight, back.model.state_dict()[name])
    assert not back.model.training


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no trained.json"):
        Trained.load(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        Trained.load(tmp_path)
