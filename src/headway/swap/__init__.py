"""The swap: find the sites of a model, change them all or none, prove the change, and take it back."""

from headway.swap.census import Census
from headway.swap.swap import Swap, inspect, swap, undo

__all__ = ["Census", "Swap", "inspect", "swap", "undo"]
