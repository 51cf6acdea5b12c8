"""The swap: find the sites of a model, change them all or none, prove the change, look at it, and take it back."""

from headway.swap.census import Census
from headway.swap.maps import Map, maps
from headway.swap.swap import Swap, inspect, swap, undo

__all__ = ["Census", "Map", "Swap", "inspect", "maps", "swap", "undo"]
