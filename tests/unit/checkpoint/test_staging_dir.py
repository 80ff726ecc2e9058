"""The last steps of a merge: a signal, a kill or a failure loses nothing of what is complete."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig, MergeError, merge
from wsm_megatron.checkpoint import staging_dir
from wsm_megatron.checkpoint.run_directory import TRACKER_FILE, write_tracker
from wsm_megatron.checkpoint.staging_dir import advance_tracker
from wsm_megatron.errors import StoppedError
from wsm_megatron.process.signals import Stop, ending_later, ending_signals
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import lock

WHOLE = {"iter_0000008", TRACKER_FILE}
STEPS = {
    "sync": (staging_dir, "fsync_path"),
    "rename": (os, "rename"),
    "tracker": (staging_dir, "write_tracker"),
    "journals": (staging_dir, "remove"),
}
"""What is called while a complete directory gets its name."""


@pytest.fixture(autouse=True)
def stops() -> Iterator[None]:
    """SIGTERM raises, as in the ``wsm`` command."""

    def stop(number: int, _: object) -> None:
        raise StoppedError("stopped", number)

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    return MergeConfig(
        load=RUNS / runs.FP32_PARAM, save=tmp_path / "out", optimizer_state="last", decay="mean,ema"
    )


def at(patch: pytest.MonkeyPatch, step: str, then: Callable[[], None], after: bool) -> None:
    """Do something at the first call of a step."""
    owner, name = STEPS[step]
    original, called = getattr(owner, name), threading.Event()

    def call(*arguments: Any, **options: Any) -> Any:
        first = not called.is_set() and _publishing(step, arguments)
        if first:
            called.set()
            if not after:
                then()
        result = original(*arguments, **options)
        if first and after:
            then()
        return result

    patch.setattr(owner, name, call)


def _publishing(step: str, arguments: Any) -> bool:
    """``remove`` also removes what dead merges have left."""
    return step != "journals" or str(arguments[0][0]).endswith(".journals")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # the handler runs before the next line


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_signal_waits_until_all_is_published(
    config: MergeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
    after: bool,
) -> None:
    with monkeypatch.context() as patch:
        at(patch, step, terminate, after)
        with pytest.raises(StoppedError):
            merge(config)
    for name in ("mean", "ema"):
        assert {path.name for path in (config.save / name).iterdir()} == WHOLE
        assert f"{name}/iter_0000008 was published before that" in caplog.text
    assert merge(config).bytes_written == 0


class Killed(BaseException):
    """In place of SIGKILL: nothing is tidied up, because nothing that would do it works."""


def killed(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    def kill() -> None:
        for owner, name in ((staging_dir.StagingDirectory, "keep"), (lock.Lock, "release")):
            patch.setattr(owner, name, lambda *_: None)
        raise Killed

    return kill


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_loses_nothing(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """The next start finds the checkpoint published, or complete but for what is made last."""
    monkeypatch.setattr(timeouts, "freshen_every", 60.0)
    monkeypatch.setattr(timeouts, "stale_after", 0.5)  # this process lives
    with monkeypatch.context() as patch:
        at(patch, step, killed(patch), after)
        with pytest.raises(Killed):
            merge(config)
    report = merge(config)
    assert report.bytes_written < 2 * 100_000, "objects, but no tensor"
    for name in ("mean", "ema"):
        assert {path.name for path in (config.save / name).iterdir()} == WHOLE
        assert (config.save / name / TRACKER_FILE).read_text() == "8"


def test_a_failure_behind_the_name_removes_nothing(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staging_dir, "write_tracker", fail)
        with pytest.raises(MergeError, match=f"{TRACKER_FILE}: cannot write: No space left"):
            merge(config)
    assert "iter_0000008" in {path.name for path in (config.save / "mean").iterdir()}
    assert len(merge(config).merged) == 2


def test_merges_that_end_at_the_same_time_leave_the_newest(tmp_path: Path) -> None:
    iterations = list(range(1000, 21000, 1000))
    for iteration in iterations:
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    for order in (iterations, iterations[::-1], iterations[::2] + iterations[1::2]):
        write_tracker(tmp_path, 1)
        threads = [threading.Thread(target=advance_tracker, args=(tmp_path, i)) for i in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tmp_path / TRACKER_FILE).read_text() == str(max(iterations))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_signals_wait_for_the_end_of_a_block() -> None:
    seen = []
    with pytest.raises(StoppedError), ending_later():
        terminate()
        seen.append("after the signal")
    assert seen
    with pytest.raises(StoppedError):
        terminate()
    with pytest.raises(OSError, match="the block's own"), ending_later():
        terminate()
        raise OSError("the block's own")
    thread = threading.Thread(target=lambda: seen.append(ending_later().__enter__()))
    thread.start()
    thread.join()
    assert seen[1:] == [None], "in another thread there is nothing to do"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("outcome", [None, "all of it is there"])
def test_a_signal_says_what_the_block_has_done(number: int, outcome: str | None) -> None:
    said = outcome or "nothing was published"
    with ending_signals(Stop()), pytest.raises(StoppedError, match=said), ending_later(outcome):
        signal.raise_signal(number)
