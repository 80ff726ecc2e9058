"""Syncs of a file that is being written, and the lines that say what is on disk."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from isal.isal_zlib import crc32

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, merge
from wsm_megatron.errors import StorageError
from wsm_megatron.storage import journal
from wsm_megatron.storage.journal import Journal, JournalEntry


def path_of(file: Path) -> Path:
    return file.with_name("file.journal")


def part(offset: int, length: int, crc: int, identity: str = "0" * 16) -> JournalEntry:
    return JournalEntry(offset, length, crc, identity)


@contextmanager
def begun(file: Path) -> Iterator[Journal]:
    """A journal of a file with one part, which no sync has seen."""
    with file.open("r+b") as stream:
        kept = Journal(path_of(file), file, stream.fileno())
        kept.add(part(0, 600, 1))
        assert lines(file) == 0
        yield kept


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "file"
    path.write_bytes(b"")
    yield path
    assert not [thread for thread in threading.enumerate() if thread.name == "wsm-sync"]


def lines(file: Path) -> int:
    kept = path_of(file)
    return len(kept.read_text().splitlines()) if kept.exists() else 0


def wait_for(count: int, file: Path) -> None:
    until = time.monotonic() + 60
    while lines(file) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert lines(file) == count


def test_syncs_go_on_beside_the_writing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_BYTES", 1000)
    with begun(file) as kept:
        kept.add(part(600, 600, 2))
        wait_for(2, file)
        kept.add(part(1200, 600, 3))
        kept.end()
    assert lines(file) == 3


def test_writing_waits_for_storage_that_is_far_behind(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "BEHIND_BYTES", 1000)
    with begun(file) as kept:
        kept.add(part(600, 600, 2))
        assert lines(file) == 2
        kept.add(part(1200, 600, 3))  # what is on disk no longer counts
        assert lines(file) == 2
        kept.end()


def test_a_failed_sync_is_not_forgotten(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports it once; a later sync of the same file may well succeed."""
    monkeypatch.setattr(journal, "SYNC_BYTES", 1000)
    fsync, failed = os.fsync, threading.Event()

    def fail_once(descriptor: int) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with file.open("r+b") as stream:
        kept = Journal(path_of(file), file, stream.fileno())
        kept.add(part(0, 1000, 1))
        assert failed.wait(60)
        with pytest.raises(OSError, match="Input/output error"):
            kept.end()
        with pytest.raises(OSError, match="Input/output error"):
            kept.add(part(1000, 10, 2))
    assert lines(file) == 0


def test_of_two_lines_of_one_place_the_later_counts(file: Path) -> None:
    """And only for what it says is stored there, whole, with its CRC-32."""
    data = os.urandom(600)
    file.write_bytes(data)
    crc, mine, other = crc32(data), "1" * 16, "2" * 16
    for lines_, held in (
        ([part(0, 600, crc, mine)], True),
        ([part(0, 600, crc, other), part(0, 600, crc, mine)], True),
        ([part(0, 600, crc, mine), part(0, 600, crc, other)], False),
        ([part(0, 600, crc, mine), part(0, 500, crc32(data[:500]), mine)], False),
        ([part(0, 600, crc + 1, mine)], False),
        ([part(0, 600, crc, other)], False),
    ):
        path_of(file).write_text("".join(map(journal._line, lines_)))
        with file.open("rb") as stream:
            kept = Journal(path_of(file), file, stream.fileno())
            assert (kept.holds(0, 600, mine) is not None) == held, lines_
    os.truncate(file, 0)
    path_of(file).write_text(journal._line(part(0, 600, 0, mine)))
    with file.open("rb") as stream:
        assert Journal(path_of(file), file, stream.fileno()).holds(0, 600, mine) is None


@pytest.mark.parametrize("tail", [b"12", b"600 60", b"\0" * 30, b"\xff\xfe", b"1 2 3\nx"])
def test_what_a_crash_has_garbled_spoils_no_line_behind_it(file: Path, tail: bytes) -> None:
    good = part(0, 600, 1)
    path_of(file).write_bytes(journal._line(good).encode() + tail)
    with file.open("r+b") as stream:
        kept = Journal(path_of(file), file, stream.fileno())
        kept.add(part(8, 4, 2))
        kept.end()
    assert journal._read(path_of(file)) == [good, part(8, 4, 2)]


def test_a_merge_fails_with_its_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        if threading.current_thread().name == "wsm-sync":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal, "SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fsync", fail)
    config = MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out")
    with pytest.raises(StorageError, match=r"__0_0\.distcp: cannot write: Input/output error"):
        merge(config, ExecutionOptions(threads=1))
    assert not (tmp_path / "out" / "iter_0000008").exists()
