"""Directories that change while they are read: noticed early, by a few looks at their files."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from wsm_megatron.errors import MergeError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage.fingerprint import Fingerprint, check_unchanged
from wsm_megatron.storage.retry import with_retries

DIRECTORIES_A_LOOK = 16
"""Directories that one look is for, by two ``stat`` each: metadata servers are not to feel it."""


class ChangeWatch:
    """Looks at directories now and then, each in turn, on a thread of its own. For one rank.

    A look asks when the directory changed, which it does when a file comes or goes, and how one of
    its files is, the next one each time. Where either is not as it was, the directory is listed
    and compared. A context manager; the last word is :func:`.check_unchanged` at the end.

    Args:
        directories: each with what its files were when it was opened.
    """

    def __init__(self, directories: Mapping[Path, Fingerprint]):
        self._directories, self._turn = list(directories.items()), 0
        self._changed = {path: _state(path) for path in directories}
        self._error: MergeError | None = None
        self._ended = threading.Event()

    def __enter__(self) -> ChangeWatch:
        threading.Thread(target=self._run, name="wsm-change-watch", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()

    def check(self) -> None:
        """Raise ``MergeError``, naming the directory, once one was seen to have changed."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._ended.wait(timeouts.look_every):
                self._look()
        except MergeError as error:
            self._error = error

    def _look(self) -> None:
        for _ in range(min(DIRECTORIES_A_LOOK, len(self._directories))):
            self._look_at_next()

    def _look_at_next(self) -> None:
        round_, j = divmod(self._turn, len(self._directories))
        self._turn += 1
        path, before = self._directories[j]
        name, size, modified, _ = before[round_ % len(before)]
        directory, file = _state(path), _state(path / name)
        as_it_was = directory is not None and directory == self._changed[path]
        if not as_it_was or file != (size, modified):
            check_unchanged(path, before)
            self._changed[path] = directory


def _state(path: Path) -> tuple[int, int] | None:
    """Size and modification time (ns); None where there is nothing."""
    return with_retries(partial(_stat, path), lambda: f"{path}: looking")


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
