"""Host memory that this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wsm_megatron.process.control_groups import own_groups

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")
_PAGE_CACHE = ("active_file", "inactive_file")  # without tmpfs, which cannot be dropped


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that are free on the host and within every limit of this process's control groups.

    Page cache does not count as used: the kernel drops it when memory is short.

    Args:
        root: where ``proc`` and ``sys`` are; another one in tests.
    """
    free = _numbers(root / "proc/meminfo")["MemAvailable:"] * 1024
    return max(0, min([free, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each group with a limit leaves, from this process's own up to the root's."""
    for folder, is_v2 in own_groups("memory", root):
        if (left := _left(folder, *(_V2 if is_v2 else _V1))) is not None:
            yield left


def _left(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    """None where the group has no limit, or is not seen from here."""
    try:
        most = (folder / limit).read_text().strip()
        taken = int((folder / used).read_text())
        stat = _numbers(folder / "memory.stat")
    except OSError:
        return None
    cache = sum(stat.get(prefix + name, 0) for name in _PAGE_CACHE)
    return None if most == "max" else int(most) - taken + cache


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
