"""Models small enough to train and sample in a test."""

from __future__ import annotations

from functools import lru_cache

import torch

from headway_apps.proteins.alphabet import ESM, Alphabet
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.losses import cross_entropy, per_residue
from headway_apps.proteins.diffusion.schedules import LogLinear, draw_positions
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.trained import Trained

REPEAT = "MKTAYIAK"
LENGTHS = {16: 1, 24: 2}


def untrained(alphabet: Alphabet = ESM, *, uniform: bool = False, ids: tuple[int, ...] = ()) -> Trained:
    """Every residue as likely as any, whatever is around it."""
    torch.manual_seed(0)
    ids, mask = ids or alphabet.residues, alphabet.mask
    graph: Graph = Uniform(alphabet.size, ids=ids) if uniform else Absorbing(alphabet.size, mask=mask, ids=ids)
    config = DiTConfig(
        width=48, blocks=2, heads=2, cond=16, embedded=alphabet.size, scored=alphabet.size, dropout=0.0,
        mask=None if uniform else mask, scale_by_sigma=not uniform,
    )  # fmt: skip
    return Trained(DiT(config).eval(), alphabet, graph, LogLinear(), LENGTHS)


def repeats() -> list[str]:
    """Pieces of one repeat, that begin anywhere in it."""
    return [(REPEAT * 4)[start : start + length] for start in range(len(REPEAT)) for length in (16, 24, 24)]


@lru_cache(maxsize=1)
def trained() -> Trained:
    """200 steps on `repeats`, whose rate falls, or what was learned would depend on how a processor rounds.

    Leave it as it is: tests share it.
    """
    found = untrained()
    graph, model = found.graph, found.model.train()
    encoded = [torch.tensor(ESM.encode(each)) for each in repeats()]
    clean, lengths = torch.cat(encoded), torch.tensor([len(each) for each in encoded])
    free = found.graph.holds(clean)
    packed = model.pack(clean, lengths)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 200)
    for _ in range(200):
        t = draw_positions(len(encoded), generator=generator).clamp_min(1e-3)
        sigma_bar, weight = found.schedule.sigma_bar(t)[packed.document], found.schedule.reveal(t)[packed.document]
        noised = graph.perturb(clean, sigma_bar, generator=generator, free=free)
        scores = model(noised, found.schedule.sigma_bar(t).float(), packed)
        loss = per_residue(cross_entropy(graph, scores, noised, clean, free, weight=weight.float()), free)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.eval()
    return found
