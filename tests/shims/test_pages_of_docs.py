"""What docs/flash_attn.md and docs/xformers.md show runs, and what they list is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from os import environ
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"flash_attn": "([9, 4, 32])", "xformers": "[(1, 5, 4, 32), (1, 1, 4, 32), (1, 9, 4, 32)]"}


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{page}: Headway answers, as" in done.stdout
    assert PAGES[page] in done.stdout


def test_every_module_is_listed() -> None:
    folder = ROOT / "src" / "headway" / "shims" / "flash_attn"
    modules = {
        ".".join(("flash_attn", *file.relative_to(folder).with_suffix("").parts)) for file in folder.rglob("*.py")
    }
    modules = {name for name in modules if not name.endswith("__init__")} | {"flash_attn"}
    rows = re.findall(r"^\| (`flash_attn.*?) \|", (ROOT / "docs" / "flash_attn.md").read_text(), re.MULTILINE)
    assert modules == set(re.findall(r"`(.*?)`", " ".join(rows)))
