"""What is on disk, and stays there when the machine loses power."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from wsm_megatron.storage.retry import watched


def fsync_path(path: Path) -> None:
    """Make a file's contents durable, or a directory's renames and new files."""
    with watched(lambda: f"{path}: syncing"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file, atomically; durable once its directory is synced."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    with watched(lambda: f"{path}: writing"):
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
