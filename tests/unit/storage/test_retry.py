"""Storage that does not answer is noticed and named: reads, writes, syncs; by all ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, merge
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.heartbeat import Heartbeat
from wsm_megatron.errors import PassingError, StorageError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import journal
from wsm_megatron.storage.retry import check_storage, watched


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "stalled_after", 2.0)
    monkeypatch.setattr(timeouts, "worker_grace", 0.1)


@pytest.fixture
def storage() -> Iterator[threading.Event]:
    """Storage that answers again once the event is set; it is when the test is over."""
    before, answers = set(threading.enumerate()), threading.Event()
    yield answers
    answers.set()
    for thread in set(threading.enumerate()) - before:  # those that hung, before the next test
        thread.join(30)


def hang(
    monkeypatch: pytest.MonkeyPatch, name: str, storage: threading.Event, call: int = 1
) -> None:
    """Let one call of a function of ``os`` hang, of those that worker threads make."""
    original, count = getattr(os, name), 0

    def hanging(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += threading.current_thread() is not threading.main_thread()
        if count == call:
            storage.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(os, name, hanging)


def merge_alone(tmp_path: Path) -> None:
    """By one thread."""
    merge(MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out"), ExecutionOptions(threads=1))


def test_a_write_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: threading.Event
) -> None:
    hang(monkeypatch, "pwrite", storage, call=3)
    with pytest.raises(StorageError, match=r"__0_0\.distcp: writing at byte \d+ .* hangs"):
        merge_alone(tmp_path)


@pytest.mark.parametrize("call, named", [(1, ""), (2, r"\.journal"), (3, "")])
def test_a_sync_at_the_end_hangs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: threading.Event,
    call: int,
    named: str,
) -> None:
    """The file's, its journal's, and the file's once more: each is watched."""
    hang(monkeypatch, "fsync", storage, call)
    with pytest.raises(StorageError, match=rf"__0_0\.distcp{named}: (syncing|writing) .* hangs"):
        merge_alone(tmp_path)
    assert not (tmp_path / "out" / "iter_0000008").exists()


def test_nothing_hangs_once_a_call_has_returned() -> None:
    with (
        pytest.raises(StorageError, match="the disk has not returned"),
        watched(lambda: "the disk"),
    ):
        while True:
            check_storage()
    check_storage()


def test_other_ranks_hear_of_a_rank_whose_own_thread_hangs(
    monkeypatch: pytest.MonkeyPatch, storage: threading.Event
) -> None:
    """Its beats go on all the while: it is not lost, and must not be waited for either."""
    monkeypatch.setattr(timeouts, "beat", 0.05)
    store = dist.HashStore()
    lines = [Heartbeat(store, rank, 2) for rank in range(2)]
    ranks = [Ranks(one.rank, 2, one) for one in lines]

    def stuck() -> None:
        one = ranks[1]
        place = watched(lambda: "renaming iter_8")
        with suppress(PassingError), one.watching(check_storage), one.together("publishing"), place:
            storage.wait(30)

    thread = threading.Thread(target=stuck)
    thread.start()
    with (
        pytest.raises(PassingError, match="rank 1 failed in publishing: renaming iter_8 .* hangs"),
        ranks[0].together("publishing"),
    ):
        pass
    storage.set()
    thread.join()
    for one in lines:
        one.leave()


def test_a_sync_beside_the_writing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: threading.Event
) -> None:
    monkeypatch.setattr(journal, "SYNC_BYTES", 1)
    hang(monkeypatch, "fsync", storage)
    with pytest.raises(StorageError, match=r"__0_0\.distcp: syncing .* hangs"):
        merge_alone(tmp_path)
