"""What README.md and pages of docs/ show runs, and what those of the shims list is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import fresh

ROOT = Path(__file__).parents[2]
SHOWN = {
    "README.md": ("2 swapped, 0 left alone", "first in order that takes the call", "■ ■ · ·", "nothing to report"),
    "docs/masks.md": ("■ · · ·\n■ ■ · ·\n· ■ ■ ·\n· · ■ ■\n■ ■ ■ ·\n■ ■ ■ ■\n",),
    "docs/flash_attn.md": ("flash_attn: Headway answers, as", "[1, 4, 64]"),
    "docs/xformers.md": ("[(1, 5, 4, 32), (1, 1, 4, 32), (1, 9, 4, 32)]",),
}
"""Something that each example prints, in order."""


@pytest.mark.parametrize("page", SHOWN)
def test_each_example_runs_as_printed(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == len(SHOWN[page])
    for block, shown in zip(blocks, SHOWN[page], strict=True):
        status, told = fresh(block, folder=tmp_path)
        assert status == 0, told
        assert shown in told


def test_every_module_is_listed() -> None:
    folder = ROOT / "src" / "headway" / "shims" / "flash_attn"
    modules = {
        ".".join(("flash_attn", *file.relative_to(folder).with_suffix("").parts)) for file in folder.rglob("*.py")
    }
    modules = {name for name in modules if not name.endswith("__init__")} | {"flash_attn"}
    rows = re.findall(r"^\| (`flash_attn.*?) \|", (ROOT / "docs" / "flash_attn.md").read_text(), re.MULTILINE)
    assert modules == set(re.findall(r"`(.*?)`", " ".join(rows)))
