"""What callers give, checked: nothing here broadcasts by chance, and nothing waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, _assert_async
from torch.compiler import is_compiling

from headway import RequestError


def insist(holds: Tensor, message: str) -> None:
    """RequestError unless `holds`; on CUDA and in compiled code an assertion that runs with the kernels around it."""
    if is_compiling() or holds.is_cuda:
        _assert_async(holds, message)
    elif not bool(holds):
        raise RequestError(message)


def tokens_given(tokens: Tensor, name: str = "tokens") -> Tensor:
    if tokens.dtype != torch.int64 or tokens.ndim == 0:
        raise RequestError(
            f"got {name} {tuple(tokens.shape)} in {tokens.dtype}; takes int64 ids of one axis or more: {name}.long()"
        )
    return tokens


def like_tokens(given: Tensor, tokens: Tensor, name: str) -> Tensor:
    if given.shape != tokens.shape:
        raise RequestError(f"got {name} {tuple(given.shape)}; takes the shape of the tokens, {tuple(tokens.shape)}")
    return given


def per_token(level: Tensor, tokens: Tensor, name: str = "sigma_bar") -> Tensor:
    """`level` at each token. It has the tokens' shape, or lacks their last axis: then it is one number a sequence."""
    if level.dtype not in (torch.float32, torch.float64):
        raise RequestError(
            f"got {name} in {level.dtype}; takes float32 or float64, as bfloat16 cannot tell levels apart"
        )
    if level.shape == tokens.shape:
        return level
    if level.shape == tokens.shape[:-1]:
        return level.unsqueeze(-1).expand(tokens.shape)
    raise RequestError(
        f"got {name} {tuple(level.shape)} for tokens {tuple(tokens.shape)}; takes one a token, or one a sequence:"
        f" {tuple(tokens.shape[:-1])}. Packed tokens take {name}[document]"
    )


def free_sites(free: Tensor | None, tokens: Tensor) -> Tensor:
    """Which sites noise may change: all, unless the caller says."""
    if free is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if free.dtype != torch.bool:
        raise RequestError(f"got free in {free.dtype}; takes bool: True where noise may change a token")
    return like_tokens(free, tokens, "free")


def scores_given(log_score: Tensor, tokens: Tensor, size: int) -> Tensor:
    """Log scores in float32 at least: sums of exponentials in less are wrong by more than models differ."""
    if log_score.shape != (*tokens.shape, size) or not log_score.is_floating_point():
        raise RequestError(
            f"got log scores {tuple(log_score.shape)} in {log_score.dtype} for tokens {tuple(tokens.shape)};"
            f" takes floating point {(*tokens.shape, size)}"
        )
    return log_score if log_score.dtype == torch.float64 else log_score.float()
