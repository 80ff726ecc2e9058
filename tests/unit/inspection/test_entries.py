"""Entries are read once: what is read of them makes up the checksums of their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import runs
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader, size_and_crc
from wsm_megatron.inspection.entries import checksums_of_files, parts_of, read_entries

KEY = "decoder.layers.mlp.linear_fc1.weight"


def read(path: Path, allow_nonfinite: bool = False):
    reader = CheckpointReader(read_layout(path))
    parts = parts_of(reader)
    done = read_entries(reader, parts, allow_nonfinite, lambda nbytes: None)
    return done, checksums_of_files(reader, parts, done)


@pytest.mark.parametrize("run", runs.ALL)
def test_checksums_are_those_of_the_files(run):
    path = runs.checkpoint(run, 8)
    done, found = read(path)
    assert done.problem is None and found
    assert found == {name: size_and_crc(path / name) for name in read_layout(path).files}


def test_bytes_between_and_after_entries_count(tmp_path):
    path = runs.copy_run(runs.DENSE, tmp_path / "run") / "iter_0000008"
    name = next(iter(read_layout(path).files))
    with (path / name).open("ab") as file:
        file.write(b"more")
    _, found = read(path)
    assert found[name] == size_and_crc(path / name)


def test_a_file_with_a_damaged_entry_has_none_and_the_others_are_read(tmp_path):
    path = runs.copy_run(runs.DENSE, tmp_path / "run") / "iter_0000008"
    location = read_layout(path).tensors[KEY].chunks[0].location
    good = read(path)[1]
    runs.flip_byte(path / location.file, location.offset + location.length // 2)
    done, found = read(path)
    assert KEY in str(done.problem) and location not in done.crcs
    assert found == {name: one for name, one in good.items() if name != location.file}


def test_the_first_problem_is_told_whichever_thread_is_first(tmp_path):
    path = runs.copy_run(runs.DENSE, tmp_path / "run") / "iter_0000008"
    runs.rewrite(path, lambda key, tensor: tensor.mul_(float("nan")))
    first = {str(read(path)[0].problem) for _ in range(5)}
    assert len(first) == 1 and "holds NaN or Inf" in first.pop()
    assert read(path, allow_nonfinite=True)[0].problem is None


def test_verifying_a_merge_reads_every_byte_once_and_shows_it(tmp_path):
    merged = merge(
        MergeConfig(load=runs.copy_run(runs.DENSE, tmp_path / "run"), save=tmp_path / "out")
    )
    told: list[tuple[int, int]] = []

    @contextmanager
    def bar(rank: int, total: int) -> Iterator:
        shown: list[int] = []
        yield shown.append
        told.append((total, sum(shown)))

    report = verify(merged.output, progress=bar)
    sizes = {path.name: path.stat().st_size for path in merged.output.iterdir()}
    files = sum(sizes.values()) - sizes["wsm_merge.json"]
    assert report.bytes_read == files
    assert [total for total, _ in told] == [shown for _, shown in told] and told[0][0] <= files
    verify(merged.output, sources="all", progress=bar)
    assert len(told) == 3 and told[2][0] == told[2][1] > told[0][0]


def test_a_file_that_is_gone_is_named(tmp_path):
    path = runs.copy_run(runs.DENSE, tmp_path / "run") / "iter_0000008"
    (path / next(iter(read_layout(path).files))).unlink()
    with pytest.raises(MergeError, match=r"distcp"):
        verify(path)
