"""Reports to look at: one of a real swap, and ones whose numbers and names are made up."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.report import Pass, Report, Times, pictures
from headway.sites.site import Ticket
from headway.swap import Census, Swap, swap
from headway.swap.judge import Errors
from headway.swap.proof import Certificate, Proof


class Causal(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Mixed(nn.Module):
    """A site of each kind, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.causal = Causal()
        self.unused = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.causal(self.layer(x, src_key_padding_mask=padding))


def example() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 7:] = True
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1)), padding


def swapped() -> Swap:
    torch.manual_seed(0)
    return swap(Mixed().eval(), example())


@cache
def real() -> Report:
    """A swap that holds, with masks seen."""
    one = swapped()
    times = Times(
        (Pass("forward", (2.0,) * 9, (1.0,) * 9), Pass("forward and backward", (4.0,) * 9, (4.0,) * 9)), "made up"
    )
    return Report.of(one, title="mixed", times=times, pictures=pictures(one, example()), command="headway try mixed")


def errors(what: str, before: float, now: float) -> Errors:
    return Errors(what, before, now, before / 4, now / 4, 1.0, 0.25, 1.0, 2.0**-23)


def failed() -> Report:
    """One site of two whose gradient got a hundred times worse, and was put back."""
    good = Ticket("good", "nn.MultiheadAttention")
    bad = Ticket("bad", "nn.MultiheadAttention", because="it failed the proof: gradient of input 0 errs")
    fine, worse = errors("forward", 1e-7, 2e-7), errors("gradient of input 0", 1e-7, 1e-5)
    proofs = (
        Proof("good", good.kind, "float64", ("sdpa-flash",), (fine,)),
        Proof("bad", bad.kind, "float64", ("sdpa-flash",), (fine, worse)),
    )
    real_ = real().certificate
    assert real_ is not None
    certificate = Certificate("Pair", proofs, (), None, real_.facts)
    return Report("pair", Census("Pair", (good, bad)), certificate)


def named(name: str) -> Report:
    """The real report with everything that a stranger may name called `name`."""
    report = real()
    tickets = tuple(
        dataclasses.replace(t, name=name, kind=name, asked=name, because=t.because and name, aliases=(name,))
        for t in report.census.tickets
    )
    assert report.certificate is not None
    proofs = tuple(
        dataclasses.replace(
            proof, name=name, kind=name, judge=name, wrong=name,
            errors=tuple(dataclasses.replace(e, what=name) for e in proof.errors),
        )
        for proof in report.certificate.proofs
    )  # fmt: skip
    deck = tuple(dataclasses.replace(card, case=name, wrong=name) for card in report.certificate.deck)
    facts = report.certificate.facts | {"name": name, name: name, "versions": {name: name}}
    certificate = dataclasses.replace(
        report.certificate, model=name, proofs=proofs, deck=deck, facts=facts, whole=proofs[0]
    )
    pictures_ = tuple(dataclasses.replace(p, words=name, mask=name, sites=(name,)) for p in report.pictures)
    times = Times((Pass(name, (1.0,), (1.0,)),), name, (name,))
    return Report(name, Census(name, tickets, (name,)), certificate, times, pictures_, name)
