"""Timestamps in the format of the log, the audit log and the file of API keys."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(seconds: float, precision: str = "milliseconds") -> str:
    """Format a time as ISO 8601 in UTC with the offset.

    Args:
        seconds: since 1970-01-01 UTC.
        precision: `milliseconds` or `seconds`.
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision)
