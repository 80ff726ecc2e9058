"""Host memory: what is free, within the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsm_megatron.process.memory import available_memory

FREE = 1000 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 1000 kB free and no control groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  1000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/rank\n")
    return tmp_path


def group(folder: Path, limit: str, used: int, cache: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "total_" if version == 1 else ""
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 1\n{prefix}inactive_file {cache // 2}\n{prefix}active_file {cache - cache // 2}\n"
    )


def test_without_groups_the_host_counts(root: Path) -> None:
    assert available_memory(root) == FREE


def test_the_tightest_group_counts_and_page_cache_is_free(root: Path) -> None:
    group(root / "sys/fs/cgroup/job/rank", "max", 10, 0)
    group(root / "sys/fs/cgroup/job", "50000", 30000, 5000)
    group(root / "sys/fs/cgroup", "900000", 30000, 0)
    assert available_memory(root) == 25000


def test_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("9:name=systemd:/x\n4:cpu,memory:/job\n0::/\n")
    group(root / "sys/fs/cgroup/memory/job", "40000", 30000, 1000, version=1)
    group(root / "sys/fs/cgroup/memory", str(2**63 - 4096), 30000, 0, version=1)
    assert available_memory(root) == 11000


def test_a_group_seen_from_inside_its_container(root: Path) -> None:
    """The path in /proc is the host's; only the top is mounted."""
    group(root / "sys/fs/cgroup", "30000", 10000, 0)
    assert available_memory(root) == 20000


def test_a_kernel_without_groups(root: Path) -> None:
    (root / "proc/self/cgroup").unlink()
    assert available_memory(root) == FREE


def test_a_group_that_is_full(root: Path) -> None:
    group(root / "sys/fs/cgroup", "30000", 40000, 0)
    assert available_memory(root) == 0
