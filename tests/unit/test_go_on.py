"""A merge that was stopped goes on from what it has finished."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from wsm_megatron import MergeConfig, MergeError, MergeReport, merge
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.errors import StoppedError

KEY = "decoder.layers.mlp.linear_fc1.weight"
NAME = "iter_0000008"
STOPPED = StoppedError("stopped", signal.SIGTERM)


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    run = runs.copy_run(runs.FP32_PARAM, tmp_path / "run")
    return MergeConfig(load=run, save=tmp_path / "out", optimizer_state="merge", threads=1)


@pytest.fixture
def expected(config: MergeConfig, tmp_path: Path) -> dict[str, bytes]:
    return contents(merge(replace(config, save=tmp_path / "clean")).output)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Tensors and metadata; the common state and the provenance name the ``--save`` directory."""
    names = ("__0_0.distcp", ".metadata", "metadata.json")
    assert {path.name for path in checkpoint.iterdir()} == {*names, "common.pt", "wsm_merge.json"}
    return {name: (checkpoint / name).read_bytes() for name in names}


def stop_merge(monkeypatch: pytest.MonkeyPatch, config: MergeConfig, chunks: int) -> None:
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
            merge(config)


def stop_after(monkeypatch: pytest.MonkeyPatch, config: MergeConfig, chunks: int) -> Path:
    """:func:`stop_merge` of one product; the directory that it leaves."""
    stop_merge(monkeypatch, config, chunks)
    (left,) = config.save.iterdir()
    assert left.is_dir() and left.name.startswith(".iter_0000008.wsm-")
    return left


def assert_goes_on(config: MergeConfig, expected: dict[str, bytes], whole: bool) -> MergeReport:
    """Merge again: the same bytes, and nothing else left; ``whole`` when it had to start over."""
    total = sum(len(data) for name, data in expected.items() if name.endswith(".distcp"))
    report = merge(config)
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
    clean = contents(merge(replace(config, save=config.save.parent / "clean")).output)
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
    monkeypatch.setattr("wsm_megatron.engine.rank.CheckpointFile.write_bytes", stop)
    with pytest.raises(StoppedError):
        merge(config)
    assert list(config.save.iterdir()) == []


def test_a_merge_that_cannot_succeed_leaves_nothing(config: MergeConfig) -> None:
    def poison(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if key == KEY else tensor

    runs.rewrite(runs.checkpoint(config.load, 6), poison)
    with pytest.raises(MergeError, match="main param"):
        merge(config)
    assert list(config.save.iterdir()) == []


def test_a_part_that_has_changed_is_made_again(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stop_after(monkeypatch, config, 7)
    lines = (left / "__0_0.distcp.journal").read_text().splitlines()
    offset, length, _ = max((line.split() for line in lines), key=lambda words: int(words[1]))
    runs.flip_byte(left / "__0_0.distcp", int(offset) + int(length) // 2)
    assert_goes_on(config, expected, whole=False)


def test_a_journal_cut_short(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = stop_after(monkeypatch, config, 7) / "__0_0.distcp.journal"
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


def test_stopped_while_it_is_published(
    config: MergeConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise STOPPED

    with monkeypatch.context() as patch:
        patch.setattr("wsm_megatron.engine.merge.write_provenance", stop)
        with pytest.raises(StoppedError):
            merge(config)
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
            merge(config)
    with pytest.raises(MergeError, match=r"CRC-32 of .*does not match"):
        merge(config)
    assert list(config.save.iterdir()) == []
