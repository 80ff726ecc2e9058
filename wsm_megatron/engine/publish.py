"""Publication: a checkpoint appears whole under its final name, or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from wsm_megatron.checkpoint.journal import SUFFIX as JOURNAL_SUFFIX
from wsm_megatron.checkpoint.patience import watched
from wsm_megatron.checkpoint.run import checkpoint_path, sync_directory, write_tracker
from wsm_megatron.engine.lock import Lock
from wsm_megatron.errors import MergeError

logger = logging.getLogger(__name__)


class Staging:
    """A hidden directory beside the target, renamed to it when everything is in. For rank 0.

    Args:
        key: of what is merged, how, and by how many ranks. A merge with the same key goes on from
            what one that died has finished.
    """

    def __init__(self, root: Path, iteration: int, key: str):
        self.root, self.iteration = root, iteration
        self.target = checkpoint_path(root, iteration)
        self.path = root / f".{self.target.name}.wsm-{key}"
        self._lock = Lock(root / f".{self.target.name}.wsm.lock")

    def create(self, nbytes: int) -> Path:
        """Lock the target, remove what dead merges have left of it, make the directory.

        Raises:
            ValueError: the target exists.
            MergeError: no permission, another merge of the target, or less than ``nbytes`` free.
        """
        self._refuse_existing()
        try:
            with watched(lambda: f"{self.root}: creating"):
                self.root.mkdir(parents=True, exist_ok=True)
            with watched(lambda: f"{self._lock.path}: locking"):
                self._lock.acquire()
            self._refuse_existing()  # published before the lock was free
            self._remove_leftovers()
            with watched(lambda: f"{self.path}: creating"):
                self.path.mkdir(exist_ok=True)
                there = sum(file.stat().st_size for file in self.path.iterdir())
                free = shutil.disk_usage(self.path).free + there
        except OSError as error:
            raise MergeError(f"{self.path}: cannot create: {error.strerror}") from error
        if free < nbytes:
            self.discard()
            raise MergeError(
                f"{self.root}: {nbytes / 1e9:.3f} GB needed and {free / 1e9:.3f} GB free; nothing "
                "was written"
            )
        return self.path

    def commit(self) -> Path:
        """Give the finished directory its final name, then move the tracker. Durable."""
        try:
            with watched(lambda: f"{self._lock.path}: reading"):
                self._lock.check()
            for journal in self._journals():
                with watched(lambda: f"{self.path}: removing its journals"):
                    journal.unlink()
            sync_directory(self.path)
            if os.path.lexists(self.target):
                raise MergeError(f"{self.target} appeared during the merge; it is left alone")
            with watched(lambda: f"{self.path}: renaming to {self.target.name}"):
                os.rename(self.path, self.target)
            sync_directory(self.root)
            self._lock.release()
            write_tracker(self.root, self.iteration)
        except OSError as error:
            raise MergeError(f"{self.target}: cannot publish: {error.strerror}") from error
        return self.target

    def discard(self) -> None:
        """Remove what a failed merge has written."""
        _remove(self.path)
        self._lock.release()

    def keep(self) -> None:
        """Leave what is finished to the next merge with the same key; if nothing is, nothing."""
        if not any(journal.stat().st_size for journal in self._journals()):
            self.discard()
            return
        logger.warning("%s is kept: the same command goes on from it", self.path)
        self._lock.release()

    def _journals(self) -> list[Path]:
        return list(self.path.glob(f"*{JOURNAL_SUFFIX}"))

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise ValueError(
                f"{self.target} exists and is left alone; give another --save or "
                "--output-iteration, or remove it"
            )

    def _remove_leftovers(self) -> None:
        for old in self.root.glob(f".{self.target.name}.wsm-*"):
            if old == self.path:
                _remove_all_but_shares(old)
                continue
            logger.warning("%s is left of a merge that died; removing it", old)
            _remove(old)


def _remove(directory: Path) -> None:
    """As far as it can be; file by file, because large ones take their time."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            with suppress(OSError), watched(partial("{}: removing".format, path)):
                path.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def _remove_all_but_shares(directory: Path) -> None:
    """What was about to be published is made again; what the ranks have written is gone on with."""
    logger.warning("%s is left of a merge that died; going on from it", directory)
    for child in directory.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.suffix not in (".distcp", JOURNAL_SUFFIX):
            child.unlink()
