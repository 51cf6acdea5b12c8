"""The moving average of weights: shadow <- shadow - (1 - d) (shadow - weight), d = min(decay, (1 + n) / (10 + n))."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headway import RequestError


class Average:
    """Of all floating parameters by name, in float32 or wider; buffers stay the model's own.

    Under FSDP2 each process averages its own shards. The model is given bare, not wrapped by DDP or torch.compile.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise RequestError(f"got decay {decay}, takes a number from 0 to less than 1, such as 0.9999")
        self.decay = decay
        self.count = 0
        """Updates so far."""
        self.weights: dict[str, Tensor] = {
            name: weight.detach().to(_shadow_dtype(weight), copy=True) for name, weight in _weights(model).items()
        }
        self._applied = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a real optimizer step; never after one that the scaler skipped."""
        if self._applied:
            raise RequestError("got update() while the averaged weights are applied, takes it after: leave `applied`")
        weights = self._of(model)
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for names in self._alike():
            shadows = [self.weights[name] for name in names]
            now = [weights[name].detach().to(self.weights[name].dtype) for name in names]
            torch._foreach_lerp_(shadows, now, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights here, and after it the trained ones, to the bit.

        Written into the model's own tensors: optimizers, CUDA graphs and shards hold on to those.
        """
        if self._applied:
            raise RequestError("got applied() within applied(), takes one at a time; leave the first")
        weights = self._of(model)
        trained = {name: weight.detach().clone() for name, weight in weights.items()}
        self._applied = True
        try:
            _write(weights, self.weights)
            yield
        finally:
            _reshard(model)  # or layers that are gathered still would go on with the averaged weights
            _write(weights, trained)
            self._applied = False

    def load(self, weights: Mapping[str, Tensor], count: int) -> None:
        """What `weights` and `count` were, exactly; nothing is changed if any does not fit."""
        _must_match("averaged weights", self.weights, weights, lambda x: (x.dtype, *x.shape))
        if count < 0:
            raise RequestError(f"got count {count}, takes the updates so far")
        _write(self.weights, weights)
        self.count = count

    def _of(self, model: nn.Module) -> dict[str, Tensor]:
        weights = _weights(model)
        _must_match("a model", self.weights, weights, lambda x: tuple(x.shape))
        return weights

    def _alike(self) -> list[list[str]]:
        """Names that one fused operation takes together: shards and whole tensors do not mix."""
        groups: dict[tuple[type, torch.device, torch.dtype], list[str]] = {}
        for name, shadow in self.weights.items():
            groups.setdefault((type(shadow), shadow.device, shadow.dtype), []).append(name)
        return list(groups.values())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    _reshard(model)
    return {name: each for name, each in model.named_parameters() if each.is_floating_point()}


def _shadow_dtype(weight: Tensor) -> torch.dtype:
    """A step of 1e-4 of the difference is lost in 8 bits of mantissa."""
    return weight.dtype if weight.itemsize >= 4 else torch.float32


@torch.no_grad()
def _write(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        tensor.copy_(values[name])


def _reshard(model: nn.Module) -> None:
    """FSDP2 keeps some layers gathered after a forward without gradients, in tensors that are not its parameters."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # slow to import, and where it is not, nothing is sharded
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _must_match(
    what: str, takes: Mapping[str, Tensor], got: Mapping[str, Tensor], told: Callable[[Tensor], object]
) -> None:
    took, gave = ({name: told(each) for name, each in of.items()} for of in (takes, got))
    if differ := [name for name in {**took, **gave} if took.get(name) != gave.get(name)]:
        some = "; ".join(f"{name}: got {gave.get(name, 'none')}, takes {took.get(name, 'none')}" for name in differ[:3])
        raise RequestError(
            f"got {what} of which {len(differ)} weights are not as averaged ({some}); give the same model"
        )
