"""What another node has written is waited for, for a bounded time, and asked for with patience."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsm_megatron import MergeError
from wsm_megatron.errors import StorageError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import visibility
from wsm_megatron.storage.visibility import wait_for_directory, wait_for_files


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visibility, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(timeouts, "first_pause", 0.0)


def never() -> None:
    pytest.fail("nothing to wait for")


def in_turn(*steps: Any) -> Any:
    """A check between two looks that takes a step of another node each time."""
    waiting: Iterator[Any] = iter(steps)
    return lambda: next(waiting)()


def test_what_is_there_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    wait_for_directory(tmp_path, never)
    wait_for_files(tmp_path, {"a": 3}, never)


def test_a_directory_whose_parent_is_not_seen_either(tmp_path: Path) -> None:
    """``--save`` itself may be as new."""
    root = tmp_path / "new" / "out"
    check = in_turn(lambda: None, lambda: root.mkdir(parents=True), lambda: (root / "x").mkdir())
    wait_for_directory(root / "x", check)


def test_files_that_come_and_grow(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    check = in_turn(
        lambda: one.write_bytes(b"1"), lambda: other.touch(), lambda: one.write_bytes(b"123")
    )
    wait_for_files(tmp_path, {"one": 3, "other": 0}, check)


def test_the_wait_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "visible_within", 0.01)
    with pytest.raises(StorageError, match="x, made by rank 0, is not there after"):
        wait_for_directory(tmp_path / "x", lambda: None)
    with pytest.raises(StorageError, match="y: missing where its rank has written 3"):
        wait_for_files(tmp_path, {"y": 3}, lambda: None)


def test_a_failure_elsewhere_ends_the_wait(tmp_path: Path) -> None:
    def fail() -> None:
        raise MergeError("rank 2 is lost")

    with pytest.raises(MergeError, match="rank 2 is lost"):
        wait_for_directory(tmp_path / "x", fail)


def test_a_look_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, failures = os.stat, [errno.ESTALE, errno.EIO]

    def flaky(self: Path, **options: Any) -> os.stat_result:
        if failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return stat(self, **options)

    (tmp_path / "a").write_bytes(b"123")
    monkeypatch.setattr(Path, "stat", flaky)
    wait_for_files(tmp_path, {"a": 3}, never)
    assert not failures
