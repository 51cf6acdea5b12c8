"""What is written may be read by those whom the user's other files are open to."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from headway_apps.training import tensors


def test_others_may_read_it_as_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    tensors.write(tmp_path / "x.safetensors", {"a": torch.arange(3)}, {"of": "a test"})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
