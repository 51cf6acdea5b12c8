"""Lengths come from the data, or as asked, and from the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest

from headway import RequestError
from headway_apps.proteins.generate.lengths import draw, parse


def test_lengths_are_as_frequent_as_in_the_data() -> None:
    drawn = Counter(draw({30: 1, 77: 3, 500: 0}, 4000, seed=0))
    assert set(drawn) == {30, 77}
    assert drawn[77] == pytest.approx(3000, abs=110)  # 4 standard deviations


def test_the_seed_alone_decides() -> None:
    assert draw({7: 2, 9: 5}, 50, seed=3) == draw({9: 5, 7: 2}, 50, seed=3) != draw({7: 2, 9: 5}, 50, seed=4)


@pytest.mark.parametrize("text", ["", "0", "-5", "9-7", "5-", "1e2", "ten", "5;6", "100001", "1-9999999999", "٣"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="got the length"):
        parse(text)


@pytest.mark.parametrize("histogram", [{}, {5: 0}, {0: 1}, {5: -1, 6: 2}])
def test_a_histogram_of_nothing_is_refused(histogram: dict[int, int]) -> None:
    with pytest.raises(RequestError, match="needs them given"):
        draw(histogram, 1, seed=0)


def test_none_at_all_are_refused() -> None:
    with pytest.raises(RequestError, match="count of 0"):
        draw({5: 1}, 0, seed=0)
