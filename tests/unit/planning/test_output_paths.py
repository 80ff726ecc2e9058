"""Where merges are written: not into the run, not over each other, not onto a full disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, merge
from wsm_megatron.checkpoint.run_directory import TRACKER_FILE
from wsm_megatron.planning.output_paths import check_outputs
from wsm_megatron.storage import space


def everything(root: Path) -> dict[str, tuple[int, bytes | None]]:
    """Modification times and contents of all that lies below a directory."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted([root, *root.rglob("*")])
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose directory is named as a merge of several decays would name it."""
    return runs.copy_run(runs.DENSE, tmp_path / "o" / "mean")


def link(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


def linked_run(tmp_path: Path, run: Path) -> Path:
    """Checkpoints of a run, by links in another directory."""
    folder = tmp_path / "links"
    folder.mkdir()
    for child in run.glob("iter_*"):
        link(folder / child.name, child)
    return folder


Change = Callable[[Path, Path], dict[str, Any]]
INTO_THE_RUN: dict[str, Change] = {
    "a output's root": lambda top, run: {
        "save": run.parent,
        "decay": "mean,ema",
        "output_iteration": 99,
    },
    "a link": lambda top, run: {"save": link(top / "link", run), "output_iteration": 99},
    "a output's root through a link": lambda top, run: {
        "save": link(top / "link", run.parent),
        "decay": "ema,mean",
        "output_iteration": 99,
    },
    "a relative path": lambda top, run: {
        "save": Path(os.path.relpath(run.parent)) / ".." / "o",
        "decay": "mean,ema",
    },
    "the run of linked checkpoints": lambda top, run: {
        "load": linked_run(top, run),
        "save": run,
        "output_iteration": 99,
    },
    "inside of a checkpoint": lambda top, run: {"save": run / "iter_0000004" / "x" / "y"},
    "inside of a checkpoint that is not merged": lambda top, run: {
        "save": run / "iter_0000002" / "x",
        "last": 2,
    },
    "inside of a checkpoint, through a link": lambda top, run: {
        "save": link(top / "link", run / "iter_0000004") / "x"
    },
    "inside of a linked checkpoint": lambda top, run: {
        "load": linked_run(top, run),
        "save": run / "iter_0000004" / "x",
    },
    "inside of a linked checkpoint, by the link": lambda top, run: {
        "load": linked_run(top, run),
        "save": top / "links" / "iter_0000004" / "x",
    },
    "log in the run": lambda top, run: {"log_json": run / "events.jsonl"},
    "log in a checkpoint": lambda top, run: {"log_json": run / "iter_0000004" / "events.jsonl"},
    "log over a source": lambda top, run: {"log_json": run / "iter_0000004" / "common.pt"},
    "log through a link to a source": lambda top, run: {
        "log_json": link(top / "log", run / "iter_0000004" / "common.pt")
    },
    "log is a hard link of a source": lambda top, run: {
        "log_json": hard_link(top / "log", run / "iter_0000004" / "common.pt")
    },
}


def hard_link(path: Path, to: Path) -> Path:
    os.link(to, path)
    return path


@pytest.mark.parametrize("case", INTO_THE_RUN)
@pytest.mark.parametrize("parallel", [False, True])
def test_the_run_is_never_written(tmp_path: Path, run: Path, case: str, parallel: bool) -> None:
    options = INTO_THE_RUN[case](tmp_path, run)
    before = everything(tmp_path)
    log = options.pop("log_json", None)
    execution = ExecutionOptions(node_local=parallel, log_json=log)
    with pytest.raises(ValueError, match="sources are never written to") as caught:
        merge(MergeConfig(**{"load": run, "save": tmp_path / "out", **options}), execution)
    named = "--save" if log is None else "--log-json"
    assert str(caught.value).startswith(named)
    assert everything(tmp_path) == before


def test_a_bind_mount_of_the_run_is_the_run(tmp_path: Path, run: Path) -> None:
    """By device and inode: no path tells. In place of a mount, ``stat`` says what it would."""
    other = tmp_path / "mount"
    other.mkdir()
    stat = os.stat

    def stat_mounted(path: Any, **options: Any) -> os.stat_result:
        return stat(run if Path(path) == other else path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", stat_mounted)
        with pytest.raises(ValueError, match="is the run itself"):
            check_outputs(MergeConfig(load=run, save=other))


def test_a_directory_of_its_own_below_the_run_is_allowed(tmp_path: Path, run: Path) -> None:
    """``RUN/wsm`` is where the plugin saves by default."""
    before = everything(run)
    config = MergeConfig(load=run, save=run / "wsm")
    merge(config, ExecutionOptions(log_json=tmp_path / "events.jsonl"))
    merge(replace(config, save=run / "wsm" / "more", decay="mean,ema"))
    after = everything(run)
    assert {name: after[name] for name in before if name != "."} == {
        name: what for name, what in before.items() if name != "."
    }


def csv(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("t,s\n0,1\n1,0\n")
    return path


def test_two_merges_with_one_root_are_refused_at_once(tmp_path: Path) -> None:
    one, other = csv(tmp_path / "a" / "x.csv"), csv(tmp_path / "b" / "x.csv")
    out = tmp_path / "out"
    config = MergeConfig(load=RUNS / runs.DENSE, save=out, decay=f"{one},{other}")
    with pytest.raises(ValueError, match=f"{one} and with --decay {other} would both be saved"):
        merge(config)
    mean = csv(tmp_path / "mean.csv")
    with pytest.raises(ValueError, match=f"--decay mean and with --decay {mean} would both be"):
        merge(replace(config, decay=f"mean,ema,{mean}"))
    assert not out.exists()
    out.mkdir()
    link(out / "4-iterations", out / "2-iterations")
    with pytest.raises(ValueError, match="--window-iterations 2 and .*--window-iterations 4 "):
        merge(replace(config, decay="mean", window_iterations=(2, 4)))


def free_bytes(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=nbytes))


def test_free_space_is_counted_for_all_products_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "one", decay="mean")
    size = sum(path.stat().st_size for path in merge(config).output.glob("*.distcp"))
    many = replace(config, save=tmp_path / "a" / "b", decay="mean,ema,cosine")
    free_bytes(monkeypatch, 3 * size - 1)
    with pytest.raises(MergeError, match="GB needed and .* free; nothing was written") as caught:
        merge(many)
    assert all(f"b/{name}" in str(caught.value) for name in ("mean", "ema", "cosine"))
    assert not (tmp_path / "a").exists()
    free_bytes(monkeypatch, 4 * size)
    assert len(merge(many).merged) == 3


def test_each_file_system_is_counted_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {tmp_path / name / "iter_0000008": 1000 for name in "abc"}
    for path in needed:
        path.parent.mkdir()
    free_bytes(monkeypatch, 2000)
    with pytest.raises(MergeError, match="a, .*b, .*c: 0.000 GB needed"):
        space.check_space(needed, dict.fromkeys(needed, 0))
    space.check_space(needed, dict.fromkeys(needed, 400))
    stat = Path.stat

    class Elsewhere:
        st_dev = -1

    monkeypatch.setattr(
        Path, "stat", lambda path, **more: Elsewhere if path.name == "b" else stat(path, **more)
    )
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    space.check_space(needed, dict.fromkeys(needed, 0))


def test_what_is_there_already_counts(tmp_path: Path) -> None:
    assert space.allocated(tmp_path / "nothing") == 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(5000))
    assert space.allocated(tmp_path) == 5000
    os.truncate(tmp_path / "folder" / "file", 10**9)
    assert space.allocated(tmp_path) < 10**6, "a hole takes up nothing"


def tracker(root: Path) -> str:
    return (root / TRACKER_FILE).read_text()


def test_an_older_merge_does_not_move_the_tracker_back(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.DENSE, save=tmp_path, last=2)
    for to, newest in ((6, "6"), (4, "6"), (8, "8"), (6, "8")):
        merge(replace(config, to=to))
        assert tracker(tmp_path) == newest
    shutil.rmtree(tmp_path / "iter_0000008")
    merge(replace(config, to=6))
    assert tracker(tmp_path) == "6", "the newer one is gone"


@pytest.mark.parametrize("text", ["release", "", "eight", "-3", "²"])
def test_a_tracker_that_names_no_iteration(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TRACKER_FILE).write_text(text)
    merge(MergeConfig(load=RUNS / runs.DENSE, save=tmp_path))
    assert tracker(tmp_path) == "8"
    assert "which is no iteration; it says 8 now, the newest merge" in caplog.text
