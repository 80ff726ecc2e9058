"""A Megatron run directory: ``iter_XXXXXXX`` folders and the tracker."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.checkpoint.bridge import LATEST_FILE, TRAIN_STATE_FILE
from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.patience import watched

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class RunDirectory:
    """The checkpoints of a run, by iteration; ``unfinished`` ones lack ``metadata.json``."""

    path: Path
    finished: tuple[int, ...]
    unfinished: tuple[int, ...]

    def checkpoint(self, iteration: int) -> Path:
        return checkpoint_path(self.path, iteration)


def checkpoint_path(root: Path, iteration: int) -> Path:
    """Megatron's folder name for an iteration (``get_checkpoint_name``)."""
    return root / f"iter_{iteration:07d}"


def scan_run(path: Path) -> RunDirectory:
    """List a run directory.

    Raises:
        ValueError: no such directory, or no checkpoint in it.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    with watched(lambda: f"{path}: listing"):
        found = list_checkpoints(path)
    if not found:
        hint = "; give its parent" if _ITERATION.fullmatch(path.name) else ""
        raise ValueError(f"{path}: no iter_XXXXXXX checkpoint in this directory{hint}")
    finished = tuple(sorted(i for i, child in found.items() if is_complete(child)))
    unfinished = tuple(sorted(set(found) - set(finished)))
    return RunDirectory(path, finished, unfinished)


def list_checkpoints(path: Path) -> dict[int, Path]:
    """The ``iter_XXXXXXX`` folders of a run directory, finished or not, by iteration."""
    return {
        int(match[1]): child
        for child in path.iterdir()
        if (match := _ITERATION.fullmatch(child.name)) and child.is_dir()
    }


def write_tracker(root: Path, iteration: int) -> None:
    """Point ``root``'s tracker at ``iteration``, and Megatron-Bridge's where the checkpoint has a
    train state of Bridge's; each atomically and durably."""
    state = checkpoint_path(root, iteration) / TRAIN_STATE_FILE
    if state.is_file():
        _replace(root / LATEST_FILE, state.read_bytes())
    _replace(root / TRACKER_FILE, str(iteration).encode())
    sync_directory(root)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    with watched(lambda: f"{path}: writing"):
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)


def read_tracker(root: Path) -> str | None:
    """The tracker's text (an iteration, or ``release``); None where there is none."""
    path = root / TRACKER_FILE
    return path.read_text(errors="replace").strip() if path.is_file() else None


def sync_directory(path: Path) -> None:
    """Make renames and new files in a directory durable."""
    with watched(lambda: f"{path}: syncing"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
