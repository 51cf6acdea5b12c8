"""What `python -m xformers.info` tells, here of Headway."""

from __future__ import annotations

import torch

from headway.shims.xformers import __version__, _is_triton_available
from headway.shims.xformers.ops import fmha  # noqa: F401  # it registers the operators
from headway.shims.xformers.ops.common import OPERATORS_REGISTRY


def get_features_status() -> dict[str, str]:
    features = {
        f"{operator.OPERATOR_CATEGORY}.{operator.NAME}": "available" if operator.is_available() else "unavailable"
        for operator in OPERATORS_REGISTRY
    }
    return features | {"is_triton_available": str(_is_triton_available())}


def print_info() -> None:
    print(f"xFormers {__version__}: its names, computed by Headway; `headway doctor` tells which kernels run")
    features = get_features_status() | {"pytorch.version": torch.__version__}
    features["pytorch.cuda"] = "available" if torch.cuda.is_available() else "not available"
    if torch.cuda.is_available():
        features["gpu.compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        features["gpu.name"] = torch.cuda.get_device_name()
    features["build.info"] = "none"
    for name, status in features.items():
        print(f"{name + ':':<50} {status}")


if __name__ == "__main__":
    print_info()
