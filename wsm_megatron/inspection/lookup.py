"""What a path on the command line means: a checkpoint, a tracker, a root, a folder of roots."""

from __future__ import annotations

from pathlib import Path

from wsm_megatron.checkpoint.bridge import LATEST_FILE
from wsm_megatron.checkpoint.layout import METADATA_FILE, is_complete
from wsm_megatron.checkpoint.run_directory import (
    RELEASE,
    TRACKER_FILE,
    list_checkpoints,
    read_tracker,
    scan_run,
    tracked_iteration,
    why_untracked,
)
from wsm_megatron.errors import UsageError

_TRACKERS = (TRACKER_FILE, LATEST_FILE)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that a path means, finished or not, in the order of their iterations.

    Args:
        path: a checkpoint; a tracker, for the checkpoint that it names; a root, for all of its
            checkpoints; a folder of roots.

    Raises:
        UsageError: nothing of this is there.
    """
    if is_tracker(path):
        return [tracked_checkpoint(path)]
    if not path.is_dir() or is_checkpoint(path):
        return [path]
    if found := [checkpoint for root in roots_at(path) for checkpoint in _of_root(root)]:
        return found
    raise UsageError(f"{path}: {'; '.join(map(str, scan_run(path).unusable))}")


def roots_at(path: Path) -> list[Path]:
    """The root that a path is, or the roots in it; by name. A folder in which something only looks
    like a checkpoint is a root too.

    Raises:
        UsageError: no such directory, or neither of the two.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory")
    if _is_root(path):
        return [path]
    if roots := sorted(child for child in path.iterdir() if child.is_dir() and _is_root(child)):
        return roots
    scan_run(path)  # raises where nothing is there
    return [path]


def tracked_checkpoint(tracker: Path) -> Path:
    """The checkpoint that a tracker names.

    Raises:
        UsageError: it names none, or one that is not there.
    """
    root = tracker.parent
    text = read_tracker(root)
    if text is None:
        raise UsageError(f"{tracker}: {TRACKER_FILE} is not beside it; name the checkpoint")
    iteration = tracked_iteration(text)
    if iteration is None and text != RELEASE:
        raise UsageError(f"{tracker} {why_untracked(text)}; name the checkpoint that is meant")
    found = root / RELEASE if iteration is None else list_checkpoints(root).get(iteration)
    if found is None or not found.is_dir():
        raise UsageError(f"{tracker} names {text}, of which there is no checkpoint")
    return found


def is_tracker(path: Path) -> bool:
    return path.name in _TRACKERS and path.is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is itself a checkpoint, rather than a run of them."""
    named = path.name.startswith("iter_") or path.name == RELEASE
    return is_complete(path) or (path / METADATA_FILE).is_file() or named


def _is_root(path: Path) -> bool:
    return not is_checkpoint(path) and (bool(list_checkpoints(path)) or (path / RELEASE).is_dir())


def _of_root(root: Path) -> list[Path]:
    released = [root / RELEASE] if (root / RELEASE).is_dir() else []
    return [*released, *(path for _, path in sorted(list_checkpoints(root).items()))]
