"""Publication: a checkpoint appears whole under its final name, or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from wsm_megatron.checkpoint.run_directory import (
    TRACKER_FILE,
    checkpoint_path,
    read_tracker,
    write_tracker,
)
from wsm_megatron.errors import MergeError
from wsm_megatron.storage.durable import fsync_path
from wsm_megatron.storage.journal import SUFFIX as JOURNAL_SUFFIX
from wsm_megatron.storage.lock import Lock
from wsm_megatron.storage.retry import watched

logger = logging.getLogger(__name__)


class StagingDirectory:
    """A hidden directory beside the target, renamed to it when everything is in. For rank 0.

    Whoever does not hold the target's lock, or not any more, touches nothing: it is another
    merge's by now.

    Args:
        key: of what is merged, how, and what is stored where. A merge with the same key goes on
            from what one that died has finished.
        files: names of the ranks' files.
        lock: the target's, which is held.
    """

    def __init__(self, root: Path, iteration: int, key: str, files: Collection[str], lock: Lock):
        self.root, self.iteration = root, iteration
        self.target = checkpoint_path(root, iteration)
        self.path = root / f".{self.target.name}.wsm-{key}"
        self.published = False
        self._journals = journals(self.path)
        self._files, self._lock = files, lock

    def create(self) -> Path:
        """Remove what dead merges have left of the target, but what this one goes on from; make the
        directory.

        Raises:
            MergeError: no permission, or the target's lock is another's.
        """
        self._lock.check()
        try:
            self._remove_leftovers()
            for directory in (self._journals, self.path):
                with watched(partial("{}: creating".format, directory)):
                    directory.mkdir(exist_ok=True)
        except OSError as error:
            raise MergeError(f"{self.path}: cannot create: {error.strerror}") from error
        return self.path

    def commit(self) -> Path:
        """Give the finished directory its final name, then move the tracker. Durable."""
        try:
            publish(self.path, self.target, self._check_lock)
            self.published = True
            fsync_path(self.root)
        except OSError as error:
            raise MergeError(f"{self.target}: cannot publish: {error.strerror}") from error
        advance_tracker(self.root, self.iteration)
        remove([self._journals])  # only now: until its name was there, it could be gone on with
        return self.target

    def discard(self) -> None:
        """Remove what a failed merge has written."""
        if self._is_mine():
            remove([self.path, self._journals])

    def keep(self) -> None:
        """Leave what is finished to the next merge with the same key; if nothing is, nothing."""
        if not self._is_mine():
            return
        if any(journal.stat().st_size for journal in self._journals.glob(f"*{JOURNAL_SUFFIX}")):
            logger.warning("%s is kept: the same command continues it", self.path)
        else:
            self.discard()

    def _check_lock(self) -> None:
        with watched(lambda: f"{self._lock.path}: reading"):
            self._lock.check()

    def _is_mine(self) -> bool:
        if self.published:
            logger.warning("%s was published before that", self.target)
            return False
        with suppress(OSError):  # storage that fails; the next merge removes what is left
            return self._lock.holds()
        return False

    def _remove_leftovers(self) -> None:
        goes_on = self.path.is_dir() and self._journals.is_dir()
        own = {self.path, self._journals} if goes_on else set[Path]()
        for old in leftovers(self.target):
            if old not in own:
                logger.warning("%s is left of a merge that died; removing it", old)
                remove([old])
        if goes_on:
            logger.warning("%s is left of a merge that died; continuing it", self.path)
            for child in self.path.iterdir():  # what was about to be published is made again
                if child.name not in self._files:
                    remove([child])


def publish(directory: Path, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Give a finished directory its final name; durable once the folder of that is synced.

    Args:
        check: called last of all; what it raises leaves everything as it is.

    Raises:
        MergeError: something has that name.
    """
    fsync_path(directory)
    if os.path.lexists(target):
        raise MergeError(f"{target} appeared during the merge; it is left alone")
    check()
    with watched(lambda: f"{directory}: renaming to {target.name}"):
        os.rename(directory, target)


def journals(directory: Path) -> Path:
    """Where the journals of files are that are written to a hidden directory."""
    return directory.with_name(directory.name + ".journals")


def lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.wsm.lock")


def leftovers(target: Path) -> list[Path]:
    """Hidden directories of merges that have not come to their end, or are still running."""
    return sorted(target.parent.glob(f".{target.name}.wsm-*"))


def remove(paths: Iterable[Path]) -> None:
    """Files and directories, as far as it can be; file by file, as large ones take their time."""
    for path in paths:
        for folder, _, names in os.walk(path):
            for name in names:
                _unlink(Path(folder, name))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            _unlink(path)


def _unlink(path: Path) -> None:
    with suppress(OSError), watched(lambda: f"{path}: removing"):
        path.unlink(missing_ok=True)


def advance_tracker(root: Path, iteration: int) -> None:
    """Point the tracker of merged checkpoints at ``iteration``, unless it is at a newer one.

    Merges of one root may end in any order, at the same time too: the newest stays. A tracker of a
    newer checkpoint that is gone is moved back.

    Raises:
        MergeError: it cannot be written.
    """
    lock = Lock(root / f".{TRACKER_FILE}.wsm.lock", "moving the tracker")
    try:
        if _needs_no_move(root, iteration, read_tracker(root)) and not lock.path.exists():
            return
        lock.acquire()
        text = read_tracker(root)
        if not _needs_no_move(root, iteration, text):
            if text is not None and not text.isdecimal():
                logger.warning(
                    "%s said %r, which is no iteration; it says %d now, the newest merge",
                    root / TRACKER_FILE,
                    text[:40],
                    iteration,
                )
            write_tracker(root, iteration)
    except OSError as error:
        raise MergeError(f"{root / TRACKER_FILE}: cannot write: {error.strerror}") from error
    finally:
        lock.release()


def _needs_no_move(root: Path, iteration: int, text: str | None) -> bool:
    if text is None or not text.isdecimal():
        return False
    return int(text) == iteration or (
        int(text) > iteration and checkpoint_path(root, int(text)).is_dir()
    )
