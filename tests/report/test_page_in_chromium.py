"""The page in a real browser: it sorts, filters, stays silent, asks for nothing, and runs no one else's script.

Left out only where no Chromium is installed (apt-get install chromium).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.browser import CHROMIUM, Browser, browser
from report.made import failed, named, real
from report.test_page import ATTACK

from headway.report import page

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed, so the page is not looked at in one"
)

SITES = """
[...document.querySelectorAll('#census > tbody')].filter((body) => body.offsetHeight)
    .map((body) => body.rows[0].cells[%d].dataset.value)
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
def opened(tab: Browser, tmp_path: Path) -> Browser:
    path = tmp_path / "report.html"
    path.write_text(page(real()), "utf-8")
    tab.screen(1200, 900)
    tab.open(path)
    return tab


def shown(tab: Browser, column: int = 0) -> list[str]:
    found: list[str] = tab.evaluate(SITES % column)
    return found


def head(column: int) -> str:
    return f"#census thead th:nth-child({column + 1}) button"


def sorted_by(tab: Browser) -> list[list[str]]:
    found: list[list[str]] = tab.evaluate(
        "[...document.querySelectorAll('#census th[aria-sort]')].map(h => [h.textContent, h.getAttribute('aria-sort')])"
    )
    return found


def test_a_click_sorts_by_words_and_back(opened: Browser) -> None:
    assert shown(opened) == ["layer.self_attn", "unused", "causal"]
    opened.click(head(0))
    assert shown(opened) == ["causal", "layer.self_attn", "unused"]
    assert sorted_by(opened) == [["site", "ascending"]]
    opened.click(head(0))
    assert shown(opened) == ["unused", "layer.self_attn", "causal"]
    assert sorted_by(opened) == [["site", "descending"]]


def test_a_click_sorts_by_numbers_with_the_unmeasured_last(opened: Browser) -> None:
    column = 6
    for down in (False, True):
        opened.click(head(column))
        *known, unknown = shown(opened, column)
        assert unknown == ""
        numbers = [float(one) for one in known]
        assert len(numbers) == 2
        assert numbers == sorted(numbers, reverse=down)
    assert sorted_by(opened) == [["forward", "descending"]]


def test_details_move_with_their_row(opened: Browser) -> None:
    opened.click("#census > tbody:nth-of-type(2) summary")
    opened.click(head(0))
    last = "document.querySelector('#census > tbody:last-of-type')"
    assert opened.evaluate(f"{last}.querySelector('details').open")
    assert "did not run with the example" in opened.evaluate(f"{last}.innerText")


def test_the_filter_takes_words_of_site_kind_and_reason(opened: Browser) -> None:
    for words, left in (
        ("CAUSAL", ["causal"]),
        ("multihead self", ["layer.self_attn"]),
        ("did not run", ["unused"]),
        ("nothing has this", []),
    ):
        opened.type("#filter", words)
        assert shown(opened) == left
        assert opened.evaluate("document.getElementById('count').textContent") == f"{len(left)} of 3 sites"
    opened.type("#filter", "")
    assert len(shown(opened)) == 3
    assert opened.evaluate("document.getElementById('count').textContent") == ""


def test_is_silent_and_alone(opened: Browser) -> None:
    assert opened.complaints == []
    assert [url.partition(":")[0] for url in opened.requests] == ["file"]


def test_strangers_names_run_nothing(tab: Browser, tmp_path: Path) -> None:
    path = tmp_path / "attack.html"
    path.write_text(page(named(ATTACK)), "utf-8")
    tab.dialogs.clear()
    tab.open(path)
    assert tab.evaluate("document.scripts.length") == 1
    assert tab.evaluate("document.querySelectorAll('img, [onerror], [onload]').length") == 0
    assert tab.evaluate("document.querySelector('h1').textContent") == ATTACK
    assert tab.dialogs == []
    assert tab.complaints == []
    assert [url.partition(":")[0] for url in tab.requests] == ["file"]


def test_even_unescaped_no_other_script_runs(tab: Browser, tmp_path: Path) -> None:
    """The page's policy stands behind the escaping."""
    path = tmp_path / "breach.html"
    breach = "<script>document.title = 'breached'</script><img src=x onerror=\"document.title = 'breached'\">"
    path.write_text(page(real()).replace("<body>", f"<body>{breach}"), "utf-8")
    tab.open(path)
    assert tab.evaluate("document.title") == "Headway: mixed"
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_fits_every_screen(tab: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    for report in (real(), failed(), named("a_very_long_name_without_any_space" * 8)):
        path.write_text(page(report), "utf-8")
        tab.screen(width, 800, dark=dark, phone=width < 500)
        tab.open(path)
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read(tab: Browser, tmp_path: Path, dark: bool) -> None:
    """Contrast of 4.5 to 1 at least, as WCAG AA has it."""
    for report in (real(), failed()):
        path = tmp_path / "report.html"
        path.write_text(page(report), "utf-8")
        tab.screen(1200, 900, dark=dark)
        tab.open(path)
        pairs: list[list[str]] = tab.evaluate(
            """(() => {
              const ground = (e) => {
                for (; e; e = e.parentElement) {
                  const c = getComputedStyle(e).backgroundColor;
                  if (c !== 'rgba(0, 0, 0, 0)') return c;
                }
              };
              const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
              const found = new Map();
              while (walker.nextNode()) {
                const e = walker.currentNode.parentElement;
                if (!walker.currentNode.data.trim() || e.tagName === 'SCRIPT') continue;
                const pair = [getComputedStyle(e).color, ground(e)];
                found.set(pair.join(), [...pair, walker.currentNode.data.trim()]);
              }
              return [...found.values()];
            })()"""
        )
        assert len(pairs) > 5
        for ink, ground, text in pairs:
            assert _contrast(ink, ground) >= 4.5, (ink, ground, text)


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
