"""Files that many threads write by position: the writing, and the CRC-32 of the whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from isal.isal_zlib import crc32_combine

from wsm_megatron.errors import StorageError
from wsm_megatron.storage.retry import watched


def write_at(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of ``data`` to an open file, from byte ``offset`` on.

    Raises ``StorageError``, naming ``path``.
    """
    done = 0
    while done < len(data):
        try:
            with watched(partial(_place, path, offset + done)):
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise _failed(path, error) from error


def write_runs(descriptor: int, data: memoryview, offsets: Sequence[int], path: Path) -> None:
    """Write parts of ``data``, all of one length, each from its own byte on."""
    nbytes = len(data) // len(offsets)
    try:
        with watched(partial(_place, path, offsets[0])):
            for n, offset in enumerate(offsets):
                run = data[n * nbytes : (n + 1) * nbytes]
                done = os.pwrite(descriptor, run, offset)
                if done < nbytes:
                    write_at(descriptor, run[done:], offset + done, path)
    except OSError as error:
        raise _failed(path, error) from error


def whole_of(parts: Iterable[tuple[int, int, int]], path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file, from offset, length and CRC-32 of parts that leave no gap."""
    crc, position = 0, 0
    for offset, length, part in sorted(parts):
        assert offset == position, f"a gap at byte {position} of {path}"
        crc, position = crc32_combine(crc, part, length), offset + length
    return position, crc


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot write: {error.strerror}; nothing was published")


def _place(path: Path, position: int) -> str:
    return f"{path}: writing at byte {position}"
