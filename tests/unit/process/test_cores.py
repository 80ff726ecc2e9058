"""Cores: those that this process may run on, within the quotas of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsm_megatron.process.cores import usable_cores


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/pod/rank\n")
    return tmp_path


def limit(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{text}\n")


def test_without_quotas_the_affinity_counts(root: Path) -> None:
    assert usable_cores(root) == 64
    (root / "proc/self/cgroup").unlink()
    assert usable_cores(root) == 64


def test_the_tightest_quota_counts_in_whole_cores(root: Path) -> None:
    limit(root / "sys/fs/cgroup/pod/rank", "cpu.max", "max 100000")
    limit(root / "sys/fs/cgroup/pod", "cpu.max", "350000 100000")
    limit(root / "sys/fs/cgroup", "cpu.max", "800000 100000")
    assert usable_cores(root) == 4


def test_less_than_a_core_is_one(root: Path) -> None:
    limit(root / "sys/fs/cgroup", "cpu.max", "20000 100000")
    assert usable_cores(root) == 1


def test_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("9:name=systemd:/x\n4:cpu,cpuacct:/job\n0::/\n")
    for folder, quota in (("cpu/job", "-1"), ("cpu", "600000")):
        limit(root / "sys/fs/cgroup" / folder, "cpu.cfs_quota_us", quota)
        limit(root / "sys/fs/cgroup" / folder, "cpu.cfs_period_us", "100000")
    assert usable_cores(root) == 6
