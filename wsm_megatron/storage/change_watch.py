"""Sources that change while they are read: noticed early, by a few looks at their files."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wsm_megatron.errors import MergeError
from wsm_megatron.planning.sources import Source
from wsm_megatron.storage.retry import patiently

LOOK_EVERY = 15.0
"""Seconds between two looks."""
SOURCES_A_LOOK = 16
"""Sources that one look is for, by two ``stat`` each: metadata servers are not to feel it."""


class SourceWatch:
    """Looks at the sources now and then, each in turn, on a thread of its own. For one rank.

    A look asks when the directory changed, which it does when a file comes or goes, and how one of
    its files is, the next one each time. Where either is not as it was, the directory is listed
    and compared. A context manager; the last word is :meth:`.Source.check_unchanged` at the end.
    """

    def __init__(self, sources: Sequence[Source]):
        self._sources, self._turn = sources, 0
        self._changed = {source.path: _state(source.path) for source in sources}
        self._error: MergeError | None = None
        self._ended = threading.Event()

    def __enter__(self) -> SourceWatch:
        threading.Thread(target=self._run, name="wsm-sources", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()

    def check(self) -> None:
        """Raise ``MergeError``, naming the checkpoint, once one was seen to have changed."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._ended.wait(LOOK_EVERY):
                self._look()
        except MergeError as error:
            self._error = error

    def _look(self) -> None:
        for _ in range(min(SOURCES_A_LOOK, len(self._sources))):
            self._look_at_next()

    def _look_at_next(self) -> None:
        round_, j = divmod(self._turn, len(self._sources))
        self._turn += 1
        source = self._sources[j]
        name, size, modified, _ = source.fingerprint[round_ % len(source.fingerprint)]
        directory, file = _state(source.path), _state(source.path / name)
        as_it_was = directory is not None and directory == self._changed[source.path]
        if not as_it_was or file != (size, modified):
            source.check_unchanged()
            self._changed[source.path] = directory


def _state(path: Path) -> tuple[int, int] | None:
    """Size and modification time (ns); None where there is nothing."""
    return patiently(partial(_stat, path), lambda: f"{path}: looking")


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
