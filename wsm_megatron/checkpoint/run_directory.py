"""A Megatron run directory: ``iter_XXXXXXX`` folders and the tracker."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wsm_megatron.checkpoint.bridge import LATEST_FILE, TRAIN_STATE_FILE
from wsm_megatron.checkpoint.foreign_formats import Kind, kind_of
from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.errors import UsageError
from wsm_megatron.storage.durable import fsync_path, replace_file
from wsm_megatron.storage.retry import with_retries

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What Megatron names a checkpoint that is of no iteration, in folder and tracker."""

_ITERATION = re.compile(r"iter_([0-9]+)")
_DEEPSPEED = re.compile(r"global_step[0-9]+")
_TRACKER_BYTES = 64  # of a tracker that is read: no iteration is longer


@dataclass(frozen=True)
class Unusable:
    """Something in a run directory that looks like a checkpoint, and that no merge can be of.

    Attributes:
        iteration: what its name says; None where that is no iteration.
        kind: what it is instead, and the way out.
    """

    name: str
    iteration: int | None
    kind: Kind

    def __str__(self) -> str:
        return f"{self.name} is {self.kind.what}: {self.kind.way_out}"


@dataclass(frozen=True)
class RunDirectory:
    """The checkpoints of a run, by iteration.

    Attributes:
        finished: those with ``metadata.json``.
        unusable: what else is there.
        tracker: the tracker's text (:func:`read_tracker`).
    """

    path: Path
    finished: tuple[int, ...]
    unusable: tuple[Unusable, ...] = ()
    tracker: str | None = None

    def checkpoint(self, iteration: int) -> Path:
        return checkpoint_path(self.path, iteration)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Iterations whose folder Megatron would load, were it finished."""
        named = [(one.name, one.iteration) for one in self.unusable if one.iteration is not None]
        return tuple(sorted(i for name, i in named if name == checkpoint_name(i)))

    @property
    def tracked(self) -> int | None:
        """The iteration that Megatron would load."""
        return tracked_iteration(self.tracker)


def checkpoint_name(iteration: int) -> str:
    """Megatron's folder name for an iteration (``get_checkpoint_name``)."""
    return f"iter_{iteration:07d}"


def checkpoint_path(root: Path, iteration: int) -> Path:
    """The folder of an iteration."""
    return root / checkpoint_name(iteration)


def named_iteration(path: Path) -> int | None:
    """The iteration in a folder's name; None where that is none of Megatron's."""
    match = _ITERATION.fullmatch(path.name)
    return int(match[1]) if match else None


def scan_run(path: Path) -> RunDirectory:
    """List a run directory.

    Raises:
        UsageError: no such directory, or nothing in it that looks like a checkpoint.
        MergeError: it cannot be listed.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such run directory")
    children = with_retries(lambda: sorted(path.iterdir()), lambda: f"{path}: listing")
    finished, unusable = [], []
    for child in children:
        match = _ITERATION.fullmatch(child.name)
        iteration = int(match[1]) if match else None
        if kind := with_retries(partial(_kind, child, iteration), partial(_looking, child)):
            unusable.append(Unusable(child.name, iteration, kind))
        elif iteration is not None:
            finished.append(iteration)
    if not finished and not unusable:
        hint = "; give its parent" if _ITERATION.fullmatch(path.name) else ""
        raise UsageError(f"{path}: no iter_XXXXXXX checkpoint in this directory{hint}")
    return RunDirectory(path, tuple(sorted(finished)), tuple(unusable), read_tracker(path))


def list_checkpoints(path: Path) -> dict[int, Path]:
    """The ``iter_XXXXXXX`` folders of a run directory, finished or not, by iteration."""
    return {
        int(match[1]): child
        for child in path.iterdir()
        if (match := _ITERATION.fullmatch(child.name))
        and child.name == checkpoint_name(int(match[1]))
        and child.is_dir()
    }


def _kind(child: Path, iteration: int | None) -> Kind | None:
    """Why something in a run directory is no checkpoint that merges; None for what is, and for
    what does not look like a checkpoint."""
    if iteration is None:
        return _kind_by_name(child)
    if child.name != (name := checkpoint_name(iteration)):
        if (child.parent / name).exists():
            what = f"a second folder of iteration {iteration}"
            return Kind(what, f"Megatron loads {name}; move one of the two away")
        what = "not named as Megatron names checkpoints"
        return Kind(what, f"rename it, iter_ and seven digits ({name})")
    try:
        if child.is_dir():
            return None if is_complete(child) else kind_of(child)
    except PermissionError as error:
        return Kind(f"not readable ({error.strerror})", "let this user read it, or move it away")
    if child.is_symlink():
        return Kind(f"a link that leads nowhere (to {os.readlink(child)})", "mend or remove it")
    return Kind("not a folder", "move it away")


def _looking(path: Path) -> str:
    return f"{path}: looking"


def _kind_by_name(child: Path) -> Kind | None:
    if child.name == RELEASE and child.is_dir():
        return Kind(
            "a release checkpoint, weights of no iteration",
            "to merge it, name it and the others with --source PATH",
        )
    if _DEEPSPEED.fullmatch(child.name):
        return Kind("a DeepSpeed checkpoint", "only Megatron's torch_dist checkpoints merge")
    return None


def write_tracker(root: Path, iteration: int) -> None:
    """Point ``root``'s tracker at ``iteration``, and Megatron-Bridge's where the checkpoint has a
    train state of Bridge's; each atomically and durably."""
    state = checkpoint_path(root, iteration) / TRAIN_STATE_FILE
    if state.is_file():
        replace_file(root / LATEST_FILE, state.read_bytes())
    replace_file(root / TRACKER_FILE, str(iteration).encode())
    fsync_path(root)


def read_tracker(root: Path) -> str | None:
    """The tracker's text (an iteration, or ``release``), shortened and printable whatever it holds;
    None where there is none."""
    path = root / TRACKER_FILE

    def read() -> bytes:
        with path.open("rb") as stream:
            return stream.read(_TRACKER_BYTES + 1)

    if not path.is_file():
        return None
    data = with_retries(read, lambda: f"{path}: reading")
    text = data[:_TRACKER_BYTES].decode("ascii", "backslashreplace").strip()
    text = text.encode("unicode_escape").decode("ascii")
    return f"{text}..." if len(data) > _TRACKER_BYTES else text


def tracked_iteration(text: str | None) -> int | None:
    """The iteration that a tracker names by its text; None where it names none."""
    return int(text) if text is not None and re.fullmatch("[0-9]+", text) else None


def why_untracked(text: str) -> str:
    """Why a tracker's text is no iteration: a clause after its path."""
    if text == RELEASE:
        return "says release: it names a checkpoint of no iteration"
    return f"says {text!r}, which is neither an iteration nor release" if text else "is empty"
