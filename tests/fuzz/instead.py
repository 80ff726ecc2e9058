"""What stands in a file's place."""

from __future__ import annotations

import os
from pathlib import Path

LINKS = ("loop", "link", "null", "dangling")


def put(path: Path, make: str, away: Path | None = None) -> None:
    """Make something where a file was: ``nothing``, ``folder``, ``fifo``, ``empty``, or a link.

    Args:
        away: where a ``link`` leads.
    """
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "empty":
        path.touch()
    elif make in LINKS:
        targets = {"loop": path.name, "link": away, "null": "/dev/null", "dangling": "nowhere"}
        path.symlink_to(targets[make])
