"""What is said about the machine, and asked of it."""

import platform
import subprocess
import sys

import pytest

# takes and frees 160 MB fifty times, and prints how many pages the system gave in the last forty
STEPS = """
import resource
import numpy as np
from scumble.machine import keep_freed_memory

if {kept}:
    keep_freed_memory()
for step in range(50):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [np.ones(20_000_000, np.uint8) for _ in range(8)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    given, kept = (
        int(subprocess.check_output([sys.executable, "-c", STEPS.format(kept=each)]))
        for each in (False, True)
    )
    assert given > 1000  # fewer where pages are huge
    assert kept < given / 20
