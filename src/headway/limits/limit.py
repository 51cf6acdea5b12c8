"""Limits: each says one thing a backend takes, and refuses the rest as got / takes / remedy."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

from headway.limits.machine import Machine
from headway.limits.request import Request, mask_words


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

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        """The refusal, or None if this limit has nothing against the request."""


# -- the machine ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Devices:
    """Kinds of device the kernel exists for."""

    kinds: tuple[str, ...]
    topic = "devices"

    @property
    def takes(self) -> str:
        return ", ".join(self.kinds)

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if machine.device in self.kinds:
            return None
        return Refusal(
            f"{machine.device} tensors", self.takes, f"move q, k and v to {self.kinds[0]}", machine_wide=True
        )


@dataclasses.dataclass(frozen=True)
class Capability:
    """NVIDIA compute capabilities the kernel was built for."""

    at_least: tuple[int, int]
    below: tuple[int, int] | None = None
    topic = "capability"

    @property
    def takes(self) -> str:
        low = f"cuda {self.at_least[0]}.{self.at_least[1]}"
        return f"{low} or newer" if self.below is None else f"{low} to before {self.below[0]}.{self.below[1]}"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        got = machine.capability
        if got is None or (got >= self.at_least and (self.below is None or got < self.below)):
            return None
        word = "an older" if got < self.at_least else "a newer"
        return Refusal(f"cuda {got[0]}.{got[1]}", self.takes, f"use {word} kernel", machine_wide=True)


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something this build of torch must have."""

    name: str
    remedy: str
    only_on: str | None = None
    topic = "needs"

    @property
    def takes(self) -> str:
        return f"a torch with {self.name.lstrip('_')}" + (f" on {self.only_on}" if self.only_on else "")

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if self.name in machine.features or (self.only_on is not None and machine.device != self.only_on):
            return None
        version = dict(machine.versions).get("torch", "this torch")
        return Refusal(f"torch {version} without it", self.takes, self.remedy, machine_wide=True)


@dataclasses.dataclass(frozen=True)
class NeedsPackage:
    """A distribution that must be installed and must have run."""

    distribution: str
    topic = "needs"

    @property
    def takes(self) -> str:
        return f"the package {self.distribution}"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        package = machine.package(self.distribution)
        if package.runs:
            return None
        if package.version is None:
            return Refusal("no such package", self.takes, f"pip install {self.distribution}", machine_wide=True)
        got = f"{self.distribution} {package.version}, which does not run: {package.broken}"
        return Refusal(
            got, "one that runs", f"reinstall {self.distribution} for this torch and CUDA", machine_wide=True
        )


# -- shapes and types -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DTypes:
    """Number formats of q, k and v."""

    names: tuple[str, ...]
    topic = "dtypes"

    @property
    def takes(self) -> str:
        return " or ".join(self.names)

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if request.dtype in self.names:
            return None
        return Refusal(request.dtype, self.takes, f"cast q, k and v to {self.names[-1]}")


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

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        sizes = (request.head_dim, request.value_dim)
        if not self.values_differ and sizes[0] != sizes[1]:
            smaller = "v" if sizes[1] < sizes[0] else "q and k"
            remedy = f"pad {smaller} to {max(sizes)}, keep the scale, cut the result to {sizes[1]}"
            return Refusal(f"head_dim {sizes[0]} with values of {sizes[1]}", self.takes, remedy)
        for size in sizes:
            if (
                size % self.multiple_of == 0
                and self.at_least <= size
                and (self.at_most is None or size <= self.at_most)
            ):
                continue
            padded = max(-(-size // self.multiple_of) * self.multiple_of, self.at_least)
            fits = self.at_most is None or padded <= self.at_most
            remedy = f"pad to {padded}, keep the scale" if fits else "choose a backend for large heads"
            return Refusal(f"head_dim {size}", self.takes, remedy)
        return None


@dataclasses.dataclass(frozen=True)
class EqualHeads:
    """The kernel cannot let several query heads share one key head."""

    topic = "gqa"
    takes = "as many key heads as query heads"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if request.heads == request.kv_heads:
            return None
        ratio = request.heads // request.kv_heads
        remedy = f"repeat k and v: k.repeat_interleave({ratio}, dim=1)"
        return Refusal(f"heads {request.heads}:{request.kv_heads}", self.takes, remedy)


@dataclasses.dataclass(frozen=True)
class NotOneByOne:
    """cuDNN has no kernel for one query against one key."""

    topic = "lengths"
    takes = "more than one query or key"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if (request.q_len, request.kv_len) != (1, 1):
            return None
        return Refusal("1 query and 1 key", self.takes, "use another backend; the answer is v")


@dataclasses.dataclass(frozen=True)
class PlainScale:
    """Kernels that scale after taking the row's maximum go wrong on a scale of 0 or less."""

    topic = "scale"
    takes = "a positive, finite scale"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if request.plain_scale:
            return None
        return Refusal("a scale that is not", self.takes, "multiply q by it and pass scale=1.0")


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
        known = [*(() if self.needs else ("none",)), *(mask_words(kinds) for kinds in self.native)]
        return ", ".join(known) + (", any other as a dense tensor" if self.dense else "")

    def is_native(self, kinds: frozenset[str]) -> bool:
        if self.needs and not kinds & set(self.needs):
            return False
        return not kinds or any(kinds <= known for known in self.native)

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if self.dense or self.is_native(request.mask):
            return None
        return Refusal(
            f"mask {mask_words(request.mask)}", self.takes, "choose a backend that takes dense masks, or flex"
        )


@dataclasses.dataclass(frozen=True)
class NoEmptyRows:
    """The kernel's answer for a query that sees nothing is not zero."""

    topic = "empty rows"
    takes = "masks in which each query surely sees a key"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if not request.rows_may_be_empty:
            return None
        return Refusal("rows that may see nothing", self.takes, "let each query see one key, then zero those rows")


# -- options and gradients ------------------------------------------------------------------------------------------

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

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if request.dropout and not self.dropout:
            return Refusal("dropout", self.takes, "pass dropout=0.0, or choose a backend that drops")
        if request.softcap and not self.softcap:
            return Refusal("softcap", self.takes, "choose flex, flash2, flash3, flash4 or reference")
        for word, asked in (("sinks", request.sinks), ("lse", request.returns_lse)):
            support: Support = getattr(self, word)
            if asked and (support == "no" or (support == "forward" and request.needs_grad)):
                got = f"{word} with gradients" if support == "forward" else word
                return Refusal(got, self.takes, "choose flex or reference")
        if request.returns_lse and request.rows_may_be_empty and not self.lse_of_empty_rows:
            return Refusal(
                "lse of rows that may see nothing", "lse where each query sees a key", "choose flex or reference"
            )
        return None


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
        where = f" on {', '.join(self.only_on)}" if self.only_on else ""
        return ("gradients of q, k, v and bias" if self.mask else "gradients of q, k and v") + where

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        here = self.inputs and (self.only_on is None or machine.device in self.only_on)
        if request.needs_grad and not here:
            return Refusal("gradients on", self.takes, "wrap the call in torch.no_grad() if none are wanted")
        if request.mask_needs_grad and not self.mask:
            return Refusal("a mask with gradient", self.takes, "detach the bias, or choose flex or reference")
        return None


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

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        if request.transformed and not self.func:
            return Refusal("a torch.func transform", self.takes, "fold the mapped axis into the batch")
        if request.compiled and not self.compile:
            return Refusal("a call inside torch.compile", self.takes, "call it outside the compiled region")
        return None


@dataclasses.dataclass(frozen=True)
class Contracts:
    """Words of `require=` that the backend can promise."""

    keeps: frozenset[str]
    topic = "contracts"

    @property
    def takes(self) -> str:
        return ", ".join(sorted(self.keeps)) or "none"

    def refuses(self, request: Request, machine: Machine) -> Refusal | None:
        for word in sorted(request.require - self.keeps):
            if word == "deterministic" and not request.needs_grad:
                continue  # what varies from run to run is the order of sums in a backward pass
            remedy = f"drop require={word!r}, or choose reference"
            return Refusal(f"require {word}", f"require {self.takes}", remedy)
        if "float32" in request.require and request.dtype not in ("float32", "float64"):
            return Refusal(f"require float32 with {request.dtype}", "float32 or float64", "cast q, k and v to float32")
        return None
