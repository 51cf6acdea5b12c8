"""The transaction: plan, apply all or nothing, prove, and undo to the very objects."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.weak import WeakIdKeyDictionary

from headway.errors import RequestError, SwapError
from headway.sites import kernel_calls, multihead, replaced, torch_calls, transformers, unseen
from headway.sites.copies import deep_copy
from headway.sites.seen import Seen, pinned, see
from headway.sites.site import Found, Site, Ticket, site_of
from headway.swap.census import Census
from headway.swap.proof import Certificate, prove
from headway.swap.selection import Selection, backends, contracts, matching
from headway.swap.spot import insist
from headway.swap.still import still

Example: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]
"""What a model is run with: its input, inputs in order (tuple, list) or by name (dict), or a function that runs it."""

KINDS: tuple[Any, ...] = (multihead, transformers, replaced, kernel_calls, torch_calls)
"""Earlier kinds go first: a module that one of them takes is not asked again."""


class Swap:
    """One swap of one model. Print it for the census; use it as a context to undo it at the end.

    `census` lists every attention; `certificate` is the proof, or None where no example was given.
    """

    def __init__(self, model: nn.Module, census: Census, certificate: Certificate | None) -> None:
        self.model, self.census, self.certificate = model, census, certificate
        self._versions = WeakIdKeyDictionary({weight: _version(weight) for weight in model.parameters()})

    def undo(self) -> None:
        """Put back the very classes that were there before; nothing else was ever changed."""
        here = [site.ticket for module in self.model.modules() if (site := site_of(module)) is not None]
        if here and not any(ticket is mine for ticket in here for mine in self.census.tickets):
            raise SwapError("got a swap that a later one has replaced; takes the later one, or headway.undo(model)")
        undo(self.model)

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        undo(self.model)

    def __str__(self) -> str:
        proof = "not proven: no example was given" if self.certificate is None else str(self.certificate)
        return "\n".join((str(self.census), proof, *self._since()))

    def _since(self) -> Iterator[str]:
        """What the model has become since it was swapped, and proven."""
        yield from (f"  {said}" for said in (gone(self.model, self.census.swapped),) if said)
        first = next(self.model.parameters(), None)
        if self.certificate is None or not self.certificate.proofs or first is None:
            return
        was = "{dtype} on {device}".format(**self.certificate.facts)
        now = f"{str(first.dtype).removeprefix('torch.')} on {first.device.type}"
        if now != was:
            yield f"  proven in {was}, now in {now}: each new kind of call is checked as it is made"
        weights = list(self.model.parameters())
        others = sum(self._versions.get(weight) != _version(weight) for weight in weights)
        if others:
            written = f"{others} of {len(weights)} parameters were written to or replaced since the proof"
            yield f"  {written}: it holds for the weights of then; swap again to prove these"


def gone(model: nn.Module, tickets: Iterable[Ticket]) -> str:
    """Which of the sites that were swapped no longer run through Headway, why, and what to do; or ''."""
    modules = dict(model.named_modules(remove_duplicate=False))
    here = {ticket.name: modules.get(ticket.name) for ticket in tickets}
    set_to = {name: transformers.set_aside(module) for name, module in here.items() if module is not None}
    out = [name for name, module in here.items() if module is None or site_of(module) is None]
    off = [name for name, other in set_to.items() if other]
    count, run = ("1 site", "runs") if len(off or out) == 1 else (f"{len(off or out)} sites", "run")
    if off:
        others = ", ".join(sorted({repr(set_to[name]) for name in off}))
        return f"{count} no longer {run} through Headway: attn_implementation was set to {others} since; swap again"
    return f"{count} no longer {run} through Headway: the swap was undone, or the modules replaced" if out else ""


def _version(weight: Tensor) -> int:
    """How often it was written to; what is made for inference does not count."""
    return 0 if weight.is_inference() else weight._version


def swap(
    model: nn.Module,
    example: Example | None = None,
    *,
    only: Selection | None = None,
    skip: Selection | None = None,
    backend: str | Mapping[str, str] = "auto",
    require: tuple[str, ...] = (),
) -> Swap:
    """Put the fastest attention that is right into `model`, prove it on `example`, and say what was done.

    - `example`: one batch, as the model is called with it: a tensor is its input, a tuple or list its inputs in order
      (`model(*example)`), a dict its inputs by name (`model(**example)`); or a function that runs it, given the model:
      `lambda model: model.generate(ids)`. Without one nothing is proven, and `certificate` is None.
    - `only`, `skip`: which sites, by glob on their names, module class or predicate of name and module
      (`lambda name, module: module.batch_first`), or several of these; each must match something.
    - `backend`: a name for all sites, or names by glob; a site whose backend refuses its calls raises.
    - `require`: contracts for every call, such as 'deterministic'.

    Parameters, names, hooks and flags stay as they are (what took an nn.MultiheadAttention's place has PyTorch's names
    while it is swapped); `undo()` gives back the very classes. A site that fails the proof is put back, and the census
    says so. A second swap replaces the first.

    >>> import torch
    >>> model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> with swap(model, torch.randn(1, 4, 16)) as swapped:
    ...     print(len(swapped.census.swapped), swapped.certificate.passed)
    1 True
    """
    _refuse(model, proven=example is not None)
    require = contracts(require)
    run = runner(example)
    by_kind = {kind.KIND: kind for kind in KINDS}
    earlier = _sites(model)
    try:
        undo(model)
        plan = _plan(model, run, only, skip, backend)
        for word, kind in by_kind.items():
            wanted = [ticket for ticket in plan.tickets if ticket.kind == word]
            if kind is not torch_calls:  # which keeps what is left alone out of the reach of what is not
                wanted = [ticket for ticket in wanted if ticket.swapped]
            if wanted:  # a kind may import what a model without it does not need
                kind.apply(model, {ticket.name: Site(ticket, require) for ticket in wanted})
        certificate = None
        if run is not None:

            def put_back(ticket: Ticket) -> None:
                by_kind[ticket.kind].restore(model, {ticket.name})
                if ticket.kind == torch_calls.KIND:
                    torch_calls.apply(model, {ticket.name: Site(ticket, require)})

            certificate = prove(model, run, plan.swapped, _as_it_was, put_back)
            if certificate.whole is not None and certificate.whole.failure:
                said = "; ".join((certificate.whole.failure, *plan.notes))
                raise SwapError(f"each site alone is proven, but not the whole model: {said}")
        for sites in _sites(model).values():
            for site in sites.values():
                site.check = insist
    except BaseException:
        undo(model)
        _put_back(model, earlier)
        raise
    return Swap(model, plan, certificate)


def inspect(
    model: nn.Module,
    example: Example | None = None,
    *,
    only: Selection | None = None,
    skip: Selection | None = None,
    backend: str | Mapping[str, str] = "auto",
) -> Census:
    """The census that a swap would make; nothing is changed."""
    _refuse(model, proven=example is not None)
    earlier = _sites(model)
    try:
        undo(model)
        return dataclasses.replace(_plan(model, runner(example), only, skip, backend), planned=True)
    finally:
        _put_back(model, earlier)


def undo(model: nn.Module) -> None:
    """Take every site of `model` out again, also of a copy, or of a model that was loaded swapped."""
    for kind in reversed(KINDS):  # what was laid over another comes off first
        kind.restore(model)


def _sites(model: nn.Module) -> dict[str, dict[str, Site]]:
    """The sites that a model has now, by kind and name."""
    sites: dict[str, dict[str, Site]] = {}
    for name, module in model.named_modules():
        site = site_of(module)
        if site is not None:
            sites.setdefault(site.ticket.kind, {})[name] = site
    return sites


def _put_back(model: nn.Module, sites: Mapping[str, Mapping[str, Site]]) -> None:
    for kind in KINDS:
        if kind.KIND in sites:
            kind.apply(model, sites[kind.KIND])


def _as_it_was(model: nn.Module) -> None:
    """Make a copy of a swapped model what it was, as it was meant."""
    replaced.settle(model)
    undo(model)
    multihead.set_meant(model)


def as_meant(model: nn.Module) -> None:
    """Make a copy of a model that is not swapped do what it means, where it would do something else or raise.

    Wrapped projections, which PyTorch would not call or fail on, are called; what took a module's place is that module.
    """
    replaced.turn_back(model)
    multihead.set_meant(model)


def runner(example: Example | None) -> Callable[[nn.Module], Any] | None:
    """A function that runs a model with the example."""
    if isinstance(example, str | bytes | Iterator | DataLoader | Dataset):
        raise RequestError(
            f"got a {type(example).__name__} as the example, takes one batch as the model is called with it: a tensor,"
            " a tuple (its inputs in order), a dict (by name), or a function that runs it: lambda model: ...;"
            " of a loader the first, next(iter(loader)), without what is no input"
        )
    if example is None or (callable(example) and not isinstance(example, nn.Module)):
        return example
    # Copies, as a model may write to its inputs.
    if isinstance(example, Mapping):
        return lambda model: model(**pinned(dict(example)))
    if isinstance(example, tuple | list):
        return lambda model: model(*pinned(list(example)))
    return lambda model: model(pinned(example))


def _plan(
    model: nn.Module,
    run: Callable[[nn.Module], Any] | None,
    only: Selection | None,
    skip: Selection | None,
    backend: str | Mapping[str, str],
) -> Census:
    """The census as it will be, from the model as it is."""
    seen = None
    if run is not None:
        looked_at = deep_copy(model)  # a run may change more than it can be asked to put back
        as_meant(looked_at)
        kernels = kernel_calls.watch(looked_at)
        with torch.inference_mode(False), still(looked_at), _with_reasons(model):
            seen = see(looked_at, run)
        seen.kernels = kernels
    found = list(_found(model, seen))
    left = (*_by_hand(found, seen), *_unseen(found, seen))
    chosen = {site.name for site in found} if only is None else matching(only, found, "only", left)
    skipped = set() if skip is None else matching(skip, found, "skip", left)
    asked = backends(backend, found)
    tickets = []
    for site in found:
        because = site.because
        if not because and seen is not None and not seen.ran & {site.name, *site.aliases}:
            because = "it did not run with the example, so nothing about it could be proven"
        if site.name not in chosen or site.name in skipped:
            because = "it is left out by only= or skip="
        tickets.append(Ticket(site.name, site.kind, asked[site.name], because, site.aliases))
    return Census(
        type(model).__name__,
        (*tickets, *left),
        (
            *(*multihead.notes(model), *replaced.notes(found), *kernel_calls.notes(model)),
            *(*transformers.notes(found), *unseen.notes(), *_notes(seen)),
        ),
    )


def _found(model: nn.Module, seen: Seen | None) -> Iterator[Found]:
    taken: set[str] = set()
    for kind in KINDS:
        for site in kind.find(model, seen):
            if not taken & {site.name, *site.aliases}:
                yield site
            if not site.because:
                taken |= {site.name, *site.aliases}


@contextlib.contextmanager
def _with_reasons(model: nn.Module) -> Iterator[None]:
    """A model that does not run inside says so, where it may be for what took an attention's place and stays there."""
    try:
        yield
    except Exception as error:
        left = [f"{site.name or 'the model'}: {site.because}" for site in replaced.find(model, None) if site.because]
        if not left:
            raise
        raise SwapError(
            f"the model does not run with the example ({type(error).__name__}: {error}), and what took an"
            f" nn.MultiheadAttention's place could not be turned back: {'; '.join(left)}"
        ) from error


def _by_hand(found: list[Found], seen: Seen | None) -> Iterator[Ticket]:
    names = {name for site in found for name in (site.name, *site.aliases)}
    for (name, at), size in ({} if seen is None else seen.by_hand).items():
        if name not in names:
            saves = f"a call of headway.attention there would not write {_in_bytes(size)} of weights"
            yield Ticket(name, "softmax(q kᵀ) v", because=f"it is written by hand at {at}; {saves}")


def _unseen(found: list[Found], seen: Seen | None) -> Iterator[Ticket]:
    names = {name for site in found for name in (site.name, *site.aliases)}
    by_hand = () if seen is None else (name for name, _ in seen.by_hand)  # which is told with its line
    for name, said in ({} if seen is None else seen.unseen).items():
        if name not in names.union(by_hand):
            yield Ticket(name, said.partition(",")[0], because=f"it calls {said}; no kind of site redirects that")


def _in_bytes(size: int) -> str:
    return next(
        f"{size / 2**n:.3g} {unit}" for n, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "B")) if size >> n
    )


def _notes(seen: Seen | None) -> tuple[str, ...]:
    if seen is not None:
        return ()
    return ("calls of F.scaled_dot_product_attention and attention written by hand are found only with example=",)


def _refuse(model: nn.Module, *, proven: bool) -> None:
    """Models that cannot be changed from outside, or not proven, with what to do instead."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise SwapError(
            f"got {got}, takes a model: an nn.Module in Python, made already, and neither scripted nor traced"
        )
    if proven and any(parameter.is_meta for parameter in model.parameters()):
        raise SwapError(
            "got an example for a model on the meta device, whose parameters hold no numbers that could prove anything;"
            " takes it without example=, or with its weights"
        )
    name = type(model).__name__
    inner = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}.get(name)
    if inner is not None:
        verb = {"OptimizedModule": "torch.compile it", "DataParallel": "wrap it"}.get(name, "wrap it")
        raise SwapError(f"got a {name}, takes the model inside: swap(model.{inner}), or swap first and {verb} then")
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise SwapError(
                f"got {path or 'a model'} wrapped in FullyShardedDataParallel, whose parameters are flattened;"
                " takes a model that is not wrapped yet: swap first and wrap then (or use fully_shard)"
            )
        if type(module).__name__ == "OptimizedModule":
            raise SwapError(f"got {path} compiled by torch.compile, takes it as it was: swap first and compile then")
