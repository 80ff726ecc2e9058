"""The control groups that this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def own_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """The folder of each group that a controller limits this process by, from its own up to the
    topmost that is seen from here, and whether it is of version 2.

    Args:
        controller: ``memory`` or ``cpu``.
        root: where ``proc`` and ``sys`` are; another one in tests.
    """
    groups = root / "proc/self/cgroup"
    if not groups.exists():  # a kernel without control groups
        return
    for line in groups.read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        own = top / place.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, controllers == ""
            if folder == top:
                break
