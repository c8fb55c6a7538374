"""File descriptors: each connection takes one, and the system allows a process only so many."""

from __future__ import annotations

import resource

RESERVED = 64  # for libraries, logs, databases and the pipes between processes
MOST = 4096  # connections of a worker, unless the settings say more


def raise_limit() -> int:
    """Let this process, and those it starts, open as many files as it may; gives how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connections_within(descriptors: int) -> int:
    """How many connections a process may have that may open so many files."""
    if descriptors == resource.RLIM_INFINITY:
        return MOST
    return min(MOST, max(descriptors - RESERVED, descriptors // 2))
