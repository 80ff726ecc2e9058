"""Where a job writes: never into the run that it reads, under whatever name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.named_sources import source_path
from wsm_megatron.schedule.order import SEQUENTIAL

_Id = tuple[int, int]
"""Device and inode: the same for all names of a directory, through links and bind mounts too."""


def check_outputs(
    merges: MergeConfig | MergeSet, execution: ExecutionOptions = ExecutionOptions()
) -> None:
    """Everything that a merge writes is outside of the run and of its checkpoints.

    A root of merged checkpoints may lie below the run, in a directory of its own. Looks at the
    file system of this rank; writes nothing.

    Raises:
        UsageError: naming the option and what it would write into.
    """
    merges = MergeSet.of(merges) if isinstance(merges, MergeConfig) else merges
    run = _run_of(merges)
    made: dict[_Id | Path, str] = {}
    for one in merges.merges:
        root = one.save
        of = f"--save {root}" if root == merges.save else f"--save {merges.save}: {root}"
        run.refuse(root, of)
        place, merge = root.resolve(), _describe(one)
        other = made.setdefault(_id(place) or place, merge)
        if other != merge:
            raise UsageError(
                f"the merges with {other} and with {merge} would both be saved to {root}; give "
                "files of other names, or make them one by one"
            )
    if execution.log_json is not None:
        run.refuse_file(execution.log_json, f"--log-json {execution.log_json}")


def check_export(merges: MergeSet, root: Path, what: str) -> None:
    """A folder that exports of merges go to is outside of the run and of its checkpoints too.

    Args:
        what: the option, for messages.

    Raises:
        UsageError: as :func:`check_outputs`.
    """
    _run_of(merges).refuse(root, what)


def _run_of(merges: MergeSet) -> _Run:
    shared = merges.shared
    if shared.load is None:
        return _Run.of_sources([source_path(one.path) for one in shared.sources])
    return _Run.of(shared.load)


def _describe(one: MergeConfig) -> str:
    lengths = {"--window-iterations": one.window_iterations, "--window-tokens": one.window_tokens}
    windows = [f"{option} {values[0]}" for option, values in lengths.items() if values]
    order = [] if one.order == SEQUENTIAL else [f"--order {one.order}"]
    floor = [f"--min-decay {one.min_decay}"] if one.min_decay else []
    return " ".join([f"--decay {one.decay}", *floor, *order, *windows])


@dataclass(frozen=True)
class _Run:
    """What is never written to.

    Attributes:
        roots: the run's directory, and where those of its checkpoints lie that are links.
        checkpoints: all of their ``iter_*`` folders.
    """

    roots: dict[_Id, Path]
    checkpoints: dict[_Id, Path]

    @classmethod
    def of(cls, path: Path) -> _Run:
        own = list(_checkpoints(path))
        roots = {path, *(child.resolve().parent for child in own)}
        return cls(
            _by_id(sorted(roots, key=lambda root: root != path)),
            _by_id(child for root in roots for child in _checkpoints(root)),
        )

    @classmethod
    def of_sources(cls, sources: Sequence[Path]) -> _Run:
        """The folders of sources that were named, and where these lie."""
        roots = [folder for path in sources for folder in (path.parent, path.resolve().parent)]
        return cls(_by_id(roots), _by_id(sources))

    def refuse(self, directory: Path, what: str) -> None:
        """Raise where a directory that is to be written to is the run's, or a checkpoint's."""
        place = directory.resolve()
        for folder in (place, *place.parents):
            name = _id(folder)
            if name is None:
                continue
            if folder == place and name in self.roots:
                self._refuse(f"{what} is the run itself, {self.roots[name]}")
            if name in self.checkpoints:
                self._refuse(f"{what} is inside of the checkpoint {self.checkpoints[name]}")

    def refuse_file(self, file: Path, what: str) -> None:
        """The same for a file, also where it is another name of a checkpoint's file."""
        place = file.resolve()
        self.refuse(place.parent, f"{what}: its folder")
        if place.is_file() and place.stat().st_nlink > 1:
            for checkpoint in self.checkpoints.values():
                if _id(place) in _by_id(checkpoint.iterdir()):
                    self._refuse(f"{what} is a file of the checkpoint {checkpoint}")

    def _refuse(self, what: str) -> None:
        raise UsageError(f"{what}; sources are never written to, give another one")


def _checkpoints(root: Path) -> Iterator[Path]:
    return (child for child in root.glob("iter_*") if child.is_dir())


def _by_id(paths: Iterable[Path]) -> dict[_Id, Path]:
    found: dict[_Id, Path] = {}
    for path in paths:
        if (known := _id(path)) is not None:
            found.setdefault(known, path)
    return found


def _id(path: Path) -> _Id | None:
    """None where there is nothing yet, or nothing that this user may see."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    return stat.st_dev, stat.st_ino
