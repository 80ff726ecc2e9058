"""``trajectory.json``: what was found of the path that a window's checkpoints lie on."""

from __future__ import annotations

import json
from pathlib import Path

from wsm_megatron.storage.durable import fsync_path, replace_file
from wsm_megatron.storage.json_file import read_json
from wsm_megatron.trajectory.record import Trajectory

NAME = "trajectory.json"


def write_trajectory(folder: Path, found: Trajectory) -> Path:
    """Write it into a folder, atomically; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    replace_file(path, (json.dumps(found.as_data()) + "\n").encode())
    fsync_path(folder)
    return path


def read_trajectory(path: Path) -> Trajectory:
    """Raises ``MergeError`` for a file that is damaged, not there, or something else."""
    return Trajectory.of_data(read_json(path), str(path))
