"""Headway: the fastest attention that is right on this machine, in any PyTorch model."""

from headway.attention import attention, explain
from headway.errors import (
    CertificateError,
    HeadwayError,
    MaskError,
    NoBackendError,
    RecompileBudgetError,
    RequestError,
    SwapError,
    UnknownNameError,
)
from headway.masks import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Full,
    Mask,
    Padding,
    Predicate,
    Prefix,
    Tree,
    Window,
    recognise,
)
from headway.swap import Census, Map, Swap, inspect, maps, swap, undo
from headway.watch import Recording, watch

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Bias",
    "Causal",
    "Census",
    "CertificateError",
    "Dense",
    "Documents",
    "Full",
    "HeadwayError",
    "Map",
    "Mask",
    "MaskError",
    "NoBackendError",
    "Padding",
    "Predicate",
    "Prefix",
    "RecompileBudgetError",
    "Recording",
    "RequestError",
    "Swap",
    "SwapError",
    "Tree",
    "UnknownNameError",
    "Window",
    "attention",
    "explain",
    "inspect",
    "maps",
    "recognise",
    "swap",
    "undo",
    "watch",
]
