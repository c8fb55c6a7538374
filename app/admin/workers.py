"""What the admin port and the console need to know of the workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Workers(Protocol):
    """The supervisor, as the admin port sees it."""

    def ready(self) -> bool:
        """Whether every worker is ready and the service is not draining."""
        ...

    def stale(self) -> Sequence[str]:
        """Files that some worker has failed to reload for longer than allowed."""
        ...

    def model_dir(self) -> Path:
        """Folder of the served bundle: a copy, and another one after each reload."""
        ...

    async def reload(self) -> bool:
        """Serve the current bundle, or keep the old one; return whether it was replaced."""
        ...

    def pids(self) -> dict[int, int]:
        """Process ids by worker number."""
        ...

    def connections(self) -> dict[int, int]:
        """Open connections by worker number."""
        ...
