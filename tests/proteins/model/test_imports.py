"""The network is imported and runs where packages that others need are absent, and changes nothing in the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import fresh
from test_packaging import SETTINGS

ABSENT = ("flash_attn", "triton", "xformers", "einops", "omegaconf", "wandb", "matplotlib", "seaborn")
OURS = ("safetensors", "pyarrow", "numpy")
"""Of the proteins extra, but not needed here."""

RUN = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
{SETTINGS}
fusers = lambda: (torch._C._jit_can_fuse_on_cpu(), torch._C._jit_can_fuse_on_gpu(),
    torch._C._jit_texpr_fuser_enabled(), torch._C._get_graph_executor_optimize())
flags, loaded = fusers(), set(sys.modules)
import headway_apps.proteins.model.dit, headway_apps.proteins.model.presets
print(*({OURS!r}[i] for i in range({len(OURS)}) if {OURS!r}[i] in set(sys.modules) - loaded))
with torch.random.fork_rng():
    model = headway_apps.proteins.model.dit.DiT(headway_apps.proteins.model.presets.preset(
        "seed-24m", width=32, heads=2, blocks=1, cond=8))
    model(torch.zeros(5, dtype=torch.long), torch.ones(2), torch.tensor([2, 3])).sum().backward()
after = settings()
assert not [(a, b) for a, b in zip(before, after) if a != b]
assert fusers() == flags
"""


EVERY_MODULE = f"""
{SETTINGS}
import accelerate.utils, matplotlib, pyarrow, pydantic, safetensors.torch, yaml
import torch.distributed.checkpoint.state_dict, torch.distributed.tensor
before = settings()
import importlib, pkgutil, headway_apps
for module in pkgutil.walk_packages(headway_apps.__path__, "headway_apps."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = settings()
assert not [(a, b) for a, b in zip(before, after) if a != b]
assert "headway_apps.proteins.train.trainer" in sys.modules
print(*{{"flash_attn", "wandb", "trackio", "tensorboard", "seaborn", "transformers"}} & set(sys.modules))
"""


@pytest.mark.parametrize("code", [RUN, EVERY_MODULE], ids=["the network", "every module"])
def test_it_runs_without_packages_of_others_and_sets_nothing_for_the_process(code: str, tmp_path: Path) -> None:
    """The original's import set four flags of PyTorch's fuser, and died where flash-attn was not."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ}
    status, told = fresh(code, folder=tmp_path, environment=environment)
    assert (status, told.strip()) == (0, "")
