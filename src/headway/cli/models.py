"""MODEL on the command line: a built-in name, hf:…, timm:…, or path/to/file.py:function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from headway.cli.built_in import BUILT_IN
from headway.cli.example import example_for, why_not
from headway.cli.hugging_face import from_transformers

MODEL_HELP = (
    f"A built-in model ({', '.join(BUILT_IN)}); hf:<type, config class or local folder>, such as hf:llama;"
    " timm:<name>; or path/to/file.py:name of a function that returns a model or (model, example), or of a model."
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def found(name: str, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> tuple[nn.Module, Any]:
    """The model in evaluation mode, and an example that it runs with, on the device and in the dtype."""
    where, kind = _device(device), _dtype(dtype)
    torch.manual_seed(seed)
    model, example = _made(name)
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"got {name}, which made a {type(model).__name__}; takes an nn.Module")
    model.eval()
    if example is None:
        example = example_for(model.float())
    model = model.to(where, kind)
    example = moved(example, where, kind)
    error = why_not(model, example)
    if error:
        raise typer.BadParameter(
            f"{name} does not run with its example: {error}. Give it another by path/to/file.py:function,"
            " which returns (model, example)"
        )
    return model, example


def _made(name: str) -> tuple[Any, Any]:
    if name in BUILT_IN:
        return BUILT_IN[name][0]()
    scheme, _, rest = name.partition(":")
    if scheme == "hf" and rest:
        return from_transformers(rest), None
    if scheme == "timm" and rest:
        return _from_timm(rest)
    if ".py:" in name:
        return _from_file(name)
    if (Path(name) / "config.json").is_file():  # what save_pretrained writes
        return from_transformers(name), None
    close = difflib.get_close_matches(name, BUILT_IN, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    typer.echo(listed(), err=True)
    raise typer.BadParameter(f"got {name!r}, which is none of the above{meant}")


def listed() -> str:
    """What MODEL may be, a line each."""
    width = max(map(len, BUILT_IN))
    lines = ["built-in models:", *(f"  {name:<{width}}  {about}" for name, (_, about) in BUILT_IN.items())]
    lines += [
        "other models:",
        "  hf:<type>                  a tiny random model of transformers, such as hf:llama, hf:bert, hf:vit",
        "  hf:<config class>          the same by its name, such as hf:LlamaConfig",
        "  hf:<local folder>          with config.json; its weights if it has any, random ones if not",
        "  timm:<name>                a model of timm with random weights",
        "  path/to/file.py:function   what the function returns: a model, or (model, example); or a model by its name",
    ]
    return "\n".join(lines)


def _from_timm(name: str) -> tuple[nn.Module, Any]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise typer.BadParameter(f"timm:{name} needs timm, which is not installed; pip install timm") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 4)
        meant = f"; did you mean {', '.join(close)}?" if close else ""
        raise typer.BadParameter(f"got timm:{name}, which timm does not know{meant}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return model, (torch.randn(2, *size),)


def _from_file(name: str) -> tuple[Any, Any]:
    file, _, function = name.rpartition(":")
    make = _maker(Path(file), function)
    if isinstance(make, nn.Module):
        return make, None
    try:
        made = make()
    except Exception as error:
        raise typer.BadParameter(f"{name} raised {type(error).__name__}: {error}") from error
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


def _maker(path: Path, name: str) -> Callable[[], Any]:
    if not path.is_file():
        raise typer.BadParameter(f"got {path}:{name}, but there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` would look
    sys.modules[path.stem] = module  # so that its classes can be copied and pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise typer.BadParameter(f"cannot import {path}: {type(error).__name__}: {error}") from error
    make = getattr(module, name, None)
    if not callable(make):
        made_here = (key for key, value in vars(module).items() if key[0] != "_" and _makes(value, path.stem))
        known = ", ".join(made_here) or "nothing"
        raise typer.BadParameter(
            f"got {path}:{name}, takes a function that makes a model, a class of one, or a model; the file has: {known}"
        )
    return make  # type: ignore[no-any-return]


def _makes(value: Any, module: str) -> bool:
    """Whether it is a model, or a function or class of that Python module."""
    return isinstance(value, nn.Module) or (callable(value) and getattr(value, "__module__", "") == module)


def moved(example: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The example on a device, its floating-point tensors in a dtype; a function stays as it is."""
    if isinstance(example, Tensor):
        return example.to(device, dtype if example.is_floating_point() else example.dtype)
    if isinstance(example, dict):
        return {key: moved(each, device, dtype) for key, each in example.items()}
    if type(example) in (tuple, list):
        return type(example)(moved(each, device, dtype) for each in example)
    return example


def _dtype(name: str) -> torch.dtype:
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise typer.BadParameter(f"got dtype {name!r}, takes {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise typer.BadParameter(f"got device {name!r}, which is not here: {first}") from error
    return device
