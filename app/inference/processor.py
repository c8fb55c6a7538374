"""What the processor can do that decides which engine is right."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
# Multiply int8 and add in 32 bits. Before them there are only pairs added in 16 bits, which
# saturate: two products of uint8 and int8 may need 17.
DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})


def adds_int8_exactly(cpuinfo: Path = CPUINFO, machine: str | None = None) -> bool:
    """Whether the instructions that engines use for int8 add products without saturation.

    Args:
        cpuinfo: where Linux lists what the processor has; if it cannot be read, an x86 processor is
            taken for an old one.
        machine: kind of processor, by default this one's.
    """
    if (machine or platform.machine()).lower() not in X86:
        return True
    try:
        words = cpuinfo.read_text().split()
    except OSError:
        return False
    return not DOT_PRODUCTS.isdisjoint(words)
