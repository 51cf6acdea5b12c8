"""New proteins: lengths or templates in, letters out, several proteins a call of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway import RequestError, UnknownNameError
from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.diffusion.samplers import Analytic, Euler, FirstHitting, Sampler, Stepped
from headway_apps.proteins.generate.templates import Template
from headway_apps.proteins.model.evaluated import evaluated

if TYPE_CHECKING:
    from headway_apps.proteins.trained import Trained

Drawn = FirstHitting | Stepped
SAMPLERS: dict[str, type[Drawn]] = {"first-hitting": FirstHitting, "euler": Euler, "analytic": Analytic}
TOKENS = 16_384
"""In one call of the network, if not asked otherwise; a longer protein is alone in its call."""


@dataclasses.dataclass(frozen=True)
class Generated:
    proteins: list[str]
    """In the order asked for."""
    calls: int
    """How often the network was asked."""


def named(sampler: str, steps: int | None = None) -> Drawn:
    """A sampler by its name, in so many steps."""
    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", sampler, tuple(SAMPLERS))
    kind = SAMPLERS[sampler]
    return kind() if steps is None else kind(steps)


def generate(
    trained: Trained,
    wanted: Sequence[int] | Sequence[Template],
    *,
    sampler: str = "first-hitting",
    steps: int | None = None,
    seed: int = 0,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> Generated:
    """One protein for each length or template, of the twenty residues alone, drawn where the model is.

    The same arguments give the same proteins, in float32 on the same kind of device. Another `tokens`, the budget of a
    call, gives others that are as likely: proteins in one batch share the seed's random numbers. Neither the process's
    random state nor what is in training mode changes.
    """
    walker = named(sampler, steps)
    if not 0 <= seed < 2**63:
        raise RequestError(f"got the seed {seed}, takes 0 to 2**63 - 1")
    if tokens < 1:
        raise RequestError(f"got a budget of {tokens} tokens, takes 1 or more")
    templates = [each if isinstance(each, Template) else Template.of_length(each) for each in wanted]
    if not templates:
        raise RequestError("got no length and no template, takes one or more")
    batches = _batches(templates, tokens)
    told = _Told(progress, sum(_calls(walker, [templates[at] for at in batch]) for batch in batches))
    generator = torch.Generator().manual_seed(seed)
    device = trained.model.device
    proteins = [""] * len(templates)
    with evaluated(trained.model), torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
        for batch in batches:
            drawn = _draw(trained, [templates[at] for at in batch], walker, generator, device, told)
            for at, protein in zip(batch, drawn, strict=True):
                proteins[at] = protein
    return Generated(proteins, told.calls)


def _batches(templates: Sequence[Template], tokens: int) -> list[list[int]]:
    """Places of templates, with as much to draw in each batch: first-hitting calls for the one with most."""
    batches: list[list[int]] = []
    room = 0
    for at in sorted(range(len(templates)), key=lambda at: (templates[at].free, len(templates[at].sites))):
        needed = len(templates[at].sites) + 2
        if not batches or needed > room:
            batches.append([])
            room = tokens
        batches[-1].append(at)
        room -= needed
    return batches


def _calls(sampler: Drawn, batch: Sequence[Template]) -> int:
    longest = max(each.free for each in batch)
    return sampler.calls(longest) if isinstance(sampler, FirstHitting) else sampler.steps + 1


@dataclasses.dataclass
class _Told:
    """Counts calls, and tells of each."""

    progress: Callable[[str, int, int | None], None]
    expected: int
    calls: int = 0

    def another(self) -> None:
        self.calls += 1
        self.progress("network calls", self.calls, self.expected)


def _draw(
    trained: Trained,
    templates: Sequence[Template],
    sampler: Sampler,
    generator: torch.Generator,
    device: torch.device,
    told: _Told,
) -> list[str]:
    encoded = [each.encode(trained.alphabet) for each in templates]
    tokens = torch.tensor([id for ids, _ in encoded for id in ids], device=device)
    free = torch.tensor([each for _, sites in encoded for each in sites], device=device)
    lengths = torch.tensor([len(ids) for ids, _ in encoded])  # on the host, where the model reads them
    packed = trained.model.pack(tokens, lengths)  # once for all calls

    def model(tokens: Tensor, sigma_bar: Tensor, _: Tensor | None) -> Tensor:
        told.another()
        return trained.model(tokens, sigma_bar, packed)  # type: ignore[no-any-return]

    samples = sampler.sample(
        model,
        trained.graph,
        trained.schedule,
        tokens,
        lengths,
        generator=generator,
        free=free,
        allowed=trained.alphabet.residues,
    )
    proteins = [trained.alphabet.decode(ids.tolist()) for ids in samples.tokens.cpu().split(lengths.tolist())]
    for template, protein in zip(templates, proteins, strict=True):
        assert set(protein) <= set(STANDARD), f"a sampler made {protein}"
        assert template.fits(protein), f"a sampler made {protein} of {template.sites}"
    return proteins
