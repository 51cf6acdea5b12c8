"""Makes Hugging Face transformers look again for flash_attn, and take it where there is no CUDA device.

transformers remembers whether flash_attn is there, and refuses it without a CUDA device before it would import it.
While a shim answers as a distribution, what it remembers is cleared; and where there is no such device its table of
devices has a row more, and its question the answer yes. All of it is taken back with the shim.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

MODULE = "transformers.modeling_flash_attention_utils"
_MEMORY = "transformers.utils.import_utils"
_QUESTION = "is_flash_attn_2_available"
_IN_USE = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn")
_UNDO: list[Callable[[], None]] = []


def tell(answered: bool) -> None:
    """Whether a shim answers for flash_attn as a distribution from now on."""
    _forget()
    if not answered:
        while _UNDO:
            _UNDO.pop()()
    elif MODULE in sys.modules and not _UNDO:
        _open(sys.modules[MODULE])


def in_use() -> bool:
    """Whether transformers has loaded its flash_attention_2 from the shim."""
    return bool(_UNDO) and getattr(sys.modules.get(MODULE), "_loaded_implementation", None) == "flash_attention_2"


def _forget() -> None:
    """What transformers remembers of packages of that name."""
    for name, value in list(vars(sys.modules.get(_MEMORY, object)).items()):
        if "flash_attn" in name or name == "_package_distribution_mapping":
            getattr(value, "cache_clear", lambda: None)()


def _open(utils: ModuleType) -> None:
    before = {name: vars(utils)[name] for name in _IN_USE if name in vars(utils)}
    _UNDO.append(lambda: _put_back(utils, before))
    if torch.cuda.is_available():
        return
    row = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    yes = {
        "general_availability_check": _yes,
        "supported_devices": (*row["supported_devices"], (_yes, "cpu")),
    }
    had = {name: row[name] for name in yes}
    row.update(yes)
    _UNDO.append(lambda: row.update(had))
    question = getattr(utils, _QUESTION)
    setattr(utils, _QUESTION, _yes)
    _UNDO.append(lambda: setattr(utils, _QUESTION, question))


def _yes(*args: Any, **kwargs: Any) -> bool:
    return True


def _put_back(utils: ModuleType, before: dict[str, Any]) -> None:
    """The functions that transformers had loaded before it loaded Headway's."""
    for name in _IN_USE:
        vars(utils).pop(name, None)
    vars(utils).update(before)


# -- where transformers is imported later -----------------------------------------------------------------------------


def followed(
    finder: Any, fullname: str, path: Sequence[str] | None, then: Callable[[], None]
) -> importlib.machinery.ModuleSpec | None:
    """The module as other finders find it, and what to do once it is loaded."""
    others = (other for other in sys.meta_path if other is not finder and hasattr(other, "find_spec"))
    spec = next((found for other in others if (found := other.find_spec(fullname, path))), None)
    if spec is not None and spec.loader is not None:
        spec.loader = _Then(spec.loader, then)
    return spec


class _Then(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then()
