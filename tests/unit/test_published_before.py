"""A merge that was published already is not made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference import RUNS
from tests.runs import DENSE
from wsm_megatron import MergeConfig, merge


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
