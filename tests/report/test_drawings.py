"""Drawings: where bars end, and what a mask's path covers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from report.made import errors, real

from headway.report import Pass
from headway.report.drawings import Scale, error_bars, mask_picture, small_pair, time_bars


def widths(html: str, kind: str) -> list[float]:
    return [float(w) for w in re.findall(rf'<rect class="{kind}"[^>]* width="([\d.]+)"', html)]


def test_a_decade_is_as_wide_everywhere() -> None:
    scale = Scale([1e-7, 1e-4])
    assert [scale.at(10.0**n) for n in (-7, -6, -5, -4)] == pytest.approx([1, 100 / 3, 200 / 3, 100])


@pytest.mark.parametrize("error, at", [(0.0, 0.0), (math.inf, 100.0), (1e-30, 1.0), (1e30, 100.0)])
def test_what_is_off_the_scale_stays_in_the_picture(error: float, at: float) -> None:
    assert Scale([1e-7, 1e-5]).at(error) == at


@pytest.mark.parametrize("found", [[], [0.0], [math.inf], [1e-7], [1e-300, 1e300]])
def test_a_scale_of_anything_has_a_length(found: list[float]) -> None:
    scale = Scale(found)
    assert scale.low < scale.high
    assert 2 <= len(scale.ticks()) <= 8


def test_bars_show_before_and_now() -> None:
    html = error_bars([errors("forward", 1e-6, 1e-7)])
    assert widths(html, "was")[0] > widths(html, "now")[0]
    assert widths(html, "wrong") == []
    assert widths(error_bars([errors("forward", 1e-7, 1e-3)]), "now") == []
    assert len(widths(error_bars([errors("forward", 1e-7, 1e-3)]), "wrong")) == 1


def test_the_worst_of_many_are_shown() -> None:
    many = [errors(f"gradient of {i}", 1e-7, 1e-7 * (1 + i / 100)) for i in range(40)]
    html = error_bars([*many, errors("forward", 1e-9, 1e-9)])
    assert "gradient of 39<" in html
    assert "gradient of 3<" not in html
    assert "forward<" in html
    assert "of 41; the JSON has all" in html


def test_times_are_on_one_scale_from_zero() -> None:
    html = time_bars([Pass("forward", (4.0,) * 5, (1.0,) * 5), Pass("both", (8.0,) * 5, (8.0,) * 5)])
    assert widths(html, "was") == [50, 100]
    assert widths(html, "now") == [12.5, 100]
    assert "faster: 4.00x" in html
    assert "no gain: 1.00x" in html


def test_a_mask_is_drawn_cell_by_cell() -> None:
    for picture in real().pictures:
        svg = ElementTree.fromstring(mask_picture(picture))
        path = svg[0].attrib["d"]
        cells = {
            (int(y), x)
            for start, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", path)
            for x in range(int(start), int(start) + int(width))
        }
        assert cells == {(y, x) for y, row in enumerate(picture.rows) for x, cell in enumerate(row) if cell}


def test_drawings_are_well_formed() -> None:
    ElementTree.fromstring(small_pair(1e-7, math.inf, Scale([1e-7]), False))
    ElementTree.fromstring(f"<p>{error_bars([errors('<b>', 0.0, 0.0)])}</p>")
