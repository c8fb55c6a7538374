"""File descriptors: each connection needs one, and the system limits them per process."""

from __future__ import annotations

import resource

RESERVED = 64  # for libraries, logs, databases and the pipes between processes
MOST = 4096  # default limit of connections per worker


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connections_within(descriptors: int) -> int:
    """Number of connections for a process that may open this many files."""
    if descriptors == resource.RLIM_INFINITY:
        return MOST
    return min(MOST, max(descriptors - RESERVED, descriptors // 2))
