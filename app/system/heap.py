"""Memory that the C library keeps for later goes back to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """For after what needs much memory once, such as to compile a model."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
        libc.malloc_trim(0)
