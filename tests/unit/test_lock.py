"""Two merges of one target, and what dead ones leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reference import RUNS
from tests.runs import DENSE
from wsm_megatron import MergeConfig, MergeError, merge
from wsm_megatron.engine import lock
from wsm_megatron.engine.lock import Lock

LOCK = ".iter_0000008.wsm.lock"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "FRESHEN", 0.05)
    monkeypatch.setattr(lock, "STALE_AFTER", 2.0)


def hold(path: Path, **changes: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(lock._myself() | {"token": "of another"} | changes))


def dead_pid() -> int:
    return int(subprocess.check_output([sys.executable, "-Sc", "import os; print(os.getpid())"]))


def test_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    winner = Lock(tmp_path / LOCK)
    winner.acquire()
    with pytest.raises(MergeError, match=f"pid {os.getpid()} on {socket.gethostname()}"):
        merge(MergeConfig(load=RUNS / DENSE, save=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    winner.check()
    winner.release()
    merge(MergeConfig(load=RUNS / DENSE, save=tmp_path))
    assert not (tmp_path / LOCK).exists()


def test_what_a_dead_merge_left_is_removed(tmp_path: Path) -> None:
    hold(tmp_path / LOCK, pid=dead_pid())
    left = tmp_path / ".iter_0000008.wsm-1-abc"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    other = tmp_path / ".iter_0000006.wsm-1-abc"
    other.mkdir()
    merge(MergeConfig(load=RUNS / DENSE, save=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "iter_0000008",
        "latest_checkpointed_iteration.txt",
        other.name,
    }


def test_an_earlier_start_of_the_same_slurm_job_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tmp_path / LOCK, host="n1", slurm_job="7", slurm_restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    taken = Lock(tmp_path / LOCK)
    taken.acquire()
    taken.check()
    taken.release()
    assert list(tmp_path.iterdir()) == []


def test_on_another_host_silence_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path / LOCK, host="n1")
    Lock(tmp_path / LOCK).acquire()

    fresh = tmp_path / "fresh"
    holder = Lock(fresh)
    monkeypatch.setattr(holder, "_mine", holder._mine | {"host": "n1"})
    holder.acquire()  # and touches it from now on
    with pytest.raises(MergeError, match="on n1"):
        Lock(fresh).acquire()
    holder.release()


def test_a_lock_that_was_taken_over_is_noticed(tmp_path: Path) -> None:
    held = Lock(tmp_path / LOCK)
    held.acquire()
    hold(tmp_path / LOCK)
    with pytest.raises(MergeError, match="taken over"):
        held.check()
    held.release()
    assert (tmp_path / LOCK).exists(), "it is another merge's now"
