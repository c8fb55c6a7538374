"""What is said to people whose network cannot be made into a bundle."""

from __future__ import annotations

from app.errors import ScumbleError


class ExportError(ScumbleError):
    """A network cannot be made into a bundle."""
