"""What training raises on purpose, beside what Headway itself raises."""

from __future__ import annotations

from headway import HeadwayError


class DeviceError(HeadwayError, RuntimeError):
    """A device is not here, or cannot train in the precision asked for."""


class CheckpointError(HeadwayError, RuntimeError):
    """A checkpoint cannot be written, or is not what was written."""


class TrackerError(HeadwayError, RuntimeError):
    """A tracker cannot be used as asked."""
