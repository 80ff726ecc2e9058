"""What a path means to ``verify`` and ``inspect``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import runs
from wsm_megatron.cli.main import main
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.lookup import checkpoints_at, roots_at


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """A folder of two roots, of which one also holds an unfinished checkpoint, and other things."""
    for name in ("a", "b"):
        shutil.copytree(runs.RUNS / runs.DENSE, tmp_path / name)
    (tmp_path / "a" / "iter_0000010").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "sweep.json").write_text("{}")
    return tmp_path


def of(root: Path, *iterations: int) -> list[Path]:
    return [root / f"iter_{iteration:07d}" for iteration in iterations]


def test_a_checkpoint_is_itself(roots: Path) -> None:
    for path in of(roots / "a", 8, 10):
        assert checkpoints_at(path) == [path]


def test_a_tracker_is_what_it_names(roots: Path) -> None:
    tracker = roots / "a" / "latest_checkpointed_iteration.txt"
    tracker.write_text("6")
    assert checkpoints_at(tracker) == of(roots / "a", 6)


@pytest.mark.parametrize("text", ["", "7", "many", "release"])
def test_a_tracker_that_names_nothing_here(roots: Path, text: str) -> None:
    tracker = roots / "a" / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    with pytest.raises(UsageError, match="latest_checkpointed_iteration.txt"):
        checkpoints_at(tracker)


def test_a_root_is_all_of_its_checkpoints(roots: Path) -> None:
    (roots / "b" / "release").mkdir()
    assert checkpoints_at(roots / "a") == of(roots / "a", 2, 4, 6, 8, 10)
    assert checkpoints_at(roots / "b") == [roots / "b" / "release", *of(roots / "b", 2, 4, 6, 8)]


def test_a_folder_of_roots(roots: Path) -> None:
    assert roots_at(roots) == [roots / "a", roots / "b"]
    assert len(checkpoints_at(roots)) == 9


def test_nothing_of_this(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no iter_XXXXXXX checkpoint"):
        checkpoints_at(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        roots_at(tmp_path / "missing")


def test_a_root_of_what_only_looks_like_checkpoints(tmp_path: Path) -> None:
    shutil.copytree(runs.checkpoint(runs.DENSE, 2), tmp_path / "iter_100")
    assert roots_at(tmp_path) == [tmp_path]
    with pytest.raises(UsageError, match="rename it, iter_ and seven digits"):
        checkpoints_at(tmp_path)


def test_verify_goes_on_after_one_that_is_not_whole(
    roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(roots), "--json"]) == 1
    *lines, data = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 of 9 checkpoints are whole"
    assert [line for line in lines if line.startswith("NOT WHOLE")] == [lines[4]]
    said = json.loads(data)["checkpoints"]
    assert [one["path"] for one in said if "problem" in one] == [str(*of(roots / "a", 10))]


def test_inspect_shows_every_root(roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(roots), "--json"]) == 0
    *_, data = capsys.readouterr().out.splitlines()
    assert [one["path"] for one in json.loads(data)["roots"]] == [
        str(roots / "a"),
        str(roots / "b"),
    ]


def test_inspect_of_a_tracker(roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(roots / "a" / "latest_checkpointed_iteration.txt")]) == 0
    assert capsys.readouterr().out.startswith(f"{roots}/a/iter_0000008: iteration 8")
