from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from proteins.train import runs

from headway_apps.proteins.config import Config, parse


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.folder(tmp_path_factory.mktemp("proteins") / "data")


@pytest.fixture
def config(data: Path) -> Callable[..., Config]:
    """The small config, with changes such as 'run.steps=4'."""
    return lambda *changes: parse(runs.CONFIG.format(data=data), changes)
