"""A merge that was stopped goes on from what it has finished."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, MergeReport, merge
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.staging_dir import journals
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.errors import StoppedError
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.staging_key import placement, staging_key
from wsm_megatron.storage.journal import _line as journal_line
from wsm_megatron.storage.journal import _read as read_journal

KEY = "decoder.layers.mlp.linear_fc1.weight"
NAME = "iter_0000008"
JOURNAL = "__0_0.distcp.journal"
STOPPED = StoppedError("stopped", signal.SIGTERM)
ALONE = ExecutionOptions(threads=1)


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    run = runs.copy_run(runs.FP32_PARAM, tmp_path / "run")
    return MergeConfig(load=run, save=tmp_path / "out", optimizer_state="merge")


@pytest.fixture
def expected(config: MergeConfig, tmp_path: Path) -> dict[str, bytes]:
    return contents(merge(replace(config, save=tmp_path / "clean")).output)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Tensors and metadata; the common state and the provenance name the ``--save`` directory."""
    names = ("__0_0.distcp", ".metadata", "metadata.json")
    assert {path.name for path in checkpoint.iterdir()} == {*names, "common.pt", "wsm_merge.json"}
    return {name: (checkpoint / name).read_bytes() for name in names}


def stop_merge(
    monkeypatch: pytest.MonkeyPatch,
    config: MergeConfig,
    chunks: int,
    execution: ExecutionOptions = ALONE,
) -> None:
    """Stop a merge once this many chunks are finished."""
    finish, count = ChunkWriter.finish, 0

    def finish_some(writer: ChunkWriter) -> None:
        nonlocal count
        if count == chunks:
            raise STOPPED
        count += 1
        finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "finish", finish_some)
        with pytest.raises(StoppedError):
            merge(config, execution)


def stop_after(monkeypatch: pytest.MonkeyPatch, config: MergeConfig, chunks: int) -> Path:
    """:func:`stop_merge` of one output; the directory that it leaves."""
    stop_merge(monkeypatch, config, chunks)
    left, beside = sorted(config.save.iterdir())
    assert left.is_dir() and left.name.startswith(".iter_0000008.wsm-")
    assert beside == journals(left)
    return left


def assert_goes_on(
    config: MergeConfig,
    expected: dict[str, bytes],
    whole: bool,
    execution: ExecutionOptions = ALONE,
) -> MergeReport:
    """Merge again: the same bytes, and nothing else left; ``whole`` when it had to start over."""
    total = sum(len(data) for name, data in expected.items() if name.endswith(".distcp"))
    report = merge(config, execution)
    assert contents(report.output) == expected
    assert (report.bytes_written == total) == whole
    assert not [path for path in config.save.iterdir() if path.name.startswith(".")]
    return report


@pytest.mark.parametrize("chunks", [1, 7])
def test_finished_chunks_are_not_made_again(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    stop_after(monkeypatch, config, chunks)
    assert_goes_on(config, expected, whole=False)


def test_what_is_copied_need_not_be_in_older_sources(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = runs.checkpoint(config.load, 2)
    runs.rewrite(older, rename=lambda key: key.replace("exp_avg", "unused"))
    config = replace(config, optimizer_state="last")
    clean = contents(merge(replace(config, save=config.save.parent / "clean"), ALONE).output)
    chunks = sum(
        len(e.chunks) for e in read_layout(config.save.parent / "clean" / NAME).tensors.values()
    )
    stop_after(monkeypatch, config, chunks - 1)
    assert_goes_on(config, clean, whole=False)


def test_nothing_finished_leaves_nothing(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise STOPPED

    monkeypatch.setattr(ChunkWriter, "append", stop)
    monkeypatch.setattr("wsm_megatron.checkpoint.writer.CheckpointFile.write_bytes", stop)
    with pytest.raises(StoppedError):
        merge(config, ALONE)
    assert list(config.save.iterdir()) == []


def test_a_merge_that_cannot_succeed_leaves_nothing(config: MergeConfig) -> None:
    def poison(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if key == KEY else tensor

    runs.rewrite(runs.checkpoint(config.load, 6), poison)
    with pytest.raises(MergeError, match="main param"):
        merge(config, ALONE)
    assert list(config.save.iterdir()) == []


def test_a_part_that_has_changed_is_made_again(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stop_after(monkeypatch, config, 7)
    lines = (journals(left) / JOURNAL).read_text().splitlines()
    offset, length, *_ = max((line.split() for line in lines), key=lambda words: int(words[1]))
    runs.flip_byte(left / "__0_0.distcp", int(offset) + int(length) // 2)
    assert_goes_on(config, expected, whole=False)


def test_a_journal_cut_short(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journals(stop_after(monkeypatch, config, 7)) / JOURNAL
    os.truncate(journal, journal.stat().st_size - 3)
    assert_goes_on(config, expected, whole=False)


def changes(config: MergeConfig) -> Iterator[MergeConfig]:
    yield replace(config, decay="1-sqrt")
    yield replace(config, optimizer_state="last")


def test_another_merge_starts_over(config: MergeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, other in enumerate(changes(config)):
        clean = contents(merge(replace(other, save=config.save.with_name(f"clean{k}"))).output)
        one = replace(config, save=config.save / str(k))
        left = stop_after(monkeypatch, one, 7)
        assert_goes_on(replace(other, save=one.save), clean, whole=True)
        assert not left.exists()


def test_sources_written_anew_start_over(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, config, 7)
    os.utime(runs.checkpoint(config.load, 4) / "__0_0.distcp")
    assert_goes_on(config, expected, whole=True)


@pytest.mark.parametrize(
    "option", [{"threads": 4}, {"memory": 10**6}, {"retries": 1}, {"device": "cpu"}]
)
def test_how_the_job_runs_is_not_part_of_the_key(
    config: MergeConfig,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    option: dict[str, Any],
) -> None:
    stop_after(monkeypatch, config, 7)
    assert_goes_on(config, expected, False, replace(ALONE, **option))


def test_a_source_written_anew_with_its_old_times_starts_over(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``rsync -t`` leaves it: name, size, modification time and metadata say nothing."""
    file = runs.checkpoint(config.load, 4) / "__0_0.distcp"
    before = file.stat()
    stop_after(monkeypatch, config, 7)
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_goes_on(config, expected, whole=True)


def test_a_file_longer_than_planned_is_cut(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stop_after(monkeypatch, config, 7)
    os.truncate(left / "__0_0.distcp", 10 * len(expected["__0_0.distcp"]))
    assert_goes_on(config, expected, whole=False)


def test_a_file_that_the_plan_does_not_know_is_removed(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stop_after(monkeypatch, config, 7)
    (left / "__1_0.distcp").write_bytes(b"of another rank")
    (left / "half").mkdir()
    (left / "half" / "file").touch()
    assert_goes_on(config, expected, whole=False)


def test_a_line_of_another_item_is_not_believed(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offset, length and CRC-32 are right, and of something else."""
    left = stop_after(monkeypatch, config, 7)
    journal, file = journals(left) / JOURNAL, left / "__0_0.distcp"
    items = {(one.offset, one.length): one for one in read_journal(journal)}
    same = next(
        (a, b)
        for a in items.values()
        for b in items.values()
        if a.length == b.length and a.offset < b.offset and a.crc != b.crc
    )
    data = bytearray(file.read_bytes())
    pieces = [bytes(data[one.offset : one.offset + one.length]) for one in same]
    for one, other, piece in zip(same, reversed(same), reversed(pieces), strict=True):
        data[one.offset : one.offset + one.length] = piece
        items[one.offset, one.length] = replace(one, crc=other.crc, identity=other.identity)
    file.write_bytes(data)
    journal.write_text("".join(map(journal_line, items.values())))
    assert_goes_on(config, expected, whole=False)


def test_other_products_that_place_this_one_elsewhere_start_over(tmp_path: Path) -> None:
    """The shares of a job's ranks follow from all of its outputs."""
    keys: dict[tuple[int, ...], set[str]] = {}
    for windows in ((4, 2), (4, 6), (4,)):
        config = MergeConfig(
            load=runs.RUNS / runs.FP32_PARAM,
            save=tmp_path,
            window_iterations=windows,
            optimizer_state="last",
        )
        job = prepare_job(config)
        parts = job.rank_plans(9)
        one = next(p for p in job.outputs if len(p.source_indices) == 3)
        placed = placement(job, job.outputs.index(one), parts)
        stored = [
            placed_one
            for rank, part in enumerate(parts)
            for placed_one in job.placed(job.outputs.index(one), rank, part)
        ]
        keys.setdefault(tuple(map(hash, stored)), set()).add(staging_key(job, one, placed))
    assert len(keys) > 1 and all(len(found) == 1 for found in keys.values())
    assert len(set[str]().union(*keys.values())) == len(keys)


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_what_is_left_of_a_job_keeps_its_places(tmp_path: Path, ranks: int) -> None:
    """Killed after one checkpoint has got its name, it goes on from the next, which is complete."""
    config = MergeConfig(
        load=runs.RUNS / runs.FP32_PARAM,
        save=tmp_path,
        window_iterations=(2, 6, 4),
        optimizer_state="last",
    )
    job = prepare_job(config)
    whole = [placement(job, k, job.rank_plans(ranks)) for k in range(3)]
    for left in ([0], [1], [2], [0, 2]):
        rest = job.only(left)
        parts = rest.rank_plans(ranks)
        assert [placement(rest, k, parts) for k in range(len(left))] == [whole[k] for k in left]
    last = job.only([0, 2]).only([1])
    assert placement(last, 0, last.rank_plans(ranks)) == whole[2]


@pytest.mark.parametrize("parallel", ["", "--node-local"])
def test_the_key_is_the_same_in_every_process(tmp_path: Path, parallel: str) -> None:
    keys = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", KEY_OF, str(runs.RUNS / runs.FLAT), str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        keys.add(subprocess.check_output([*command, parallel], env=environment, text=True))
    assert len(keys) == 1 and re.fullmatch("[0-9a-f]{12} [0-9a-f]{12}\n", keys.pop())


KEY_OF = """
import sys
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.staging_key import placement, staging_key
from wsm_megatron.access.node_local.access import NodeLocal
from wsm_megatron.access.shared import Shared

run, save, parallel = sys.argv[1:]
config = MergeConfig(load=run, save=save, optimizer_state="last", decay="mean,ema")
merges = MergeSet.of(config)
access = (NodeLocal if parallel else Shared)(merges, ExecutionOptions(), Ranks())
job = access.prepare()
parts = access.distribute(job).rank_plans if parallel else job.rank_plans(3)
print(*(staging_key(job, p, placement(job, k, parts)) for k, p in enumerate(job.outputs)))
"""


def test_stopped_while_it_is_published(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise STOPPED

    with monkeypatch.context() as patch:
        patch.setattr("wsm_megatron.publication.write_provenance", stop)
        with pytest.raises(StoppedError):
            merge(config, ALONE)
    report = assert_goes_on(config, expected, whole=False)
    assert report.bytes_written < 100_000, "objects, but no tensor"


def test_damage_of_a_source_is_found_although_it_is_not_read_again(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record read in parts is checked last: by the second merge, though the first has read it."""
    path = runs.checkpoint(config.load, 6)
    runs.rewrite(path, grid=runs.split_axis(2, 3))
    chunk = read_layout(path).tensors[KEY].chunks[1]
    runs.flip_byte(path / chunk.location.file, chunk.location.offset + chunk.location.length // 2)

    def stop(*_: Any) -> None:
        raise STOPPED

    config = replace(config, optimizer_state="drop")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "verify", stop)
        with pytest.raises(StoppedError):
            merge(config, ALONE)
    with pytest.raises(MergeError, match=r"CRC-32 of .*does not match"):
        merge(config, ALONE)
    assert list(config.save.iterdir()) == []
