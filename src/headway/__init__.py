"""Headway: the fastest attention that is right on this machine, in any PyTorch model."""

from headway.attention import attention, explain
from headway.errors import (
    HeadwayError,
    MaskError,
    NoBackendError,
    RecompileBudgetError,
    RequestError,
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

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Bias",
    "Causal",
    "Dense",
    "Documents",
    "Full",
    "HeadwayError",
    "Mask",
    "MaskError",
    "NoBackendError",
    "Padding",
    "Predicate",
    "Prefix",
    "RecompileBudgetError",
    "RequestError",
    "Tree",
    "UnknownNameError",
    "Window",
    "attention",
    "explain",
    "recognise",
]
