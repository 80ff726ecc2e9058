"""Reads of several files at once: by the C extension, and one by one without it."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wsm_megatron.errors import MergeError, StorageError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import files as module
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.files import Read, SourceFiles, read_all
from wsm_megatron.storage.retry import check_storage

SIZE = 100_000


@pytest.fixture(params=["extension", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._reads is not None, "the C extension was not built"
    if request.param != "extension":
        monkeypatch.setattr(module, "_reads", None)


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[list[SourceFiles]]:
    found = []
    for k in range(3):
        path = tmp_path / f"iter_{k:07d}"
        path.mkdir()
        (path / "a").write_bytes(random.Random(k).randbytes(SIZE))
        found.append(SourceFiles(path, retries=0))
    yield found
    for files in found:
        files.close()


def reads_of(sources: list[SourceFiles], length: int = 1000) -> list[Read]:
    """One read of each source, somewhere in its file."""
    return [
        Read(files, "a", 10_007 * (k + 1), Buffer.empty(length, torch.uint8), f"tensor {k}")
        for k, files in enumerate(sources)
    ]


def check(read: Read) -> None:
    data = (read.files.path / read.name).read_bytes()
    assert bytes(read.out.data) == data[read.position : read.position + len(read.out.data)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("length", [0, 1, 4097, SIZE - 40_000])
def test_every_file_is_read(sources: list[SourceFiles], length: int) -> None:
    reads = reads_of(sources, length)
    read_all(reads)
    for read in reads:
        check(read)


@pytest.mark.usefixtures("way")
def test_a_truncated_file_is_named(sources: list[SourceFiles]) -> None:
    os.truncate(sources[1].path / "a", 20_500)
    reads = reads_of(sources)
    message = r"iter_0000001: a ends at byte 20500, inside tensor 1; the file is truncated"
    with pytest.raises(MergeError, match=message):
        read_all(reads)
    check(reads[0])


@pytest.mark.usefixtures("way")
def test_a_missing_file_is_named(sources: list[SourceFiles]) -> None:
    (sources[2].path / "a").unlink()
    with pytest.raises(MergeError, match=r"iter_0000002/a: opening failed: No such file"):
        read_all(reads_of(sources))


def test_what_the_extension_could_not_read_is_tried_again(
    sources: list[SourceFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = module._reads.fill
    monkeypatch.setattr(module._reads, "fill", lambda numbers, at: fill(numbers[:4], at))
    reads = reads_of(sources)
    read_all(reads)
    for read in reads:
        check(read)


def test_a_read_that_hangs_is_named(
    sources: list[SourceFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(numbers: tuple[int, ...], current: int) -> int:
        ctypes.c_int64.from_address(current).value = 1
        hangs.set()
        goes_on.wait(60)
        return 0

    monkeypatch.setattr(timeouts, "stalled_after", -1.0)
    monkeypatch.setattr(module._reads, "fill", hang)
    thread = threading.Thread(target=read_all, args=[reads_of(sources)])
    thread.start()
    try:
        assert hangs.wait(60)
        with pytest.raises(StorageError, match=r"iter_0000001: reading tensor 1 from a at byte"):
            check_storage()
    finally:
        goes_on.set()
        thread.join()


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_cached_is_not_announced(
    sources: list[SourceFiles], monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    asked, advised = [], []

    def preadv(descriptor: int, buffers: list, position: int, flags: int) -> int:
        asked.append((position, flags))
        if not cached:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    sources[0].prefetch("a", 1000, 500)
    assert asked == [(1499, os.RWF_NOWAIT)]
    assert advised == ([] if cached else [(1000, 500, os.POSIX_FADV_WILLNEED)])


def test_the_extension_checks_its_arguments() -> None:
    current = ctypes.c_int64()
    assert module._reads.fill((), ctypes.addressof(current)) == 0
    with pytest.raises(ValueError, match="four numbers a read"):
        module._reads.fill((1, 2, 3), ctypes.addressof(current))
    with pytest.raises(TypeError):
        module._reads.fill(("a", 0, 0, 0), ctypes.addressof(current))
    assert module._reads.fill((-1, 0, 0, 8), ctypes.addressof(current)) == 0  # no such descriptor
