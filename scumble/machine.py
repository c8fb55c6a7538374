"""The machine that a measurement is made on."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

# Parameters of mallopt, by malloc.h of glibc, and what they are set to, in bytes.
KEPT = {-3: 32 << 20, -1: 2**31 - 1, -2: 256 << 20}  # mmap and trim threshold, padding of the top


def processor() -> str:
    """The processor's name as Linux tells it; elsewhere its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees.

    Each step of a training takes and frees the same large pieces. glibc gives them back to the
    system, and the next step gets them page by page. Where the C library is another one,
    nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, size in KEPT.items():
            mallopt(parameter, size)
