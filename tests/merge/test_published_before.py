"""A merge that was published already is not made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference import RUNS, load_tensors, same_bits
from tests.runs import DENSE, FULLY
from wsm_megatron import ExecutionOptions, MergeConfig, merge
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import read_layout


def test_the_same_merge_again_does_nothing(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path)
    first = merge(config)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()  # as if it had died just before
    times = [path.stat().st_mtime_ns for path in first.output.iterdir()]
    again = merge(config)
    assert (again.merged, again.bytes_written) == (first.merged, 0)
    assert [path.stat().st_mtime_ns for path in first.output.iterdir()] == times
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "8"


def test_any_other_merge_is_refused(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / DENSE, save=tmp_path)
    first = merge(config)
    with pytest.raises(ValueError, match="exists and is left alone"):
        merge(replace(config, decay="1-sqrt"))
    file = first.output / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="exists and is left alone"):
        merge(config)


def test_of_several_the_missing_ones_are_made(tmp_path: Path) -> None:
    one = MergeConfig(load=RUNS / DENSE, save=tmp_path / "mean", decay="mean")
    merge(one)
    report = merge(replace(one, save=tmp_path, decay="mean,ema"))
    assert [merged.output.parent.name for merged in report.merged] == ["mean", "ema"]
    assert all((merged.output / "wsm_merge.json").exists() for merged in report.merged)


@pytest.mark.parametrize("parallel", [False, True])
def test_sources_of_what_is_missing_are_read_alone(tmp_path: Path, parallel: bool) -> None:
    """Checkpoint 8 is in no window that is left, and what is copied from it is there already."""
    run = RUNS / FULLY
    one = MergeConfig(load=run, save=tmp_path / "out", last=2, optimizer_state="last")
    execution = ExecutionOptions(node_local=parallel)
    merge(one, execution)
    report = merge(replace(one, sliding_every=2), execution)
    assert [merged.iterations for merged in report.merged] == [(2, 4), (4, 6), (6, 8)]
    entries = read_layout(report.output).entries.values()
    copied = sum(e.nbytes for e in entries if e.role not in (Role.MODEL, Role.MAIN))
    summed = sum(e.nbytes for e in entries) - copied
    assert report.bytes_read == 3 * summed + 2 * copied
    clean = merge(replace(one, sliding_every=2, save=tmp_path / "clean"), execution)
    for left, right in zip(report.merged, clean.merged, strict=True):
        ours, theirs = load_tensors(left.output), load_tensors(right.output)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert same_bits(ours[key], tensor), (left.output, key)
