"""The page in a real browser: it fits a phone, shows its figures for light and dark, and asks for nothing.

Left out only where no Chromium is installed (apt-get install chromium).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from proteins.report.made import run
from report.browser import CHROMIUM, Browser, browser

from headway_apps.proteins.report.write import write_report

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed, so the page is not looked at in one"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_report(run(folder, rises=True), folder / "it.html")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.mark.parametrize("wide", [340, 800, 1400])
def test_it_is_no_wider_than_the_screen_and_asks_for_nothing(tab: Browser, written: Path, wide: int) -> None:
    tab.screen(wide, 900)
    tab.open(written)
    assert tab.evaluate("document.documentElement.scrollWidth") <= wide
    assert tab.evaluate("[...document.images].every((each) => each.complete && each.naturalWidth > 900)")
    assert tab.complaints == []
    assert [each for each in tab.requests if not each.startswith(("file:", "data:"))] == []


def test_figures_are_for_the_page_they_are_on(tab: Browser, written: Path) -> None:
    shown = []
    for scheme in ("light", "dark"):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        tab.open(written)
        shown.append(tab.evaluate("document.images[0].currentSrc"))
    assert shown[0] != shown[1]
