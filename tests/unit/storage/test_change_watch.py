"""A checkpoint that changes is noticed while others are still read, at a small price."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from wsm_megatron import MergeError
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage import change_watch
from wsm_megatron.storage.change_watch import ChangeWatch
from wsm_megatron.storage.fingerprint import Fingerprint, fingerprint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.copy_run(runs.DENSE, tmp_path / "run")


@pytest.fixture
def opened(run: Path) -> dict[Path, Fingerprint]:
    return {path: fingerprint(path) for path in (runs.checkpoint(run, i) for i in runs.ITERATIONS)}


def looks(watching: ChangeWatch, number: int) -> None:
    """Look at so many directories, in the test's own thread."""
    for _ in range(number):
        watching._look_at_next()


def write_over(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: shutil.rmtree(path), "was deleted"),
        (lambda path: (path / "metadata.json").unlink(), "changed"),
        (lambda path: (path / "another.distcp").touch(), "changed"),
        (lambda path: write_over(path / "__0_0.distcp"), "changed"),
    ],
)
def test_every_change_is_seen(
    run: Path, opened: dict[Path, Fingerprint], change: Callable[[Path], Any], words: str
) -> None:
    watching = ChangeWatch(opened)
    everything = sum(map(len, opened.values()))
    looks(watching, everything)
    change(runs.checkpoint(run, 6))
    with pytest.raises(MergeError, match=f"iter_0000006 {words} while it was read"):
        looks(watching, everything)


def test_a_file_that_came_and_went_is_no_change(run: Path, opened: dict[Path, Fingerprint]) -> None:
    watching = ChangeWatch(opened)
    passing = runs.checkpoint(run, 6) / ".nfs0001"
    passing.touch()
    passing.unlink()
    looks(watching, 100)


def test_a_look_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = [tmp_path / str(number) for number in range(200)]
    for directory in directories:
        directory.mkdir()
        (directory / "file").touch()
    watching = ChangeWatch({path: fingerprint(path) for path in directories})
    asked: list[Path] = []
    stat = change_watch._stat
    monkeypatch.setattr(change_watch, "_stat", lambda path: asked.append(path) or stat(path))
    watching._look()
    assert len(asked) == 2 * change_watch.DIRECTORIES_A_LOOK


def test_the_thread_says_what_it_has_seen(
    run: Path, opened: dict[Path, Fingerprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "look_every", 0.01)
    with ChangeWatch(opened) as watching:
        watching.check()
        (runs.checkpoint(run, 2) / "metadata.json").unlink()
        deadline = time.monotonic() + 30
        with pytest.raises(MergeError, match="iter_0000002 changed"):
            while time.monotonic() < deadline:
                watching.check()
                time.sleep(0.01)
