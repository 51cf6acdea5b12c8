"""Named sizes, each with the parameters that it has and where it is from."""

from __future__ import annotations

import dataclasses
from typing import Any

from headway import RequestError
from headway_apps.proteins.model.config import DiTConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size that others have trained or named."""

    config: DiTConfig
    parameters: int
    """How many weights the network has at this size, as its origin says."""
    origin: str


SEDD: dict[str, Any] = {"head_bias": True, "gelu": "tanh", "silu_after_time": True}
"""What the original SEDD computes, that its weights do not show by their shapes alone."""

V100: dict[str, Any] = {"head_bias": False, "gelu": "erf", "silu_after_time": False}
"""What the protein model for V100 computes otherwise than the original SEDD."""


def _sedd(width: int, blocks: int, heads: int) -> DiTConfig:
    gpt2 = 50257
    return DiTConfig(
        width=width, blocks=blocks, heads=heads, cond=128, embedded=gpt2 + 1, scored=gpt2 + 1, mask=gpt2, **SEDD
    )


def _v100(width: int, blocks: int, heads: int, cond: int, symbols: int) -> DiTConfig:
    return DiTConfig(
        width=width, blocks=blocks, heads=heads, cond=cond, embedded=symbols, scored=symbols, mask=symbols - 1, **V100
    )


PRESETS: dict[str, Preset] = {
    "seed-23m": Preset(
        DiTConfig(width=512, blocks=6, heads=8, cond=256, embedded=34, scored=33, mask=33, final="scale", **V100),
        23_930_880,
        "inferred: the configuration behind the count that the V100 model's documents report, with scores of 33"
        " symbols, is lost; these sizes hit it exactly. 8 heads, and a last norm that is scaled and not shifted, are"
        " guesses: no count tells them apart",
    ),
    "seed-24m": Preset(_v100(512, 6, 8, 256, 33), 24_061_952, "the V100 model as committed, for 32 symbols and a mask"),
    "seed-66m": Preset(_v100(768, 8, 12, 256, 37), 66_724_096, "the V100 model with config_uniref50_optimized.yaml"),
    "seed-316m": Preset(_v100(1024, 20, 16, 512, 37), 316_360_704, "the V100 model with config_uniref50.yaml"),
    "sedd-small": Preset(_sedd(768, 12, 12), 169_627_218, "the original SEDD, small, with GPT-2's symbols"),
    "sedd-medium": Preset(_sedd(1024, 24, 16), 424_477_010, "the original SEDD, medium, with GPT-2's symbols"),
}


def preset(name: str, **changes: Any) -> DiTConfig:
    """The config of a named size, with fields changed. Other symbols are other weights, and another count.

    >>> preset("seed-66m", embedded=33, scored=33, mask=32).check_alphabet(size=33, mask=32)
    >>> preset("seed-23m", mask=32).check_alphabet(size=33, mask=32)
    """
    if name not in PRESETS:
        raise RequestError(f"got preset {name!r}, takes {', '.join(PRESETS)}")
    unknown = changes.keys() - {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(DiTConfig))
        raise RequestError(f"got {', '.join(sorted(unknown))}, takes fields of a config: {known}")
    return dataclasses.replace(PRESETS[name].config, **changes)
