"""Every backend and what it takes, as data. Imports no kernel: an entry is loaded when it is first used."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import cast

from headway.backends.kernel import Kernel
from headway.errors import UnknownNameError
from headway.limits.limit import (
    Backward,
    Batch,
    Capability,
    Contracts,
    Devices,
    DTypes,
    Feature,
    Flash2Training,
    HeadDim,
    LargeHeads,
    Limit,
    Masks,
    NeedsPackage,
    NotOneByOne,
    Options,
    PlainScale,
    Transforms,
)

HALF = ("float16", "bfloat16")
FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Backend:
    """One kernel family: where it lives and what it takes."""

    name: str
    entry: str
    limits: tuple[Limit, ...]
    masks: Masks
    package: str | None = None
    exact: bool = True
    """False for kernels that approximate: auto never chooses them."""
    best_on: tuple[tuple[int, int], tuple[int, int]] | None = None
    """NVIDIA GPUs, from the first up to before the second, that the kernel is tuned for; elsewhere others go first."""
    summary: str = ""

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        needs = (NeedsPackage(self.package),) if self.package else ()
        return (*self.limits[:2], *needs, *self.limits[2:], self.masks)

    def load(self) -> Kernel:
        return _load(self.entry)


@functools.cache
def _load(entry: str) -> Kernel:
    return cast(Kernel, importlib.import_module(entry))


def _kinds(*words: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(word.split(" & ")) for word in words)


FLASH_BANDS = _kinds("causal", "window", "causal-lower-right", "window-lower-right")
FLASH_MASKS = (*FLASH_BANDS, *_kinds("documents & causal", "documents & window", "documents-cross"))
FLASH2_MASKS = (
    *FLASH_MASKS,
    *(kinds | {"alibi", "alibi-lower-right"} for kinds in FLASH_MASKS if "documents-cross" not in kinds),
)  # distances are counted within each document, which over two packings is no longer the mask's distance
ALL_CONTRACTS = frozenset({"deterministic", "double-backward", "float32", "fullgraph", "no-sync"})

REFERENCE = Backend(
    name="reference",
    entry="headway.backends.reference",
    summary="plain PyTorch; takes every call, slowly",
    limits=(
        Options(dropout=True, softcap=True, sinks="yes", lse="yes", lse_of_empty_rows=True),
        Backward(mask=True),
        Transforms(func=True),
        Contracts(ALL_CONTRACTS | {"maps"}),
    ),
    masks=Masks(dense=True),
)

SDPA_MATH = Backend(
    name="sdpa-math",
    entry="headway.backends.sdpa_math",
    summary="PyTorch's composite attention",
    limits=(
        Feature("_scaled_dot_product_attention_math", "update torch"),
        Options(dropout=True, sinks="yes"),
        Backward(mask=True),
        Transforms(func=True),
        Contracts(ALL_CONTRACTS),
    ),
    masks=Masks(dense=True),
)

SDPA_FLASH_CPU = Backend(
    name="sdpa-flash",
    entry="headway.backends.sdpa_flash",
    summary="FlashAttention inside PyTorch, for CPU",
    limits=(
        Devices(("cpu",)),
        Feature("_scaled_dot_product_flash_attention_for_cpu", "update torch"),
        DTypes((*FLOATS, "float64")),
        HeadDim(values_differ=False),
        PlainScale(),
        Options(sinks="forward", lse="forward"),
        Backward(),
        Transforms(),
        Contracts(frozenset({"deterministic", "float32", "fullgraph", "no-sync"})),
    ),
    masks=Masks(native=_kinds("causal"), dense=True),
)

SDPA_FLASH_CUDA = Backend(
    name="sdpa-flash",
    entry="headway.backends.sdpa_flash",
    summary="FlashAttention 2 inside PyTorch, for CUDA",
    limits=(
        Devices(("cuda", "rocm")),
        Capability((8, 0)),
        Feature("_scaled_dot_product_flash_attention", "install a torch built with flash attention"),
        DTypes(HALF),
        HeadDim(multiple_of=8, at_most=256, values_differ=False),
        Flash2Training(),
        Batch(),
        PlainScale(),
        Options(dropout=True, sinks="forward", lse="forward"),
        Backward(),
        Transforms(),
        Contracts(frozenset({"fullgraph", "no-sync"})),
    ),
    masks=Masks(native=FLASH_BANDS),
)

SDPA_EFFICIENT = Backend(
    name="sdpa-efficient",
    entry="headway.backends.sdpa_efficient",
    summary="memory-efficient attention inside PyTorch",
    limits=(
        Devices(("cuda",)),
        Feature("_scaled_dot_product_efficient_attention", "update torch"),
        Capability((5, 0)),
        DTypes(FLOATS),
        HeadDim(multiple_of=8),
        Batch(),
        PlainScale(),
        Options(dropout=True, sinks="forward", lse="forward"),
        Backward(mask=True),
        Transforms(),
        Contracts(frozenset({"float32", "fullgraph", "no-sync"})),
    ),
    masks=Masks(native=_kinds("causal", "causal-upper-left"), dense=True),
)

SDPA_CUDNN = Backend(
    name="sdpa-cudnn",
    entry="headway.backends.sdpa_cudnn",
    summary="cuDNN's fused attention, through PyTorch",
    best_on=((9, 0), (11, 0)),
    limits=(
        Devices(("cuda",)),
        Capability((8, 0)),
        Feature("_scaled_dot_product_cudnn_attention", "update torch"),
        DTypes(HALF),
        HeadDim(multiple_of=8, at_most=256),
        LargeHeads(over=128, at_least=(9, 0), below=(10, 0)),
        Batch(),
        NotOneByOne(),
        PlainScale(),
        Options(dropout=True, sinks="forward", lse="forward"),
        Backward(),
        Transforms(),
        Contracts(frozenset({"fullgraph", "no-sync"})),
    ),
    masks=Masks(native=_kinds("causal", "causal-upper-left"), dense=True),
)

FLEX_MASKS = Masks(
    native=(
        frozenset(
            [
                "causal",
                "causal-upper-left",
                "causal-lower-right",
                "window",
                "window-upper-left",
                "window-lower-right",
                "prefix",
                "documents",
                "documents-cross",
                "padding",
                "tree",
                "dense",
                "bias",
                "alibi",
                "alibi-upper-left",
                "alibi-lower-right",
                "predicate",
                "and",
                "or",
                "not",
            ]
        ),
    )
)

FLEX_CUDA = Backend(
    name="flex",
    entry="headway.backends.flex",
    summary="flex attention, compiled",
    limits=(
        Devices(("cuda",)),
        Feature("flex", "update torch"),
        Feature("triton", "install triton"),
        DTypes(FLOATS),
        HeadDim(at_least=16),
        Options(softcap=True, sinks="yes", lse="yes", lse_of_empty_rows=True),
        Backward(mask=True),
        Transforms(),
        Contracts(frozenset({"deterministic", "float32", "fullgraph", "no-sync"})),
    ),
    masks=FLEX_MASKS,
)

FLEX_CPU = Backend(
    name="flex",
    entry="headway.backends.flex",
    summary="flex attention, compiled, for CPU",
    limits=(
        Devices(("cpu",)),
        Feature("flex", "update torch"),
        Feature("c++", "install a C++ compiler"),
        DTypes(FLOATS),
        HeadDim(at_least=17),  # at 16 torch's CPU template reads memory nobody wrote, for 8 keys modulo 16
        Options(softcap=True),
        Backward(inputs=False),
        Transforms(compile=False),  # torch's CPU template knows no tensor made inside the compiled region
        Contracts(frozenset({"deterministic", "float32", "no-sync"})),
    ),
    masks=FLEX_MASKS,
)

TORCH_VARLEN = Backend(
    name="torch-varlen",
    entry="headway.backends.torch_varlen",
    summary="torch.nn.attention.varlen, for packed documents",
    limits=(
        Devices(("cuda",)),
        Capability((8, 0)),
        Feature("varlen", "update torch to 2.11 or newer"),
        DTypes(HALF),
        HeadDim(multiple_of=8, at_most=256, values_differ=False),
        PlainScale(),
        Options(lse="forward"),
        Backward(),
        Transforms(compile=False),
        Contracts(frozenset({"no-sync"})),
    ),
    masks=Masks(
        native=_kinds("documents & causal", "documents & window", "documents-cross"),
        needs=("documents", "documents-cross"),
    ),
)

FLASH2 = Backend(
    name="flash2",
    entry="headway.backends.flash2",
    package="flash-attn",
    summary="the package flash-attn",
    limits=(
        Devices(("cuda", "rocm")),
        Capability((8, 0)),
        DTypes(HALF),
        HeadDim(multiple_of=8, at_most=256, values_differ=False),
        Flash2Training(),
        Batch(),
        PlainScale(),
        Options(dropout=True, softcap=True, sinks="forward", lse="forward"),
        Backward(),
        Transforms(),
        Contracts(frozenset({"deterministic", "fullgraph", "no-sync"})),
    ),
    masks=Masks(native=FLASH2_MASKS),
)

FLASH3 = Backend(
    name="flash3",
    entry="headway.backends.flash3",
    package="flash-attn-3",
    summary="the package flash-attn-3, for Hopper",
    limits=(
        Devices(("cuda",)),
        Capability((9, 0), below=(10, 0)),
        DTypes(HALF),
        HeadDim(multiple_of=8, at_most=256, values_differ=False),
        PlainScale(),
        Options(softcap=True, sinks="forward", lse="forward"),
        Backward(),
        Transforms(compile=False),
        Contracts(frozenset({"deterministic", "no-sync"})),
    ),
    masks=Masks(native=FLASH_MASKS),
)

FLASH4 = Backend(
    name="flash4",
    entry="headway.backends.flash4",
    package="flash-attn-4",
    summary="the package flash-attn-4 (flash_attn.cute)",
    limits=(
        Devices(("cuda",)),
        Capability((9, 0)),
        DTypes(HALF),
        HeadDim(multiple_of=8, at_most=256, values_differ=False),
        LargeHeads(over=128, at_least=(9, 0), below=(10, 0)),
        PlainScale(),
        Options(softcap=True, sinks="forward", lse="forward"),
        Backward(),
        Transforms(compile=False),
        Contracts(frozenset({"deterministic", "no-sync"})),
    ),
    masks=Masks(native=FLASH_MASKS),
)

XFORMERS = Backend(
    name="xformers",
    entry="headway.backends.xformers",
    package="xformers",
    summary="the package xformers",
    limits=(
        Devices(("cuda",)),
        Capability((5, 0), below=(10, 0)),  # its kernels for Blackwell take no scale but the default
        DTypes(FLOATS),
        HeadDim(multiple_of=8, values_differ=False),
        Batch(),
        PlainScale(),
        Options(dropout=True),
        Backward(mask=True),
        Transforms(compile=False),
        Contracts(frozenset({"float32", "no-sync"})),
    ),
    masks=Masks(
        native=_kinds("causal", "causal-upper-left", "causal-lower-right", "documents & causal", "documents-cross"),
        dense=True,
    ),
)

SAGE = Backend(
    name="sage",
    entry="headway.backends.sage",
    package="sageattention",
    exact=False,
    summary="SageAttention: int8 scores, approximate",
    limits=(
        Devices(("cuda",)),
        Capability((8, 0)),
        DTypes(HALF),
        HeadDim(multiple_of=64, at_most=128, values_differ=False),
        PlainScale(),
        Options(),
        Backward(inputs=False),
        Transforms(compile=False),
        Contracts(frozenset()),
    ),
    masks=Masks(native=_kinds("causal")),
)

BACKENDS: tuple[Backend, ...] = (
    SDPA_CUDNN,
    FLASH4,
    FLASH3,
    FLASH2,
    SDPA_FLASH_CUDA,
    SDPA_FLASH_CPU,
    TORCH_VARLEN,
    XFORMERS,
    SDPA_EFFICIENT,
    FLEX_CUDA,
    FLEX_CPU,
    SDPA_MATH,
    REFERENCE,
    SAGE,
)
"""In the order auto prefers where nothing was measured."""

NAMES: tuple[str, ...] = tuple(sorted({backend.name for backend in BACKENDS}))


def named(name: str, device: str) -> Backend:
    """The backend of that name, on that kind of device where one name covers two kernels."""
    found = [backend for backend in BACKENDS if backend.name == name]
    if not found:
        raise UnknownNameError("backend", name, ("auto", *NAMES))
    fits = [one for one in found if any(isinstance(lim, Devices) and device in lim.kinds for lim in one.limits)]
    return (fits or found)[0]


def candidates(device: str) -> tuple[Backend, ...]:
    """One backend per name, as `device` sees them, in declared order."""
    return tuple(named(name, device) for name in dict.fromkeys(backend.name for backend in BACKENDS))
