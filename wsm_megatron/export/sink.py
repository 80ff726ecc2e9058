"""Exports that are written as merges are made: each rank puts its chunks where they belong.

Ranks share the files of an export. What one has of a tensor depends on the sources' layout and on
how tasks were dealt out; where it goes, and hence every byte, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.writer import Placed
from wsm_megatron.execution.targets import (
    CheckpointDirectory,
    CheckpointTarget,
    ChunkSink,
    Closed,
)
from wsm_megatron.export.rank import TILE_ELEMENTS, rounded
from wsm_megatron.export.shard_file import ShardFile
from wsm_megatron.export.spread import Place, Spread, runs_of
from wsm_megatron.planning.tasks import Task
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.visibility import wait_for_files


@dataclass(frozen=True)
class ExportDirectory:
    """An export alone.

    Attributes:
        sizes: of its files, which rank 0 has made. spreads: where a rank's tensors go, by key.
    """

    directory: Path
    sizes: Mapping[str, int]
    spreads: Mapping[str, Spread]
    takes_side_files: bool = False

    @property
    def files(self) -> int:
        return len(self._named)

    @cached_property
    def _named(self) -> dict[str, int]:
        """Those that the rank writes to."""
        names = set[str]().union(*(spread.files for spread in self.spreads.values()))
        return {name: self.sizes[name] for name in sorted(names)}

    def open(self, rank: int, placed: Sequence[Placed], check: Callable[[], None]) -> ExportTarget:
        wait_for_files(self.directory, self._named, check)
        return ExportTarget(self.directory, self._named, self.spreads)


class ExportTarget:
    """A rank's part of an export. What was written by a job that died is made anew."""

    def __init__(self, directory: Path, sizes: Mapping[str, int], spreads: Mapping[str, Spread]):
        self._files: dict[str, ShardFile] = {}
        self._open: list[ShardFile] = []
        self._spreads = spreads
        try:
            for name, size in sizes.items():
                self._files[name] = ShardFile(directory / name, size, made=True)
                self._open.append(self._files[name])
        except BaseException:
            self.abandon()
            raise

    @property
    def bytes_written(self) -> int:
        return sum(file.bytes_written for file in self._files.values())

    def write_object(self, key: str, data: bytes) -> None:
        pass

    def chunks(self, task: Task) -> list[ChunkSink]:
        return [self.chunk(output.key) for output in task.recipe.outputs]

    def chunk(self, key: str) -> ChunkSink:
        """A sink for parts of one tensor."""
        spread = self._spreads.get(key)
        return NOWHERE if spread is None else _Chunk(spread, self._files)

    def takes(self, key: str) -> bool:
        return key in self._spreads

    def has(self, task: Task) -> bool:
        return False

    def take_over(self, task: Task) -> None:
        raise AssertionError("it has nothing of an earlier job")

    def close(self) -> Closed:
        shared: Files = {}
        while self._open:
            file = self._open.pop()
            shared[file.path.name] = file.close()
        return Closed({}, shared)

    def abandon(self) -> None:
        while self._open:
            self._open.pop().abandon()


class _Chunk:
    def __init__(self, spread: Spread, files: Mapping[str, ShardFile]):
        self._spread, self._files = spread, files

    def append(self, elements: Buffer, region: Region) -> None:
        for place, common in self._spread.overlapping(region):
            part = _part(elements.elements, region, common)
            self._write(place, common, Buffer(rounded(part, place.dtype)).data)

    def _write(self, place: Place, common: Region, data: memoryview) -> None:
        whole = place.piece.region
        starts, _ = runs_of(common.within(whole), whole.sizes)
        offsets = [place.offset + start * place.dtype.itemsize for start in starts]
        self._files[place.file].write_runs(offsets, data, counts=not place.piece.order)

    def finish(self) -> None:
        pass


class _Nowhere:
    """Takes what is not exported."""

    def append(self, elements: Buffer, region: Region) -> None:
        pass

    def finish(self) -> None:
        pass


NOWHERE = _Nowhere()


def _part(elements: torch.Tensor, region: Region, common: Region) -> torch.Tensor:
    """The elements of a region that are in another too, in row-major order."""
    part = elements.view(region.sizes)
    inner = common.within(region)
    for axis, (offset, size) in enumerate(zip(inner.offsets, inner.sizes, strict=True)):
        part = part.narrow(axis, offset, size)
    return part.reshape(-1)


@dataclass(frozen=True)
class WithExport:
    """A merged checkpoint, and an export of it in the same pass."""

    checkpoint: CheckpointDirectory
    export: ExportDirectory
    takes_side_files: bool = True

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def files(self) -> int:
        return self.checkpoint.files + self.export.files

    def open(
        self, rank: int, placed: Sequence[Placed], check: Callable[[], None]
    ) -> TargetWithExport:
        checkpoint = self.checkpoint.open(rank, placed, check)
        try:
            return TargetWithExport(checkpoint, self.export.open(rank, placed, check))
        except BaseException:
            checkpoint.abandon()
            raise


@dataclass(frozen=True)
class TargetWithExport:
    """Both: a job that died goes on from what is in the checkpoint."""

    checkpoint: CheckpointTarget
    export: ExportTarget

    @property
    def bytes_written(self) -> int:
        return self.checkpoint.bytes_written + self.export.bytes_written

    def write_object(self, key: str, data: bytes) -> None:
        self.checkpoint.write_object(key, data)

    def chunks(self, task: Task) -> list[ChunkSink]:
        both = zip(self.checkpoint.chunks(task), self.export.chunks(task), strict=True)
        return [own if export is NOWHERE else _Both(own, export) for own, export in both]

    def has(self, task: Task) -> bool:
        return self.checkpoint.has(task)

    def take_over(self, task: Task) -> None:
        """Export what an earlier job has merged, from where that has written it."""
        for output in task.recipe.outputs:
            if not self.export.takes(output.key):
                continue
            chunk, done = self.export.chunk(output.key), 0
            for region in task.region.split(TILE_ELEMENTS):
                read = Buffer.empty(region.numel, output.dtype)
                self.checkpoint.file.read(self.checkpoint.place(task, output), done, read)
                chunk.append(read, region)
                done += region.numel

    def close(self) -> Closed:
        return Closed(self.checkpoint.close().files, self.export.close().shared)

    def abandon(self) -> None:
        self.checkpoint.abandon()
        self.export.abandon()


@dataclass(frozen=True)
class _Both:
    own: ChunkSink
    export: ChunkSink

    def append(self, elements: Buffer, region: Region) -> None:
        self.own.append(elements, region)
        self.export.append(elements, region)

    def finish(self) -> None:
        self.own.finish()
        self.export.finish()
