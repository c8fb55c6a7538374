"""Times as logs, the audit log and the file of keys write them."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(seconds: float, precision: str = "milliseconds") -> str:
    """Seconds since 1970 as ISO 8601, UTC, with the offset.

    Args:
        seconds: since 1970.
        precision: `milliseconds` or `seconds`.
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision)
