"""Returns memory that the C library keeps for later to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Call after a step that needs much memory once, such as compiling a model."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
        libc.malloc_trim(0)
