"""Look inside a running model: activations, gradients, attention, dead parameters, and where a NaN came from."""

from headway.watch.recorder import watch
from headway.watch.recording import Recording

__all__ = ["Recording", "watch"]
