"""Cores by the quota of control groups, read from made file systems."""

import pytest

from app.system.cores import available_cores, quota_cores

V2 = "0::/\n"
SERVICE = "0::/system.slice/scumble.service\n"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n"
CGROUP = "sys/fs/cgroup"
CASES = {
    "no control groups": ({}, None),
    "no limit": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": "max 100000\n"}, None),
    "whole cores": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": "200000 100000\n"}, 2),
    "rounded up": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": "150000 100000\n"}, 2),
    "less than one": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": "5000 100000\n"}, 1),
    "another period": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": "30000 10000\n"}, 3),
    "of a systemd service": (
        {
            "proc/self/cgroup": SERVICE,
            f"{CGROUP}/system.slice/cpu.max": "max 100000\n",
            f"{CGROUP}/system.slice/scumble.service/cpu.max": "400000 100000\n",
        },
        4,
    ),
    "of the slice above": (
        {
            "proc/self/cgroup": SERVICE,
            f"{CGROUP}/system.slice/cpu.max": "100000 100000\n",
            f"{CGROUP}/system.slice/scumble.service/cpu.max": "400000 100000\n",
        },
        1,
    ),
    "path of the host": (
        {"proc/self/cgroup": "0::/kubepods/pod1/c1\n", f"{CGROUP}/cpu.max": "300000 100000\n"},
        3,
    ),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            f"{CGROUP}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
            f"{CGROUP}/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1 in a container": (
        {
            "proc/self/cgroup": V1,
            f"{CGROUP}/cpu/cpu.cfs_quota_us": "50000\n",
            f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": V1,
            f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1\n",
            f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "both versions": (
        {
            "proc/self/cgroup": V1 + V2,
            f"{CGROUP}/cpu/cpu.cfs_quota_us": "200000\n",
            f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
            f"{CGROUP}/unified/cgroup.procs": "1\n",
        },
        2,
    ),
    "another controller": (
        {"proc/self/cgroup": "2:cpuset:/\n", f"{CGROUP}/cpu/cpu.cfs_quota_us": "100000\n"},
        None,
    ),
    "empty file": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": ""}, None),
    "no period": ({"proc/self/cgroup": V2, f"{CGROUP}/cpu.max": "100000 0\n"}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_cores_follow_the_quota(tmp_path, name):
    files, cores = CASES[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert quota_cores(tmp_path) == cores


def test_this_process_has_a_core():
    assert available_cores() >= 1
