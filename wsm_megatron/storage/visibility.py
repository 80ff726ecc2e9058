"""What one node has written, another sees: at once on most file systems, after a while on NFS."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from wsm_megatron.errors import StorageError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage.retry import watched, with_retries

_PAUSES = (0.05, 2.0)


def wait_for_directory(path: Path, check: Callable[[], None]) -> None:
    """Wait until a directory that another rank has made is seen here.

    Args:
        check: called between two looks, so that a failure elsewhere ends the wait.

    Raises:
        StorageError: it is not seen within ``visible_within``.
    """
    if not _comes_true(lambda: _sees(path), check):
        raise StorageError(
            f"{path}, made by rank 0, is not there after {timeouts.visible_within:.0f} s: "
            "do all nodes see the same --save?"
        )


def wait_for_files(directory: Path, sizes: Mapping[str, int], check: Callable[[], None]) -> None:
    """Wait until files of other ranks are seen here with all their bytes.

    Raises:
        StorageError: naming a file that is not, and its sizes.
    """
    waiting = dict(sizes)

    def all_there() -> bool:
        _ask_anew(directory)
        for name in [name for name, size in waiting.items() if _size(directory / name) == size]:
            del waiting[name]
        return not waiting

    if not _comes_true(all_there, check):
        name, size = next(iter(waiting.items()))
        found = _size(directory / name)
        raise StorageError(
            f"{directory / name}: {'missing' if found is None else f'{found} bytes'} where its "
            f"rank has written {size}, {timeouts.visible_within:.0f} s ago; do all nodes see "
            "the same --save? Nothing was published"
        )


def _comes_true(seen: Callable[[], bool], check: Callable[[], None]) -> bool:
    until = time.monotonic() + timeouts.visible_within
    pause, longest = _PAUSES
    while not seen():
        if time.monotonic() > until:
            return False
        check()
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True


def _sees(path: Path) -> bool:
    _ask_anew(path.parent)
    return with_retries(path.is_dir, lambda: f"{path}: looking")


def _size(path: Path) -> int | None:
    """Bytes in a file; None where there is none."""

    def look() -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    return with_retries(look, lambda: f"{path}: looking")


def _ask_anew(directory: Path) -> None:
    """Opening a directory lets an NFS client ask the server for what has changed in it."""
    with suppress(OSError), watched(lambda: f"{directory}: opening"):  # the look itself will tell
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
