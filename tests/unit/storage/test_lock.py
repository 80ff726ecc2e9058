"""Two merges of one target, and what dead ones leave."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.reference import RUNS
from tests.runs import DENSE
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, merge
from wsm_megatron.checkpoint.layout import METADATA_FILE
from wsm_megatron.errors import StoppedError
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.staging_key import merge_digest
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import lock
from wsm_megatron.storage.lock import Lock

LOCK = ".iter_0000008.wsm.lock"
ANOTHER = "0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "freshen_every", 0.05)
    monkeypatch.setattr(timeouts, "stale_after", 2.0)


def hold(path: Path, **changes: Any) -> None:
    """Leave the lock of a process that does not touch it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(lock._myself() | {"token": ANOTHER, "makes": "another"} | changes))


def dead_pid() -> int:
    return int(subprocess.check_output([sys.executable, "-Sc", "import os; print(os.getpid())"]))


def takes(path: Path) -> bool:
    """Whether the lock is taken at once."""
    taken = Lock(path, "mine")
    if taken.try_acquire() is not None:
        return False
    taken.check()
    taken.release()
    assert list(path.parent.iterdir()) == []
    return True


@contextmanager
def live_merge(config: MergeConfig) -> Iterator[tuple[Lock, Path]]:
    """The lock and the hidden directory of a merge that is at work in another process."""
    (output,) = prepare_job(config).outputs
    held = Lock(config.save / LOCK, merge_digest(prepare_job(config), output))
    held.acquire()
    hidden = config.save / ".iter_0000008.wsm-0123456789ab"
    hidden.mkdir()
    (hidden / "__0_0.distcp").write_bytes(b"half")
    try:
        yield held, hidden
    finally:
        held.release()


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_another_merge_of_the_target_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path)
    who = f"pid {os.getpid()} on {socket.gethostname()}"
    with live_merge(config) as (winner, hidden):
        before = names(tmp_path)
        with pytest.raises(MergeError, match=who):
            merge(replace(config, decay="ema"))
        assert names(tmp_path) == before and names(hidden) == {"__0_0.distcp"}
        winner.check()
    merge(replace(config, decay="ema"))
    assert names(tmp_path) == {"iter_0000008", "latest_checkpointed_iteration.txt"}


def test_the_very_same_merge_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the other one publishes meanwhile is the result; nothing is made twice."""
    monkeypatch.setattr(timeouts, "say_waiting_every", 1.1)
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path / "out", decay="mean,ema")
    one = replace(config, save=tmp_path / "out" / "ema", decay="ema")
    one.save.mkdir(parents=True)
    publish = merge(replace(one, save=tmp_path / "elsewhere" / "ema")).output
    with live_merge(one) as (winner, hidden):

        def finish() -> None:
            time.sleep(1.5)
            (hidden / "__0_0.distcp").unlink()
            hidden.rmdir()
            os.rename(publish, one.save / "iter_0000008")
            winner.release()

        other = threading.Thread(target=finish)
        other.start()
        report = merge(config)
        other.join()
    assert [merged.output.parent.name for merged in report.merged] == ["mean", "ema"]
    assert "is doing the same; waiting for it" in caplog.text
    assert "ema/iter_0000008 holds this very merge already" in caplog.text
    assert (one.save / "latest_checkpointed_iteration.txt").read_text() == "8"
    for name in ("mean", "ema"):
        assert names(config.save / name) == {"iter_0000008", "latest_checkpointed_iteration.txt"}


def test_two_jobs_with_the_same_products_in_another_order(tmp_path: Path) -> None:
    """Neither waits for one that waits for it."""
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path, decay="mean,ema,cosine")
    orders = ("mean,ema,cosine", "cosine,ema,mean")
    done: list[int] = []

    def run(decay: str) -> None:
        done.append(len(merge(replace(config, decay=decay), ExecutionOptions(threads=1)).merged))

    both = [threading.Thread(target=run, args=(decay,), daemon=True) for decay in orders]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert done == [3, 3]


def test_a_signal_ends_the_wait_and_touches_nothing(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path)

    def stop(number: int, _: object) -> None:
        raise StoppedError("stopped", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with live_merge(config) as (winner, hidden):
            timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            with pytest.raises(StoppedError):
                merge(config)
            assert names(tmp_path) == {LOCK, hidden.name} and names(hidden) == {"__0_0.distcp"}
            winner.check()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_merge_that_lost_its_lock_stops_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path)
    left: list[set[str]] = []

    def complete(job: Any, k: int, plans: Any, directory: Path, files: dict[str, Any]) -> None:
        files[METADATA_FILE] = (0, 0)
        hold(tmp_path / LOCK)
        left.append(names(tmp_path))

    monkeypatch.setattr("wsm_megatron.publication.complete", complete)
    with pytest.raises(MergeError, match="another merge has taken over this target"):
        merge(config)
    assert left == [names(tmp_path)] and "iter_0000008" not in left[0]


def test_a_lost_lock_is_seen_without_a_look(tmp_path: Path) -> None:
    held = Lock(tmp_path / LOCK, "mine")
    held.acquire()
    held.check(look=False)
    hold(tmp_path / LOCK)
    until = time.monotonic() + 60
    with pytest.raises(MergeError, match="taken over"):
        while time.monotonic() < until:
            held.check(look=False)
            time.sleep(0.01)


def test_what_a_dead_merge_left_is_removed(tmp_path: Path) -> None:
    hold(tmp_path / LOCK, pid=dead_pid())
    left = tmp_path / ".iter_0000008.wsm-1-abc"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    other = tmp_path / ".iter_0000006.wsm-1-abc"
    other.mkdir()
    merge(MergeConfig(load=RUNS / DENSE, save=tmp_path))
    assert names(tmp_path) == {"iter_0000008", "latest_checkpointed_iteration.txt", other.name}


def test_a_process_that_is_gone_is_dead(tmp_path: Path) -> None:
    for changes in ({"pid": dead_pid()}, {"start": 1}):  # its pid is another's by now
        hold(tmp_path / LOCK, **changes)
        assert takes(tmp_path / LOCK), changes


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-Sc", "input()"], stdin=subprocess.PIPE)
    start = lock._state_and_start(child.pid)[1]
    hold(tmp_path / LOCK, pid=child.pid, start=start)
    assert not takes(tmp_path / LOCK)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert lock._state_and_start(child.pid)[0] == "Z"
    assert takes(tmp_path / LOCK)
    child.communicate()


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "n1"},
        {"boot": "of another machine whose containers have this one's name"},
        {"pids": "pid:[1]"},
        {"pids": None},
    ],
)
def test_a_pid_of_elsewhere_says_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    """It is dead when it has been silent for long, and alive when it touches its lock."""
    path = tmp_path / LOCK
    hold(path, **{"pid": dead_pid(), **changes})
    assert not takes(path)
    began = time.monotonic()
    taken = Lock(path, "mine")
    taken.acquire()
    assert time.monotonic() - began >= timeouts.stale_after
    taken.release()
    live = Lock(path, "another")
    live._mine |= {"pid": dead_pid(), **changes}
    live.acquire()
    with pytest.raises(MergeError, match="another merge is making this checkpoint"):
        Lock(path, "mine").acquire()
    live.release()


def test_an_earlier_start_of_the_same_slurm_job_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for other in ({"slurm_cluster": "other"}, {"slurm_job": "8"}, {"slurm_restarts": 1}):
        hold(tmp_path / LOCK, **{"host": "n1", "slurm_restarts": 0, **other})
        assert not takes(tmp_path / LOCK), other
    hold(tmp_path / LOCK, host="n1", slurm_restarts=0)
    assert takes(tmp_path / LOCK)


@pytest.mark.parametrize("text", ["", '{"host"', "[]", '{"token": "../../x"}', "\0" * 40])
def test_a_lock_that_was_cut_short(tmp_path: Path, text: str) -> None:
    """Its process may just be writing it, or has died over it: silence tells."""
    (tmp_path / LOCK).write_text(text)
    assert not takes(tmp_path / LOCK)
    taken = Lock(tmp_path / LOCK, "mine")
    taken.acquire()
    taken.check()
    taken.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_taken_over_is_noticed(tmp_path: Path) -> None:
    held = Lock(tmp_path / LOCK, "mine")
    held.acquire()
    hold(tmp_path / LOCK)
    with pytest.raises(MergeError, match="taken over"):
        held.check()
    held.release()
    assert (tmp_path / LOCK).exists(), "it is another merge's now"


def test_a_claim_whose_process_died_is_succeeded_in_turn(tmp_path: Path) -> None:
    """Killed between the claim and its move over the lock: any number of times."""
    dead = dead_pid()
    tokens = [f"{k:016x}" for k in range(3)]
    hold(tmp_path / LOCK, pid=dead, token=tokens[0])
    for before, token in pairwise(tokens):
        hold(tmp_path / f"{LOCK}-{before}", pid=dead, token=token)
    assert takes(tmp_path / LOCK)
    hold(tmp_path / LOCK, pid=dead, token=tokens[0])
    hold(tmp_path / f"{LOCK}-{tokens[0]}", token=tokens[1])
    assert not takes(tmp_path / LOCK), "the end of the chain lives"


def test_of_any_number_of_contenders_one_holds_the_lock(tmp_path: Path) -> None:
    """Some release it; some die with it, or with a claim."""
    dead, inside, most = dead_pid(), 0, 0
    guard, ended = threading.Lock(), []

    def contend(seed: int) -> None:
        nonlocal inside, most
        chance = random.Random(seed)
        for _ in range(8):
            one = Lock(tmp_path / LOCK, "same")
            dies = chance.random() < 0.4
            if dies:
                one._mine |= {"start": None}  # as if of an earlier process with this pid
                one._freshen = lambda descriptor: os.close(descriptor)  # type: ignore[method-assign]
            else:
                one.acquire()
                with guard:
                    inside, most = inside + 1, max(most, inside + 1)
                time.sleep(chance.random() * 0.002)
                with guard:
                    inside -= 1
                one.check()
                one.release()
                continue
            one.try_acquire()
        ended.append(seed)

    hold(tmp_path / LOCK, pid=dead)
    threads = [threading.Thread(target=contend, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 6 and most == 1
