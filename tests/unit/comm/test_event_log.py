"""``--log-json``: what is told, and that telling it never stands in the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, MergeReport, __version__, merge
from wsm_megatron.cli.main import main
from wsm_megatron.comm import event_log
from wsm_megatron.comm.event_log import EventLog, Meter
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.process.timeouts import timeouts


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    return MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def merge_logged(config: MergeConfig, log: Path) -> MergeReport:
    return merge(config, ExecutionOptions(log_json=log))


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(path: Path) -> list[str]:
    return [event["event"] for event in told(path)]


def test_a_merge_from_its_start_to_its_end(config: MergeConfig, log: Path) -> None:
    done = merge_logged(config, log)
    started, planned, progress, published, finished = told(log)
    assert names(log) == ["started", "planned", "progress", "published", "finished"]
    assert started["version"] == __version__ and started["ranks"] == len(started["hosts"]) == 1
    assert started["options"]["load"] == str(config.load)
    assert [Path(path).name for path in planned["sources"]] == [
        f"iter_{iteration:07d}" for iteration in runs.ITERATIONS
    ]
    assert planned["outputs"] == [str(done.output)] == [published["path"]]
    assert planned["bytes_to_read"] > 0 and len(planned["tasks_per_rank"]) == 1
    assert progress["bytes_done"] == progress["bytes_total"] > 0 == progress["seconds_left"]
    assert finished["bytes_read"] == done.bytes_read and finished["output"] == str(done.output)
    assert finished["ranks"] == [one.as_data() for one in done.ranks]
    for event in (started, planned, progress, published, finished):
        when = datetime.fromisoformat(event["time"].replace("Z", "+00:00"))
        assert when.utcoffset().total_seconds() == 0 and event["seconds"] >= 0  # type: ignore[union-attr]


def test_how_a_job_runs_is_not_part_of_the_merge(
    config: MergeConfig, log: Path, tmp_path: Path
) -> None:
    """The same merge with another log and more is found published, and says so in the log."""
    merge_logged(config, log)
    other = tmp_path / "other.jsonl"
    arguments = ["--load", str(config.load), "--save", str(config.save), "--log-json", str(other)]
    arguments += ["--threads", "1", "--retries", "1", "--memory", "100MB", "--device", "cpu"]
    assert main(["merge", *arguments]) == 0
    _, there, finished = told(other)
    assert there["event"] == "already_there" and "holds this very merge" in there["message"]
    assert finished["event"] == "finished" and finished["ranks"] == []


def test_a_read_that_is_tried_again(
    config: MergeConfig, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "first_pause", 0.0)
    read, failed = os.preadv, threading.Event()

    def flaky(*arguments: Any) -> int:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    merge_logged(config, log)
    (retried,) = [event for event in told(log) if event["event"] == "retried"]
    assert retried["rank"] == 0 and "Input/output error; trying again" in retried["message"]


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    runs.rewrite(runs.checkpoint(run, 6), lambda key, tensor: tensor.fill_(torch.nan))
    return run


def test_a_merge_that_fails(poisoned: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    arguments = ["--load", str(poisoned), "--save", str(tmp_path / "out"), "--log-json", str(log)]
    status = main(["merge", *arguments])
    failed = told(log)[-1]
    assert (failed["event"], failed["rank"], failed["phase"]) == ("failed", 0, "merging")
    assert failed["exit_code"] == status == 1 and "iter_0000006" in failed["message"]
    (one,) = failed["failures"]
    assert one == {
        "rank": 0,
        "phase": "merging",
        "exception": "MergeError",
        "message": failed["message"],
    }


def test_options_that_do_not_fit_the_run(config: MergeConfig, log: Path) -> None:
    arguments = ["--load", str(config.load), "--save", str(config.save), "--last", "99"]
    assert main(["merge", *arguments, "--log-json", str(log)]) == EXIT_USAGE
    failed = told(log)[-1]
    assert (failed["event"], failed["phase"], failed["exit_code"]) == ("failed", "planning", 2)


def test_a_log_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = tmp_path / "no" / "events.jsonl", tmp_path / "out"
    arguments = ["--load", str(RUNS / runs.DENSE), "--save", str(out), "--log-json", str(log)]
    assert main(["merge", *arguments]) == EXIT_USAGE
    assert f"--log-json {log}: cannot write: No such file" in capsys.readouterr().err
    assert not out.exists()


class Broken:
    """A stream on storage that is full, or that hangs until it is told otherwise."""

    def __init__(self, answers: threading.Event | None = None):
        self._answers = answers

    def write(self, data: bytes) -> int:
        if self._answers is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._answers.wait(30)
        return len(data)

    def close(self) -> None:
        pass


def on(monkeypatch: pytest.MonkeyPatch, stream: Broken) -> None:
    """Let event logs write to a stream."""
    start = EventLog.__init__

    def start_on(self: EventLog, path: Path) -> None:
        start(self, path)
        self._stream = stream  # type: ignore[assignment]

    monkeypatch.setattr(EventLog, "__init__", start_on)


def test_a_log_that_fails_is_warned_about_once(
    config: MergeConfig,
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on(monkeypatch, Broken())
    assert merge_logged(config, log).output.exists()
    (warning,) = [one for one in caplog.records if "--log-json" in one.getMessage()]
    assert warning.levelno == logging.WARNING
    assert "No space left on device; the merge continues without it" in warning.getMessage()


@pytest.fixture
def answers() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_log_that_hangs_holds_nothing_up(
    config: MergeConfig, log: Path, monkeypatch: pytest.MonkeyPatch, answers: threading.Event
) -> None:
    monkeypatch.setattr(timeouts, "flush_within", 0.1)
    on(monkeypatch, Broken(answers))
    assert merge_logged(config, log).output.exists()
    assert not answers.is_set()


def test_a_later_job_goes_on_after_a_line_cut_short(config: MergeConfig, log: Path) -> None:
    log.write_text('{"event": "started"}\n{"event": "pla')
    merge_logged(config, log)
    _, half, *rest = log.read_text().splitlines()
    assert half == '{"event": "pla'
    assert json.loads(rest[0])["event"] == "started" and json.loads(rest[-1])["event"] == "finished"


def test_progress_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "progress_every", 0.01)
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.progress = lambda: {"bytes_done": 5}
    deadline = time.monotonic() + 30
    while path.read_text().count("\n") < 3:
        assert time.monotonic() < deadline, "no progress is told"
        time.sleep(0.01)
    log.progress = None
    log.close()
    assert {event["event"] for event in told(path)} == {"progress"}
    assert told(path)[0]["bytes_done"] == 5


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the last minute: what an earlier merge had finished counts as done, not as fast."""
    now, done = 100.0, 0
    monkeypatch.setattr(event_log.time, "monotonic", lambda: now)
    meter = Meter(1000, lambda: done)
    assert meter.read()["seconds_left"] is None
    for _ in range(12):
        now, done = now + 5.0, done + 10
        meter.read()
    now, done = now + 5.0, done + 130
    assert meter.read() == {
        "bytes_done": 250,
        "bytes_total": 1000,
        "bytes_per_second": 4,
        "seconds_left": 187.5,
    }


def test_no_log_tells_nothing(tmp_path: Path) -> None:
    handlers = list(logging.getLogger("wsm_megatron").handlers)
    with pytest.raises(MergeError):
        merge(MergeConfig(load=RUNS / runs.WRONG_MAINS, save=tmp_path, optimizer_state="last"))
    assert logging.getLogger("wsm_megatron").handlers == handlers
