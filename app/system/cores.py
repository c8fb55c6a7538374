"""Number of cores that this process may use, from its affinity and its control group's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath


@cache
def available_cores() -> int:
    """Cores for this process, at least one; cached, so that all callers get the same number."""
    affinity = len(os.sched_getaffinity(0))
    return min(affinity, quota_cores(Path("/")) or affinity)


def quota_cores(root: Path) -> int | None:
    """Processor time that the control groups allow, in cores, rounded up; None for no limit.

    Args:
        root: root of the file system.
    """
    limits = list(_limits(root))
    return max(1, math.ceil(min(limits))) if limits else None


def _limits(root: Path) -> Iterator[float]:
    """Limits of the groups that this process is in, in cores."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            read, hierarchies = _limit_v2, [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            read, hierarchies = _limit_v1, [mounted / "cpu", mounted / controllers]
        else:
            continue
        # Parent groups limit their children. In a container, the path may be the host's: then only
        # the topmost folder exists, which is the container's own group.
        group = PurePosixPath(path.lstrip("/"))
        for hierarchy in hierarchies:
            for part in (group, *group.parents):
                limit = read(hierarchy / part)
                if limit is not None:
                    yield limit


def _limit_v2(group: Path) -> float | None:
    """`cpu.max`: "max 100000" or "150000 100000"."""
    words = _words(group / "cpu.max")
    return _ratio(*words) if len(words) == 2 else None


def _limit_v1(group: Path) -> float | None:
    """`cpu.cfs_quota_us` of `cpu.cfs_period_us`; -1 for no limit."""
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal() and int(period) > 0):  # "max", "-1"
        return None
    return int(quota) / int(period)
