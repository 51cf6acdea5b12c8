"""What each backend must accept, written by hand: a case listed here that is refused has lost a feature, and fails.

The names are those of tests/deck.py. Nothing here is read from the declarations in the registry; where the two differ,
one of them is wrong. Cases that nobody lists for a backend must be refused by it.
"""

from __future__ import annotations

import dataclasses

HALF = frozenset({"float16", "bfloat16"})
FLOATS = HALF | {"float32"}
ALL_DTYPES = FLOATS | {"float64"}


@dataclasses.dataclass(frozen=True)
class Accepts:
    """The number formats a backend takes, and the cases: with gradients, and those it takes only without."""

    dtypes: frozenset[str] = frozenset()
    learns: frozenset[str] = frozenset()
    infers: frozenset[str] = frozenset()


def words(text: str, before: str = "") -> frozenset[str]:
    """Names between semicolons or line ends."""
    return frozenset(before + name.strip() for name in text.replace("\n", ";").split(";") if name.strip())


# -- groups of cases --------------------------------------------------------------------------------------------------

ONE_BY_ONE = words("length 1x1")
PLAIN_SHAPES = (
    words("1x77; 77x1; 5x5; 64x64; 192x192; 320x320; 130x130; 24x300", before="length ")
    | words("1:1; 8:2; 6:1; 6:2", before="heads ")
    | words("contiguous; tokens-first; every-other; features-first; one-for-all; misaligned", before="layout ")
    | words("layout tokens-first, heads 8:2; batch 1; batch 3; mask full; mask window-open")
)
SIZE_8 = words("size 8")
SIZE_40 = words("size 40")
SIZE_16 = words("size 16")
SIZES_TO_256 = words("size 128; size 256") | SIZE_16 | SIZE_40
SIZE_264 = words("size 264")
SIZE_76 = words("size 76")
OTHER_VALUES = words("size 64, values 32; size 64, values 128; size 40, values 24") | words(
    "size 32, values 24, layout one-for-all"
)

CAUSAL = words("mask causal; mask causal, large logits; heads 8:2, causal; length 320x320, causal") | words(
    "layout every-other, causal"
)
UPPER_LEFT = words("mask causal-upper-left-wide; mask causal-upper-left-tall") | words(
    "length 65x100, causal-upper-left, layout one-for-all"
)
WINDOWS = words("mask window; mask window-back; mask window-ahead; mask causal & window") | words(
    "length 320x320, window, large logits"
)
LOWER_RIGHT = words("causal-lower-right-wide; causal-lower-right-tall", before="mask ") | words(
    "window-lower-right-wide; window-lower-right-tall", before="mask "
)
DOCUMENTS = words("heads 8:2, documents") | words(
    "documents; documents-some-empty; documents & causal; documents & window; documents-cross; documents-cross-no-keys",
    before="mask ",
)
NO_KEYS = words("mask documents-cross; mask documents-cross-no-keys")
ALIBI = words("alibi; alibi & causal; alibi & documents; alibi-lower-right", before="mask ")
HALF_TILES = (
    words(
        """
    length 320x320, padding; length 320x320, bias-lowest-row
    length 64x64, padding, large logits
    length 320x320, window, large logits
    length 192x192, padding, large logits
    mask window-upper-left-wide; mask window-upper-left-tall
    mask both-aligns; mask both-aligns-wide
    mask alibi-upper-left; mask alibi-lower-right; mask alibi-upper-left & causal-lower-right
    mask causal-lower-right & padding; mask causal-upper-left & padding
    """
    )
    | LOWER_RIGHT
)
"""Masked calls with a length of 64 modulo 128, where cuDNN's backward pass is quarantined. CAUSAL is no mask to it."""
OTHER_MASKS = words(
    """
        nothing; prefix; prefix-per-entry; causal | prefix
        documents-cross & causal; documents & documents
        padding; padding-left; padding-holes; padding-all; padding & padding; padding-all, large logits
        tree; tree-tail
        dense; dense-per-head; dense-over-keys; dense-over-queries; dense-empty-rows
        bias; bias-per-head; bias-over-keys; bias-blocks; bias-empty-rows; bias-lowest-row; bias & bias; causal & bias
        alibi & documents-cross; causal & alibi & padding
        predicate; predicate-captures; not-causal; not-documents; ~(window & documents)
        causal & padding; causal & padding-left; documents & causal & padding; (window | prefix) & padding
        """,
    before="mask ",
) | words("layout misaligned, padding; heads 8:2, padding; length 1x48, padding, layout one-for-all")
LEARNT = words(
    "bias-learnt; bias-learnt-per-head; bias-learnt-over-keys; bias-learnt-blocks; bias-learnt & causal",
    before="mask ",
)
"""A bias that wants a gradient: any other bias once gradients are off."""

SCALE = words("scale; scale, causal")
SCALE_ON_MASKS = words("scale, padding-all; scale, bias")
ODD_SCALE = words(
    "scale negative; scale negative, causal; scale negative, padding-all;"
    " scale 0; scale 0, causal; scale 0, padding-all"
)
SOFTCAP = words("softcap; softcap, causal")
SOFTCAP_ALIBI = words("softcap, heads 8:2, alibi")
SOFTCAP_ON_MASKS = words("softcap, padding-all")
SOFTCAP_SINKS = words("softcap, sinks, causal")
DROPOUT = words("dropout; dropout, causal")
DROPOUT_ON_MASKS = words("dropout, padding-all")
SINKS = words("sinks; sinks, causal; sinks, heads 8:2")
SINKS_DOCUMENTS = words("sinks, documents")
SINKS_ON_MASKS = words("sinks, padding-all")
SINKS_LEARNT = words("sinks, bias-learnt")
LSE = words("lse; lse, causal; lse, heads 8:2; lse, length 320x320")
LSE_DOCUMENTS = words("lse, documents")
LSE_EMPTY_ROWS = words("lse, padding-all; lse, documents-cross")
SINKS_LSE = words("sinks, lse")
SINKS_LSE_EMPTY_ROWS = words("sinks, lse, padding-all")
DETERMINISTIC = words("require deterministic")
TWICE = words("require double-backward")
WIDE = words("require float32")
GRAPH = words("require fullgraph")
MAPS = words("require maps")
NO_SYNC = words("require no-sync")

# -- unions -----------------------------------------------------------------------------------------------------------

SIZES = SIZE_8 | SIZES_TO_256
ALL_SIZES = SIZES | SIZE_264 | SIZE_76 | OTHER_VALUES
MASKS = CAUSAL | UPPER_LEFT | WINDOWS | LOWER_RIGHT | DOCUMENTS | ALIBI | HALF_TILES | OTHER_MASKS
ALL_SOFTCAP = SOFTCAP | SOFTCAP_ALIBI | SOFTCAP_ON_MASKS
ALL_SINKS = SINKS | SINKS_DOCUMENTS | SINKS_ON_MASKS
ALL_LSE = LSE | LSE_DOCUMENTS | LSE_EMPTY_ROWS | SINKS_LSE | SINKS_LSE_EMPTY_ROWS
ALL_DROPOUT = DROPOUT | DROPOUT_ON_MASKS
ANY_MASK = PLAIN_SHAPES | MASKS | SCALE | SCALE_ON_MASKS
"""What every kernel takes that takes any mask as a dense tensor."""
SINKS_AND_LSE_DENSE = ALL_SINKS | LSE | LSE_DOCUMENTS | SINKS_LSE
BANDS = PLAIN_SHAPES | ONE_BY_ONE | SIZES | CAUSAL | WINDOWS | LOWER_RIGHT | SCALE
"""What every flash kernel takes on CUDA."""

EVERYTHING = (
    ONE_BY_ONE | ALL_SIZES | ANY_MASK | LEARNT | ODD_SCALE | ALL_SOFTCAP | SOFTCAP_SINKS | ALL_DROPOUT | ALL_SINKS
    | SINKS_LEARNT | ALL_LSE | DETERMINISTIC | TWICE | WIDE | GRAPH | MAPS | NO_SYNC
)  # fmt: skip
MATH = EVERYTHING - ALL_SOFTCAP - SOFTCAP_SINKS - ALL_LSE - MAPS
FLEX = EVERYTHING - SIZE_8 - ALL_DROPOUT - TWICE - MAPS

# -- the table --------------------------------------------------------------------------------------------------------

ACCEPTS: dict[str, dict[str, Accepts]] = {
    "cpu": {
        "reference": Accepts(ALL_DTYPES, EVERYTHING),
        "sdpa-math": Accepts(ALL_DTYPES, MATH),
        "sdpa-flash": Accepts(
            ALL_DTYPES,
            learns=ANY_MASK | ONE_BY_ONE | (ALL_SIZES - OTHER_VALUES) | DETERMINISTIC | WIDE | GRAPH | NO_SYNC,
            infers=LEARNT | SINKS_LEARNT | SINKS_AND_LSE_DENSE,
        ),
        "flex": Accepts(FLOATS, infers=FLEX - SIZE_16 - SOFTCAP_SINKS - ALL_SINKS - SINKS_LEARNT - ALL_LSE - GRAPH),
        "sdpa-cudnn": Accepts(),
        "sdpa-efficient": Accepts(),
        "torch-varlen": Accepts(),
        "flash2": Accepts(),
        "flash3": Accepts(),
        "flash4": Accepts(),
        "xformers": Accepts(),
        "sage": Accepts(),
    },
    "h200": {
        "reference": Accepts(ALL_DTYPES, EVERYTHING),
        "sdpa-math": Accepts(ALL_DTYPES, MATH),
        "sdpa-flash": Accepts(
            HALF,
            learns=BANDS | DROPOUT | GRAPH | NO_SYNC,
            infers=SINKS | LSE | SINKS_LSE | DETERMINISTIC,
        ),
        "sdpa-efficient": Accepts(
            FLOATS,
            learns=ANY_MASK | ONE_BY_ONE | (ALL_SIZES - SIZE_76) | LEARNT | ALL_DROPOUT | WIDE | GRAPH | NO_SYNC,
            infers=SINKS_AND_LSE_DENSE | SINKS_LEARNT | DETERMINISTIC,
        ),
        "sdpa-cudnn": Accepts(
            HALF,
            learns=(ANY_MASK - HALF_TILES) | SIZES | OTHER_VALUES | GRAPH | NO_SYNC,
            infers=HALF_TILES | LEARNT | SINKS_AND_LSE_DENSE | SINKS_LEARNT | DETERMINISTIC,
        ),
        "flex": Accepts(FLOATS, learns=FLEX),
        "torch-varlen": Accepts(HALF, learns=DOCUMENTS, infers=LSE_DOCUMENTS),
        "flash2": Accepts(
            HALF,
            learns=BANDS | DOCUMENTS | ALIBI | SOFTCAP | SOFTCAP_ALIBI | DROPOUT | DETERMINISTIC | GRAPH | NO_SYNC,
            infers=SINKS | SINKS_DOCUMENTS | SOFTCAP_SINKS | LSE | LSE_DOCUMENTS | SINKS_LSE,
        ),
        "flash3": Accepts(
            HALF,
            learns=BANDS | DOCUMENTS | SOFTCAP | DETERMINISTIC | NO_SYNC,
            infers=SINKS | SINKS_DOCUMENTS | SOFTCAP_SINKS | LSE | LSE_DOCUMENTS | SINKS_LSE,
        ),
        "flash4": Accepts(
            HALF,
            learns=(BANDS - SIZE_8 - SIZE_40) | (DOCUMENTS - NO_KEYS) | SOFTCAP | DETERMINISTIC | NO_SYNC,
            infers=NO_KEYS
            | SIZE_8
            | SIZE_40
            | SINKS
            | SINKS_DOCUMENTS
            | SOFTCAP_SINKS
            | LSE
            | LSE_DOCUMENTS
            | SINKS_LSE,
        ),
        "xformers": Accepts(
            FLOATS,
            learns=ANY_MASK | ONE_BY_ONE | SIZES | SIZE_264 | LEARNT | ALL_DROPOUT | WIDE | NO_SYNC,
            infers=DETERMINISTIC,
        ),
        "sage": Accepts(
            HALF,
            infers=(PLAIN_SHAPES | ONE_BY_ONE | CAUSAL | SCALE | words("size 128") | DETERMINISTIC),
        ),
    },
}

PACKAGES = {
    "flash2": "flash-attn",
    "flash3": "flash-attn-3",
    "flash4": "flash-attn-4",
    "xformers": "xformers",
    "sage": "sageattention",
}
"""Distributions without which a backend must refuse everything."""
