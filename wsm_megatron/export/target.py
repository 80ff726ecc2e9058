"""The folder that an export becomes: made under another name, and there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import leftovers, lock_path, publish, remove
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.export.plan import METADATA_CRC
from wsm_megatron.planning.provenance import holds_files, listed, seal
from wsm_megatron.storage.durable import fsync_path
from wsm_megatron.storage.json_file import parse_json
from wsm_megatron.storage.lock import Lock
from wsm_megatron.storage.retry import watched
from wsm_megatron.storage.space import allocated, check_space

RECORD_FILE = "wsm_export.json"
"""What an export is of, and all of its files."""


class Target:
    """An export's folder, for rank 0. A context manager, which gives up what is not published."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: Lock | None = None
        self._staging: Path | None = None

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        with suppress(OSError):  # storage that fails: the next export removes what is left
            if self._staging is not None and self._lock.holds():
                remove([self._staging])
        self._lock.release()

    def check(self) -> None:
        """Raise ``MergeError`` once the lock was seen to be another's. Does not wait."""
        if self._lock is not None:
            self._lock.check(look=False)

    def begin(self, record: dict[str, Any], nbytes: int, check: Callable[[], None]) -> Path | None:
        """A new folder to write to; None where the very same export is there already.

        Args:
            record: what the export is of. nbytes: that it takes.
            check: called while this waits for another that makes the same.

        Raises:
            UsageError: something else is there.
            MergeError: there is no space, or the folder cannot be made.
        """
        if self.holds(record):
            return None
        check_space({self.path: nbytes}, {self.path: sum(map(allocated, leftovers(self.path)))})
        self._lock = Lock(lock_path(self.path), _text(record))
        try:
            with watched(lambda: f"{self.path.parent}: creating"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(check)
            if self.holds(record):
                return None
            remove(leftovers(self.path))
            self._staging = self.path.with_name(f".{self.path.name}.wsm-export")
            self._staging.mkdir()
        except OSError as error:
            raise MergeError(f"{self.path}: cannot create: {error.strerror}") from error
        return self._staging

    def commit(self, record: dict[str, Any], files: Files) -> None:
        """Write down what the folder holds, and give it its name. Durable."""
        assert self._lock is not None and self._staging is not None
        write_file(self._staging / RECORD_FILE, seal({**record, "files": listed(files)}))
        try:
            publish(self._staging, self.path, self._lock.check)
            self._staging = None
            fsync_path(self.path.parent)
        except OSError as error:
            raise MergeError(f"{self.path}: cannot publish: {error.strerror}") from error

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether the very same export is there. Raises ``UsageError`` where something else is."""
        if not os.path.lexists(self.path):
            return False
        if not holds_export(self.path, record):
            raise UsageError(
                f"{self.path} exists and is left alone; give another folder, or remove it"
            )
        return True


def read_record(directory: Path) -> dict[str, Any] | None:
    """What an export's folder says of itself; None where it is none.

    Raises ``MergeError`` where that is damaged.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    data = read_file(path)
    try:
        contents = parse_json(data)
    except ValueError as error:
        raise MergeError(f"{path}: damaged: {error}") from error
    if not isinstance(contents, dict) or contents.pop("crc32", None) is None:
        raise MergeError(f"{path}: damaged: no CRC-32 of its own")
    if seal(contents) != data:
        raise MergeError(f"{path}: damaged: it is not what the export wrote, by its own CRC-32")
    return contents


def holds_export(directory: Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds an export of this record, whole by the sizes of its files.

    A merge is known by what it is of; how many ranks have cut its files, and hence its metadata,
    does not matter.
    """
    found = read_record(directory)
    if found is None:
        return False
    files, wanted = found.pop("files"), json.loads(_text(record))
    if wanted["merge"] is not None:
        wanted[METADATA_CRC] = found.get(METADATA_CRC)
    return found == wanted and holds_files(directory, files)


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)
