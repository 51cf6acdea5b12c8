"""Typed masks: values that say what may attend to what."""

from headway.masks.alibi import Alibi
from headway.masks.base import And, Mask, Not, Or
from headway.masks.bias import Bias
from headway.masks.causal import Causal
from headway.masks.dense import Dense
from headway.masks.documents import Documents
from headway.masks.foreign import from_attn_mask, from_key_padding_mask, from_sdpa, from_transformers
from headway.masks.frame import Frame
from headway.masks.full import Full
from headway.masks.padding import Padding
from headway.masks.predicate import Predicate
from headway.masks.prefix import Prefix
from headway.masks.recognise import recognise
from headway.masks.tree import Tree
from headway.masks.window import Window

__all__ = [
    "Alibi",
    "And",
    "Bias",
    "Causal",
    "Dense",
    "Documents",
    "Frame",
    "Full",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "Predicate",
    "Prefix",
    "Tree",
    "Window",
    "from_attn_mask",
    "from_key_padding_mask",
    "from_sdpa",
    "from_transformers",
    "recognise",
]
