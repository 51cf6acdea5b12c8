"""Stored rows of the benchmarks: a rate counts the work that there is, and each row says what it was measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

FILES = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.jsonl"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_row_says_what_it_was_measured_on(path: Path) -> None:
    for row in rows(path):
        assert {"gpu", "versions", "commit", "date"} <= row.keys(), row


def test_rates_count_both_products_of_all_heads_and_their_size() -> None:
    """A formula elsewhere left out the head size and the factor 4; here PyTorch counts, forward without a mask."""
    measured = [row for path in FILES for row in rows(path) if "tflops" in row]
    dense = [row for row in measured if (row["mask"], row["pass"], row["group"]) == ("none", "forward", "dense")]
    assert dense
    for row in dense:
        q, k = (
            torch.empty(row["batch"], row["heads"], row[length], row["head_dim"], device="meta")
            for length in ("q_len", "kv_len")
        )
        with FlopCounterMode(display=False) as counter:
            F.scaled_dot_product_attention(q, k, k)
        assert row["tflops"] == pytest.approx(counter.get_total_flops() / row["ms_p50"] / 1e9, rel=0.01, abs=0.06)
