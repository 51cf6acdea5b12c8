"""Settings of this process that change attention, and that other libraries leave on behind one's back.

They belong to a process: `headway doctor` shows what its own start and the environment set. To see those of a running
program, call this from it:

>>> from headway.cli.settings import settings
>>> [setting.name for setting in settings() if not setting.is_usual]
[]
"""

from __future__ import annotations

import dataclasses
import os
import types
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

VARIABLES = ("HEADWAY_BACKEND", "TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_ROCM_FA_PREFER_CK", "XFORMERS_DISABLED")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, its value in this process, and what torch starts with."""

    name: str
    value: str
    usual: tuple[str, ...]
    effect: str
    """What another value does."""

    @property
    def is_usual(self) -> bool:
        return self.value in self.usual


def settings() -> tuple[Setting, ...]:
    """All settings that Headway looks at, changed or not; one that this torch does not have is left out."""
    found = (_read(*row) for row in _ROWS)
    return (*(setting for setting in found if setting is not None), *_environment())


def _read(name: str, read: Callable[[], object], usual: tuple[str, ...], effect: str) -> Setting | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are deprecated, and still act
            value = read()
    except AttributeError:  # not in this torch
        return None
    except RuntimeError as error:  # torch refuses to say, as where its old and new names for one switch were mixed
        value = str(error).splitlines()[0]
    return Setting(name, str(value), usual, effect)


def _environment() -> tuple[Setting, ...]:
    effects = {"HEADWAY_BACKEND": "names the backend of every call that names none"}
    return tuple(
        Setting(
            f"${name}", os.environ[name], (), effects.get(name, "steers a kernel of F.scaled_dot_product_attention")
        )
        for name in VARIABLES
        if name in os.environ
    )


def _sdpa() -> str:
    function = F.scaled_dot_product_attention
    if isinstance(function, types.BuiltinFunctionType):
        return "torch's own"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _priority() -> str:
    names = {member.value: name for name, member in torch.nn.attention.SDPBackend.__members__.items()}
    shown = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    order = [names.get(number, "?") for number in torch._C._get_sdp_priority_order()]
    return ", ".join(name.removesuffix("_ATTENTION").lower() for name in order if name in shown)


_SDPA_EFFECT = "F.scaled_dot_product_attention does without that kernel; Headway calls kernels by name"

_ROWS: tuple[tuple[str, Callable[[], object], tuple[str, ...], str], ...] = (
    (
        "torch.backends.cuda.flash_sdp_enabled()",
        lambda: torch.backends.cuda.flash_sdp_enabled(),
        ("True",),
        _SDPA_EFFECT,
    ),
    (
        "torch.backends.cuda.mem_efficient_sdp_enabled()",
        lambda: torch.backends.cuda.mem_efficient_sdp_enabled(),
        ("True",),
        _SDPA_EFFECT,
    ),
    ("torch.backends.cuda.math_sdp_enabled()", lambda: torch.backends.cuda.math_sdp_enabled(), ("True",), _SDPA_EFFECT),
    (
        "torch.backends.cuda.cudnn_sdp_enabled()",
        lambda: torch.backends.cuda.cudnn_sdp_enabled(),
        ("True",),
        _SDPA_EFFECT,
    ),
    (
        "torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()",
        lambda: torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        ("False",),
        "sdpa-math sums in half precision",
    ),
    (
        "SDPA's priority order",
        _priority,
        ("flash, efficient, math, cudnn", "cudnn, flash, efficient, math"),
        "F.scaled_dot_product_attention prefers other kernels",
    ),
    ("F.scaled_dot_product_attention", _sdpa, ("torch's own",), "calls of it in every model run something else"),
    (
        "torch.nn.attention.current_flash_attention_impl()",
        lambda: torch.nn.attention.current_flash_attention_impl(),
        ("None",),
        "torch's flash operators, and with them sdpa-flash and torch-varlen, run that package",
    ),
    (
        "torch.backends.mha.get_fastpath_enabled()",
        lambda: torch.backends.mha.get_fastpath_enabled(),
        ("True",),
        "nn.TransformerEncoder calls its attention in evaluation as in training",
    ),
    (
        "torch.are_deterministic_algorithms_enabled()",
        lambda: torch.are_deterministic_algorithms_enabled(),
        ("False",),
        "only deterministic backends take calls with gradients",
    ),
    (
        "torch.get_float32_matmul_precision()",
        lambda: torch.get_float32_matmul_precision(),
        ("highest",),
        "float32 matmuls on GPUs may round to TF32, in sdpa-math and the reference too",
    ),
)
