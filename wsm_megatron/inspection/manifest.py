"""The files of a merged checkpoint, compared with the list in its ``wsm_merge.json``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from wsm_megatron.checkpoint.layout import PROVENANCE_FILE
from wsm_megatron.checkpoint.reader import size_and_crc
from wsm_megatron.errors import MergeError
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.planning.provenance import is_sealed
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.retry import check_storage, watched

_NAMED = 20
"""Names in a message."""


@dataclass(frozen=True)
class FilesCheck:
    """What was found.

    Attributes:
        same: files that have the size and CRC-32 that they were written with.
        changed: files that have not, each with what it has.
        missing: files that were written and are not there.
        extra: files, folders and links that were not written.
        unlisted: the same where the list, of an earlier version, does not name everything.
    """

    same: tuple[str, ...]
    changed: dict[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unlisted: tuple[str, ...]
    bytes_read: int

    @property
    def problems(self) -> str:
        """All that is wrong, by name; empty where nothing is."""
        changed = [f"{name} {found}" for name, found in self.changed.items()]
        kinds = (("changed", changed), ("missing", self.missing), ("extra", self.extra))
        return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names)


def check_files(
    path: Path, provenance: dict[str, Any], known: Mapping[str, tuple[int, int]] | None = None
) -> FilesCheck:
    """Compare every file below a merged checkpoint with the list, from its first byte to its last.

    Args:
        known: size and CRC-32 of files that were just read; they are not read again.

    Raises:
        MergeError: something cannot be read.
    """
    listed = provenance["files"]
    found = dict(_walk(path))
    if found.get(PROVENANCE_FILE) == "file":
        del found[PROVENANCE_FILE]
    needed = {str(folder) for name in listed for folder in PurePosixPath(name).parents}
    others = sorted(
        name + "/" * (kind == "folder")
        for name, kind in found.items()
        if name not in listed and not (kind == "folder" and name in needed)
    )
    present = {name: found[name] for name in listed if name in found}
    changed, read = _compare(path, listed, present, known or {})
    return FilesCheck(
        same=tuple(sorted(listed.keys() & found.keys() - changed.keys())),
        changed=changed,
        missing=tuple(sorted(listed.keys() - found.keys())),
        extra=tuple(others) if is_sealed(provenance) else (),
        unlisted=() if is_sealed(provenance) else tuple(others),
        bytes_read=read,
    )


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Everything below a directory and what kind of thing it is; no link is followed."""
    folders = [PurePosixPath()]
    while folders:
        folder = folders.pop()
        try:
            with watched(lambda: f"{root}: listing"), os.scandir(root / folder) as entries:
                found = sorted((entry.name, _kind(entry)) for entry in entries)
        except OSError as error:
            raise MergeError(f"{root / folder}: cannot list: {error.strerror}") from error
        for name, kind in found:
            yield str(folder / name), kind
            if kind == "folder":
                folders.append(folder / name)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "device"


def _compare(
    path: Path,
    listed: dict[str, dict[str, Any]],
    found: dict[str, str],
    known: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, str], int]:
    """What listed files have that they should not; the bytes read."""
    changed: dict[str, str] = {}
    read: list[int] = []

    def look(name: str) -> None:
        if found[name] != "file":
            changed[name] = f"is a {found[name]}, not the file that the merge wrote"
            return
        if name in known:
            size, crc = known[name]
        else:
            size, crc = size_and_crc(path / name)
            read.append(size)
        expected = listed[name]
        if size != expected["bytes"] or f"{crc:08x}" != expected["crc32"]:
            changed[name] = (
                f"has {size} bytes with CRC-32 {crc:08x}; the merge wrote {expected['bytes']} with "
                f"{expected['crc32']}"
            )

    run_workers(sorted(found), look, default_threads(), threading.Event(), check_storage)
    return dict(sorted(changed.items())), sum(read)


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
