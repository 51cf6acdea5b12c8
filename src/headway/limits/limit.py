"""Limits: each says one thing a backend takes, and refuses the rest as got / takes / remedy.

A remedy is something to do to the very call that was refused, with its own numbers; where no change to the call
keeps its answer, the remedy is another backend, and the decision names those that take the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol

from headway.limits.machine import Machine, dotted
from headway.limits.request import Request, mask_words

ANOTHER = "choose another backend"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a backend does not take a request.

    >>> print(Refusal(got="head_dim 76", takes="multiples of 8 up to 256", remedy="pad to 80, keep the scale"))
    got head_dim 76, takes multiples of 8 up to 256; pad to 80, keep the scale
    """

    got: str
    takes: str
    remedy: str
    machine_wide: bool = False
    """True if no request could change it: it is a fact about the machine."""

    def __str__(self) -> str:
        return f"got {self.got}, takes {self.takes}; {self.remedy}"


class Limit(Protocol):
    """One thing a backend takes."""

    topic: str
    """Column of the support table."""

    @property
    def takes(self) -> str:
        """The limit in words, as the support table prints it."""

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        """All that this limit has against the request."""


# -- the machine ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Devices:
    """Kinds of device the kernel exists for."""

    kinds: tuple[str, ...]
    topic = "devices"

    @property
    def takes(self) -> str:
        return " or ".join(self.kinds)

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if machine.device not in self.kinds:
            remedy = f"move q, k and v to {self.kinds[0]}"
            yield Refusal(f"{machine.device} tensors", self.takes, remedy, machine_wide=True)


@dataclasses.dataclass(frozen=True)
class Capability:
    """NVIDIA compute capabilities the kernel was built for."""

    at_least: tuple[int, int]
    below: tuple[int, int] | None = None
    topic = "capability"

    @property
    def takes(self) -> str:
        low = f"cuda {dotted(self.at_least)}"
        return f"{low} or newer" if self.below is None else f"{low} to before {dotted(self.below)}"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        got = machine.capability
        if got is None or within(got, self.at_least, self.below):
            return
        remedy = f"choose a backend for {'older' if got < self.at_least else 'newer'} GPUs"
        yield Refusal(machine.kind, self.takes, remedy, machine_wide=True)


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something this build of torch, or the machine around it, must have."""

    name: str
    remedy: str
    only_on: str | None = None
    topic = "needs"

    @property
    def takes(self) -> str:
        return _feature(self.name) + (f" on {self.only_on}" if self.only_on else "")

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if self.name not in machine.features and self.only_on in (None, machine.device):
            where = "this machine" if self.name in _TOOLS else f"torch {machine.version('torch') or ''}".rstrip()
            yield Refusal(f"{where} without it", _feature(self.name), self.remedy, machine_wide=True)


_TOOLS = {"triton": "triton", "c++": "a C++ compiler"}
_PARTS = {"flex": "flex attention", "varlen": "varlen attention"}


def _feature(name: str) -> str:
    return _TOOLS.get(name) or f"a torch with {_PARTS.get(name, name.lstrip('_'))}"


@dataclasses.dataclass(frozen=True)
class NeedsPackage:
    """A distribution that must be installed and must have run."""

    distribution: str
    topic = "needs"

    @property
    def takes(self) -> str:
        return f"the package {self.distribution}"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        package = machine.package(self.distribution)
        if package.version is None:
            yield Refusal("no such package", self.takes, f"pip install {self.distribution}", machine_wide=True)
        elif package.broken is not None:
            got = f"{self.distribution} {package.version}, which does not run: {package.broken}"
            remedy = f"reinstall {self.distribution} for this torch and CUDA, then run `headway doctor`"
            yield Refusal(got, "one that runs", remedy, machine_wide=True)


# -- shapes and types -----------------------------------------------------------------------------------------------

BFLOAT16_SINCE = (8, 0)


@dataclasses.dataclass(frozen=True)
class DTypes:
    """Number formats of q, k and v, the narrowest first."""

    names: tuple[str, ...]
    topic = "dtypes"

    @property
    def takes(self) -> str:
        return " or ".join(self.names)

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        here = self.here(machine)
        if request.dtype in here:
            return
        takes = " or ".join(here) + (f" on {machine.kind}" if here != self.names else "")
        yield Refusal(request.dtype, takes, f"cast q, k and v to {here[-1]}, and the result back")

    def here(self, machine: Machine) -> tuple[str, ...]:
        """Without bfloat16 on NVIDIA's GPUs that cannot compute in it; no kernel here emulates it."""
        if machine.capability is None or machine.capability >= BFLOAT16_SINCE:
            return self.names
        return tuple(name for name in self.names if name != "bfloat16")


@dataclasses.dataclass(frozen=True)
class HeadDim:
    """Sizes of one head; `values_differ` if values may have another size than queries and keys."""

    multiple_of: int = 1
    at_most: int | None = None
    at_least: int = 1
    values_differ: bool = True
    topic = "head_dim"

    @property
    def takes(self) -> str:
        sizes = f"multiples of {self.multiple_of}" if self.multiple_of > 1 else "any"
        low = f" from {self.at_least}" if self.at_least > 1 else ""
        high = f" up to {self.at_most}" if self.at_most is not None else ""
        return sizes + low + high + ("" if self.values_differ else ", the same for values")

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        sizes = (request.head_dim, request.value_dim)
        wanted = (self._padded(sizes[0]), self._padded(sizes[1]))
        if not self.values_differ:
            wanted = (max(wanted), max(wanted))
        if sizes != wanted or any(not self._fits(size) for size in sizes):
            got = f"head_dim {sizes[0]}" + (f" with values of {sizes[1]}" if sizes[0] != sizes[1] else "")
            remedy = pad_heads(request, wanted) if all(map(self._fits, wanted)) else ANOTHER
            yield Refusal(got, self.takes, remedy)

    def _fits(self, size: int) -> bool:
        return self.at_most is None or size <= self.at_most

    def _padded(self, size: int) -> int:
        """The smallest size not below this one that is neither odd nor too small."""
        return -(-max(size, self.at_least) // self.multiple_of) * self.multiple_of


def pad_heads(request: Request, wanted: tuple[int, int]) -> str:
    """How to give q and k, and v, heads of the wanted sizes without changing the answer.

    >>> pad_heads(Request(head_dim=76, value_dim=76), (80, 80))
    'pad q, k and v to 80, keep the scale (76**-0.5 by default), cut the result to 76'
    >>> pad_heads(Request(head_dim=64, value_dim=20), (64, 24))
    'pad v to 24, cut the result to 20'
    """
    steps = []
    longer = [name for name, size, to in _sizes(request, wanted) if size != to]
    if longer == ["q and k", "v"] and wanted[0] == wanted[1]:
        steps.append(f"pad q, k and v to {wanted[0]}")
    else:
        steps += [f"pad {name} to {to}" for name, size, to in _sizes(request, wanted) if size != to]
    if "q and k" in longer:
        steps.append(f"keep the scale ({request.head_dim}**-0.5 by default)")
    if "v" in longer:
        steps.append(f"cut the result to {request.value_dim}")
    return ", ".join(steps)


def _sizes(request: Request, wanted: tuple[int, int]) -> tuple[tuple[str, int, int], ...]:
    return ("q and k", request.head_dim, wanted[0]), ("v", request.value_dim, wanted[1])


@dataclasses.dataclass(frozen=True)
class LargeHeads:
    """Heads over a size that only some of NVIDIA's GPUs have the memory for."""

    over: int
    at_least: tuple[int, int]
    below: tuple[int, int]
    topic = "head_dim"

    @property
    def takes(self) -> str:
        return f"over {self.over} on cuda {dotted(self.at_least)} to before {dotted(self.below)}"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        size = max(request.head_dim, request.value_dim)
        if size <= self.over or machine.capability is None or within(machine.capability, self.at_least, self.below):
            return
        yield Refusal(f"head_dim {size} on {machine.kind}", f"up to {self.over} there", ANOTHER)


@dataclasses.dataclass(frozen=True)
class Flash2Training:
    """FlashAttention 2's backward pass keeps more in shared memory than GPUs for desks and edges have."""

    topic = "head_dim"
    takes = "193 to 224 (to 256 with dropout) for gradients not on cuda 8.6 to 8.9 and 12"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        got = machine.capability
        small = got is not None and (within(got, (8, 6), (9, 0)) or within(got, (12, 0), (13, 0)))
        most = 256 if request.dropout else 224
        if not (small and request.needs_grad and 192 < request.head_dim <= most):
            return
        if request.dropout:
            dropped = f"head_dim {request.head_dim} with gradients and dropout on {machine.kind}"
            yield Refusal(dropped, "up to 192 there", ANOTHER)
        else:
            size = f"head_dim {request.head_dim} with gradients on {machine.kind}"
            yield Refusal(size, "up to 192, or 225 to 256, there", pad_heads(request, (232, 232)))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Kernels that lay the batch along an axis of the GPU's grid that ends at 65,535."""

    at_most: int = 65535
    topic = "batch"

    @property
    def takes(self) -> str:
        return f"up to {self.at_most}"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if request.batch > self.at_most:
            parts = -(-request.batch // self.at_most)
            yield Refusal(f"batch {request.batch}", self.takes, f"split the batch in {parts} and join the results")


@dataclasses.dataclass(frozen=True)
class NotOneByOne:
    """cuDNN has no kernel for one query against one key."""

    topic = "lengths"
    takes = "more than one query or key"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if (request.q_len, request.kv_len) == (1, 1):
            yield Refusal("1 query and 1 key", self.takes, ANOTHER)


@dataclasses.dataclass(frozen=True)
class PlainScale:
    """Kernels that scale after taking the row's maximum go wrong on a scale of 0 or less."""

    topic = "scale"
    takes = "a positive, finite scale"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if not request.plain_scale:
            got = "a scale of 0 or less, or not finite"
            yield Refusal(got, self.takes, "multiply q by the scale and pass scale=1.0")


# -- masks ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Masks:
    """Combinations of mask terms the kernel knows, and whether any other may become a tensor for it."""

    native: tuple[frozenset[str], ...] = ()
    """Sets of terms the kernel takes as they are, each with all of its subsets."""
    needs: tuple[str, ...] = ()
    """Terms of which one must be there, for kernels that do nothing else."""
    dense: bool = False
    topic = "masks"

    @property
    def takes(self) -> str:
        known = [*(() if self.needs else ("none",)), *map(_kinds, self.native)]
        return ", ".join(known) + (", any other as a dense tensor" if self.dense else "")

    def is_native(self, kinds: frozenset[str]) -> bool:
        if self.needs and not kinds & set(self.needs):
            return False
        return not kinds or any(kinds <= known for known in self.native)

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if self.dense or self.is_native(request.mask):
            return
        held = request.mask & {"dense", "bias"}
        remedy = f"give its tensor to headway.recognise, which may find a typed mask in it, or {ANOTHER}"
        yield Refusal(f"mask {mask_words(request.mask)}", self._takes(request.mask), remedy if held else ANOTHER)

    def _takes(self, kinds: frozenset[str]) -> str:
        """As little as tells what is wrong with these."""
        known = frozenset().union(*self.native)
        if kinds - known:
            return f"masks without {' or '.join(sorted(kinds - known))}"
        if self.needs and not kinds & set(self.needs):
            return f"masks with {' or '.join(self.needs)}"
        return self.takes


def _kinds(kinds: frozenset[str]) -> str:
    return mask_words(kinds) if len(kinds) < MANY else f"any combination of {', '.join(sorted(kinds))}"


MANY = 5
"""From so many terms on, a set is said to be what it is, a choice and not a conjunction."""


# -- options and gradients ------------------------------------------------------------------------------------------

NO_GRAD = "wrap the call in torch.no_grad() if no gradient is wanted"

Support = Literal["no", "forward", "yes"]
"""'forward' is: as long as no gradient has to flow through it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Extras of a call the kernel can do."""

    dropout: bool = False
    softcap: bool = False
    sinks: Support = "no"
    lse: Support = "no"
    lse_of_empty_rows: bool = False
    topic = "options"

    @property
    def takes(self) -> str:
        words = [word for word in ("dropout", "softcap") if getattr(self, word)]
        for word in ("sinks", "lse"):
            support: Support = getattr(self, word)
            if support != "no":
                words.append(word if support == "yes" else f"{word} without gradients")
        return ", ".join(words) or "none"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        takes = "no options" if self.takes == "none" else f"only {self.takes}"
        if request.dropout and not self.dropout:
            yield Refusal("dropout", takes, f"pass dropout=0.0 if none is wanted, as in evaluation, or {ANOTHER}")
        if request.softcap and not self.softcap:
            yield Refusal("softcap", takes, ANOTHER)
        for word, asked in (("sinks", request.sinks), ("lse", request.returns_lse)):
            support: Support = getattr(self, word)
            if asked and support == "no":
                yield Refusal(word, takes, ANOTHER)
            elif asked and support == "forward" and request.needs_grad:
                yield Refusal(f"{word} with gradients", takes, NO_GRAD)
        if self._misses_empty_rows(request):
            yield Refusal("lse of rows that may see nothing", "lse where each query surely sees a key", ANOTHER)

    def _misses_empty_rows(self, request: Request) -> bool:
        told = self.lse != "no" and request.returns_lse
        return told and request.rows_may_be_empty and not self.lse_of_empty_rows


@dataclasses.dataclass(frozen=True)
class Backward:
    """Which gradients the kernel has."""

    inputs: bool = True
    mask: bool = False
    only_on: tuple[str, ...] | None = None
    topic = "backward"

    @property
    def takes(self) -> str:
        if not self.inputs:
            return "calls without gradients"
        where = f" on {' or '.join(self.only_on)}" if self.only_on else ""
        return ("gradients of q, k, v and bias" if self.mask else "gradients of q, k and v") + where

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if request.needs_grad and not self.here(machine):
            yield Refusal("gradients on", self.takes, NO_GRAD)
        if request.mask_needs_grad and not self.mask:
            remedy = f"detach the mask's tensor if its gradient is not wanted, or {ANOTHER}"
            yield Refusal("a mask with gradient", self.takes, remedy)

    def here(self, machine: Machine) -> bool:
        """Whether there is a backward pass on that machine's device."""
        return self.inputs and (self.only_on is None or machine.device in self.only_on)


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Whether torch.func transforms pass through, and whether torch.compile can trace the call."""

    func: bool = False
    compile: bool = True
    topic = "transforms"

    @property
    def takes(self) -> str:
        words = ["eager calls", *(["torch.compile"] if self.compile else []), *(["torch.func"] if self.func else [])]
        return ", ".join(words)

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        if request.transformed and not self.func:
            remedy = "fold vmap's axis into the batch, and take gradients by torch.autograd"
            yield Refusal("a torch.func transform", self.takes, remedy)
        if request.compiled and not self.compile:
            remedy = "keep the call out of the graph by torch.compiler.disable"
            yield Refusal("a call inside torch.compile", self.takes, remedy)


@dataclasses.dataclass(frozen=True)
class Contracts:
    """Words of `require=` that the backend can promise."""

    keeps: frozenset[str]
    topic = "contracts"

    @property
    def takes(self) -> str:
        return ", ".join(sorted(self.keeps)) or "none"

    def refusals(self, request: Request, machine: Machine) -> Iterator[Refusal]:
        takes = f"only {self.takes}" if self.keeps else "no contracts"
        for word in sorted(request.require - self.keeps):
            # What varies from run to run is the order of sums in a backward pass.
            if word != "deterministic" or request.needs_grad:
                yield Refusal(f"require {word}", takes, f"drop {word!r} from require if it may be broken, or {ANOTHER}")
        if machine.deterministic and request.needs_grad and not {"deterministic"} & (self.keeps | request.require):
            off = f"call torch.use_deterministic_algorithms(False) if runs may differ, or {ANOTHER}"
            yield Refusal("torch.use_deterministic_algorithms(True)", takes, off)
        if "float32" in request.require and request.dtype not in ("float32", "float64"):
            cast = "cast q, k and v to float32, and the result back"
            yield Refusal(f"require float32 with {request.dtype}", "float32 or float64", cast)


def within(capability: tuple[int, int], at_least: tuple[int, int], below: tuple[int, int] | None) -> bool:
    return at_least <= capability and (below is None or capability < below)
