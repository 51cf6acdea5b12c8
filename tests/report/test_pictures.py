"""Pictures: the masks that really were made, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from report.made import example, swapped
from torch import nn

from headway.report import pictures
from headway.report.pictures import AT_MOST, from_words
from headway.sites.site import site_of
from headway.swap import swap


def test_shows_each_mask_that_was_made() -> None:
    found = pictures(one := swapped(), example())
    by_site = {picture.sites: picture for picture in found if picture.entry == 0}
    causal = by_site[("causal",)]
    assert causal.words == "causal"
    assert causal.rows == tuple(tuple(k <= q for k in range(12)) for q in range(12))
    padded = next(p for p in found if p.sites == ("layer.self_attn",) and p.entry == 1)
    assert padded.rows == ((True,) * 7 + (False,) * 5,) * 12
    # One picture for all batch entries that look alike.
    assert [p.entry for p in found if p.sites == ("causal",)] == [0]
    assert {t.name: sum(t.runs.values()) for t in one.census.swapped} == {"layer.self_attn": 1, "causal": 1}


def test_leaves_the_sites_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    one = swapped()

    def fails(model: nn.Module) -> None:
        model(*example())
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        pictures(one, fails)
    for module in one.model.modules():
        site = site_of(module)
        assert site is None or "attend" not in vars(site)


def test_long_masks_are_sampled() -> None:
    model = nn.MultiheadAttention(8, 1, batch_first=True)
    mask = torch.ones(200, 200, dtype=torch.bool).triu(1)

    def run(model: nn.Module) -> None:
        x = torch.zeros(1, 200, 8)
        model(x, x, x, attn_mask=mask, need_weights=False)

    (picture,) = pictures(swap(model, run), run)
    assert (picture.q_len, len(picture.rows), len(picture.rows[0])) == (200, AT_MOST, AT_MOST)
    assert picture.rows[0] == (True,) + (False,) * (AT_MOST - 1)
    assert picture.rows[-1] == (True,) * AT_MOST


def test_a_causal_mask_is_known_by_its_word_alone() -> None:
    (picture,) = from_words(t for t in swapped().census.tickets if t.name == "causal")
    assert picture.rows == tuple(tuple(k <= q for k in range(12)) for q in range(12))
