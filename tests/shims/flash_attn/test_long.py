"""Packed sequences of lengths at which kernels take another path: past 1,024 tokens, and 64 modulo 128."""

from __future__ import annotations

import importlib

import pytest
import torch
from shims.flash_attn.truth import packed

interface = importlib.import_module("headway.shims.flash_attn.flash_attn_interface")


@pytest.mark.parametrize("lengths", [(1025,), (64, 1, 704, 0, 192, 1100)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_are_what_short_ones_are(lengths: tuple[int, ...], causal: bool) -> None:
    """A replacement for old cards forgot `causal` where a sequence was longer than 1,024."""
    qkv = torch.randn(sum(lengths), 3, 1, 8, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    out = interface.flash_attn_varlen_qkvpacked_func(qkv, starts, max(lengths), causal=causal)
    wanted, _ = packed(*qkv.unbind(1), lengths, lengths, causal=causal)
    torch.testing.assert_close(out, wanted)
    toward = torch.randn_like(out)
    got, expected = (torch.autograd.grad(x, qkv, toward)[0] for x in (out, wanted))
    torch.testing.assert_close(got, expected)
