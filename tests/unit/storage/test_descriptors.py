"""No more files are open than the process may have, and none is closed while it is read."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, merge
from wsm_megatron.storage import descriptors, files
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.descriptors import Pool, check_room, room_left
from wsm_megatron.storage.files import Read, SourceFiles, read_all

SIZE = 5000


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """One with room for three files."""
    pool = Pool()
    monkeypatch.setattr(descriptors, "room_left", lambda: 5)
    monkeypatch.setattr(files, "pool", pool)
    return pool


@pytest.fixture
def sources(tmp_path: Path, pool: Pool) -> Iterator[list[SourceFiles]]:
    """Of five checkpoints of four files."""
    found = []
    for k in range(5):
        path = tmp_path / f"iter_{k:07d}"
        path.mkdir()
        for name in "abcd":
            (path / name).write_bytes(random.Random(f"{k}{name}").randbytes(SIZE))
        found.append(SourceFiles(path, retries=0))
    before = open_files()
    yield found
    for one in found:
        one.close()
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def kept(sources: list[SourceFiles]) -> int:
    return sum(len(one._opened) for one in sources)


def read_of(sources: list[SourceFiles], k: int, name: str) -> Read:
    return Read(sources[k], name, 100 * k, Buffer.empty(SIZE - 1000, torch.uint8), "a tensor")


def check(read: Read) -> None:
    data = (read.files.path / read.name).read_bytes()
    assert bytes(read.out.data) == data[read.position : read.position + len(read.out.data)]


@pytest.mark.parametrize("extension", [True, False])
def test_what_was_closed_is_opened_again(
    sources: list[SourceFiles], monkeypatch: pytest.MonkeyPatch, extension: bool
) -> None:
    if not extension:
        monkeypatch.setattr(files, "_reads", None)
    before = open_files()
    for _ in range(3):
        reads = [read_of(sources, k, name) for name in "abcd" for k in range(5)]
        read_all(reads)
        for read in reads:
            check(read)
        assert kept(sources) == 3 and open_files() == before + 3


def test_what_is_used_again_and_again_stays_open(
    sources: list[SourceFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        files, "_open_file", lambda path: opened.append(path.name) or os.open(path, os.O_RDONLY)
    )
    for name in "bcdbcdbcd":
        for _ in range(2):
            read_all([read_of(sources, 0, "a"), read_of(sources, 1, name)])
    assert opened.count("a") <= 3  # when all are new, all look alike


def test_a_descriptor_in_use_is_not_closed(sources: list[SourceFiles]) -> None:
    mine = sources[0].descriptor("a")
    read_all([read_of(sources, k, name) for name in "abcd" for k in range(1, 5)])
    assert kept(sources[:1]) == 0
    assert os.pread(mine.number, SIZE, 0) == (sources[0].path / "a").read_bytes()
    number = mine.number
    del mine
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_many_threads_read_the_right_bytes(sources: list[SourceFiles]) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        try:
            for _ in range(100):
                reads = [
                    read_of(sources, numbers.randrange(5), numbers.choice("abcd")) for _ in range(3)
                ]
                read_all(reads)
                for read in reads:
                    check(read)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert kept(sources) <= 3


def test_a_limit_that_others_have_used_up(
    sources: list[SourceFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def few(path: Path, flags: int) -> int:
        if kept(sources) >= 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags)

    monkeypatch.setattr(os, "open", few)
    reads = [read_of(sources, k, name) for name in "abcd" for k in range(5)]
    read_all(reads)
    for read in reads:
        check(read)


def test_outputs_need_room_too() -> None:
    check_room(2)
    with pytest.raises(ValueError, match=r"files open \(ulimit -n\) and needs 12 more: raise the"):
        check_room(room_left() + 10)


@pytest.mark.parametrize("limit", [22, 40])
def test_a_merge_with_few_descriptors_has_the_same_bits(tmp_path: Path, limit: int) -> None:
    """Four sources of several files, with main params in flat buckets."""
    options = "optimizer_state='merge', decay='linear,ema'"
    script = f"""
        import resource
        from pathlib import Path
        from wsm_megatron import ExecutionOptions, MergeConfig, merge
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        run, out = Path({str(RUNS / runs.MOE)!r}), Path({str(tmp_path / "few")!r})
        merge(MergeConfig(load=run, save=out, {options}), ExecutionOptions(threads=3))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config = MergeConfig(
        load=RUNS / runs.MOE, save=tmp_path / "many", optimizer_state="merge", decay="linear,ema"
    )
    for one in merge(config).merged:
        expected = load_tensors(one.output)
        actual = load_tensors(tmp_path / "few" / one.output.parent.name / one.output.name)
        assert actual.keys() == expected.keys()
        assert all(same_bits(actual[key], tensor) for key, tensor in expected.items())
