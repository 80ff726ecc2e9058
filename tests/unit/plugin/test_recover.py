"""At the start of a run: what lies in the folder of merged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsm_megatron.plugin.emit import recover

TRACKER = "latest_checkpointed_iteration.txt"


def merged(root: Path, *iterations: int, tracker: str | bytes | None = None) -> Path:
    for iteration in iterations:
        folder = root / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")
    root.mkdir(exist_ok=True)
    if tracker is not None:
        data = tracker if isinstance(tracker, bytes) else tracker.encode()
        (root / TRACKER).write_bytes(data)
    return root


def tracker(root: Path) -> str:
    return (root / TRACKER).read_text()


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    recover(tmp_path / "none", 0)
    recover(merged(tmp_path / "empty"), 0)
    assert not (tmp_path / "none").exists() and not (tmp_path / "empty" / TRACKER).exists()


@pytest.mark.parametrize("text", [None, "4", "4\n", "0000004"])
def test_the_tracker_catches_up(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    root = merged(tmp_path, 4, 8, tracker=text)
    (root / ".iter_0000012.wsm-emit").mkdir()
    recover(root, 8)
    assert tracker(root) == "8" and not list(root.glob(".iter*")) and not caplog.messages


def test_an_unfinished_checkpoint_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = merged(tmp_path, 4, tracker="8")
    (root / "iter_0000008").mkdir()
    recover(root, 8)
    assert (root / "iter_0000008").is_dir() and tracker(root) == "4"
    assert "iterations [8] are unfinished" in caplog.messages[0]
    assert "says '8', which is no merged checkpoint there; it now says 4" in caplog.messages[1]


def test_nothing_but_an_unfinished_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "iter_0000100").mkdir()
    recover(tmp_path, 0)
    assert "iterations [100] are unfinished" in caplog.text
    assert not (tmp_path / TRACKER).exists()


def test_a_release_is_not_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = merged(tmp_path, 4, tracker="release\n")
    recover(root, 4)
    assert tracker(root) == "release\n" and "says release" in caplog.text


@pytest.mark.parametrize("junk", ["", "four", "-4", "\u00b2", "9" * 5000, b"\xff\xfe\x00", "12"])
def test_a_tracker_that_names_no_checkpoint(
    tmp_path: Path, junk: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    root = merged(tmp_path, 4, tracker=junk)
    recover(root, 4)
    assert tracker(root) == "4" and "it now says 4" in caplog.text


def test_merges_of_a_later_iteration_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another run's, most likely: it was saved to the same folder."""
    root = merged(tmp_path, 4, 8, tracker="8")
    recover(root, 4)
    assert "merged checkpoints of iterations [8], and this run starts at iteration 4" in caplog.text
    assert tracker(root) == "8"
