"""What the protein system raises on purpose, beside what Headway itself raises."""

from __future__ import annotations

from headway import HeadwayError


class DataError(HeadwayError, ValueError):
    """A file, or a sequence in it, is not what it should be."""


class WeightsError(HeadwayError, ValueError):
    """A file of weights cannot be read safely, or is not of this network."""
