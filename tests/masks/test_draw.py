"""A mask as text and as a picture."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest
import torch

from headway import MaskError
from headway.masks import Alibi, Bias, Causal, Dense, Documents, Padding, Predicate, Prefix, Window


def test_matrix() -> None:
    assert (Causal() & Window(left=1)).matrix(3, 3) == "■ · ·\n■ ■ ·\n· ■ ■"


def test_matrix_of_one_batch_entry_and_head() -> None:
    assert Padding([1, 2]).matrix(1, 3, batch=1) == "■ ■ ·"
    assert (Padding([1, 2]) & Alibi(torch.ones(4), align="lower-right")).matrix(1, 3, batch=1, head=3) == "■ ■ ·"
    assert Prefix(torch.tensor([0, 3])).matrix(1, 3, batch=1) == "■ ■ ■"
    may = torch.zeros(2, 3, 1, 2).bool()
    may[1, 2, 0, 1] = True
    assert Dense(may).matrix(1, 2, batch=1, head=2) == "· ■"
    assert (~Dense(may)).matrix(1, 2, batch=1, head=2) == "■ ·"
    assert Predicate(lambda b, h, q, k: (b == 3) & (h == 5) & (k >= 0)).matrix(1, 1, batch=3, head=5) == "■"
    with pytest.raises(MaskError, match=r"got padding for 2 batch entries"):
        Padding([1, 2]).matrix(1, 3, batch=2)


def test_a_bias_shows_what_it_blocks() -> None:
    assert Bias(torch.tensor([[0.0, -math.inf, -9.0]])).matrix(1, 3) == "■ · ■"


@pytest.mark.parametrize("at_most", [1, 2, 5, 32])
def test_a_large_one_is_sampled_evenly(at_most: int) -> None:
    q_len, kv_len = 40_000, 50_000
    rows = Causal(align="upper-left").matrix(q_len, kv_len, at_most=at_most).splitlines()
    steps = [i / max(at_most - 1, 1) for i in range(at_most)]
    assert len(rows) == at_most
    for row, y in zip(rows, steps, strict=True):
        want = " ".join("■" if round(x * (kv_len - 1)) <= round(y * (q_len - 1)) else "·" for x in steps)
        assert row == want


def test_sampling_reaches_the_last_key_of_a_very_long_one() -> None:
    keys = 2**25 + 1  # float32 has no such number
    last = Predicate(lambda b, h, q, k: (k == 2**25) & (q >= 0))
    assert last.matrix(1, keys).endswith("· ■")


@pytest.mark.parametrize("name", ["mask.png", "mask"])
def test_draw_writes_a_png(tmp_path: Path, name: str) -> None:
    path = (Causal() & Documents([30, 50, 20])).draw(tmp_path / name, 100, 100)
    assert path == tmp_path / name
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_is_the_mask(tmp_path: Path) -> None:
    """Dark where it may, light where not: read back at the middle of each quarter."""
    from matplotlib import pyplot

    path = Documents([50, 50]).draw(str(tmp_path / "mask.png"), 100, 100)
    grey = pyplot.imread(path)[..., :3].mean(-1)
    dark = torch.tensor(grey < 0.5)
    # The lines around it are the only ones dark from end to end.
    (top, *_, bottom), (left, *_, right) = (
        (n > n.max() * 0.95).nonzero().flatten().tolist() for n in (dark.sum(1), dark.sum(0))
    )
    quarters = [(y, x) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    seen = [bool(dark[top + int((bottom - top) * y), left + int((right - left) * x)]) for y, x in quarters]
    assert seen == [True, False, False, True]


def test_draw_leaves_no_figure_behind(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    Causal().draw(tmp_path / "mask.png", 20, 20)
    assert pyplot.get_fignums() == before


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object, **named: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MaskError, match=r"needs matplotlib: pip install matplotlib"):
        Causal().draw(tmp_path / "mask.png", 2, 2)
