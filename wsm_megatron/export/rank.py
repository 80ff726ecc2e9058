"""One rank's files of an export: read, moved, rounded, written; tile by tile on several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.execution.context import Progress
from wsm_megatron.execution.memory_budget import default_memory
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.export.shard_file import ShardFile
from wsm_megatron.export.shards import Shard
from wsm_megatron.export.table import Piece, Tensor
from wsm_megatron.kernels import weighted_sum
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.buffer import Buffer

TILE_ELEMENTS = 2**20


@dataclass(frozen=True)
class Written:
    """What a rank hands to rank 0.

    Attributes:
        ledger: what it read of records in parts.
    """

    files: Files
    ledger: Ledger
    bytes_read: int


@dataclass(frozen=True)
class _Task:
    """A piece of a tensor, and where its bytes go."""

    file: ShardFile
    offset: int
    piece: Piece
    dtype: torch.dtype
    source: torch.dtype

    @property
    def nbytes(self) -> int:
        """Memory that it takes: what is read, moved and rounded."""
        whole = self.piece.region.numel
        elements = whole if self.piece.order else min(whole, TILE_ELEMENTS)
        return elements * (2 * self.source.itemsize + self.dtype.itemsize)


def run_rank(
    layout: Layout,
    shards: Sequence[Shard],
    directory: Path,
    ranks: Ranks,
    execution: ExecutionOptions,
    progress: Progress,
) -> Written:
    """Write this rank's files; they are on disk when it returns.

    Args:
        layout: of the checkpoint, with at least the tensors that the files are made of.
        directory: not yet published.

    Raises:
        MergeError: a tensor cannot be read, or a file cannot be written.
    """
    reader = CheckpointReader(layout, execution.retries)
    files: list[ShardFile] = []
    stop = threading.Event()
    try:
        for shard in shards:
            files.append(ShardFile(directory / shard.name, shard.size))
        tasks = list(_tasks(layout, shards, files))
        for shard, file in zip(shards, files, strict=True):
            file.write(0, memoryview(shard.header))
        threads = _threads(execution, tasks)
        run_workers(tasks, _Worker(reader, progress, stop), threads, stop, ranks.check)
        return Written(_close(shards, files), reader.ledger, reader.bytes_read)
    except BaseException:
        for file in files:
            file.abandon()
        raise
    finally:
        reader.close()


def _close(shards: Sequence[Shard], files: list[ShardFile]) -> Files:
    closed: Files = {}
    for shard in shards:
        written, crc = files.pop(0).close()  # what fails abandons those that are still open
        assert written == shard.size, f"{written} of {shard.size} bytes of {shard.name}"
        closed[shard.name] = written, crc
    return closed


def _tasks(layout: Layout, shards: Sequence[Shard], files: Sequence[ShardFile]) -> Iterator[_Task]:
    for shard, file in zip(shards, files, strict=True):
        for tensor, offset in zip(shard.tensors, shard.offsets, strict=True):
            yield from _tasks_of(layout, tensor, offset, file)


def _tasks_of(layout: Layout, tensor: Tensor, offset: int, file: ShardFile) -> Iterator[_Task]:
    for piece in tensor.pieces:
        source = layout.tensors[piece.key].dtype
        yield _Task(file, offset, piece, tensor.dtype, source)
        offset += piece.region.numel * tensor.dtype.itemsize


def _threads(execution: ExecutionOptions, tasks: Sequence[_Task]) -> int:
    memory = execution.memory or default_memory()
    largest = max((task.nbytes for task in tasks), default=1)
    return max(1, min(execution.threads or default_threads(), memory // max(largest, 1)))


class _Worker:
    """Does tasks, for any thread."""

    def __init__(self, reader: CheckpointReader, progress: Progress, stop: threading.Event):
        self._reader, self._progress, self._stop = reader, progress, stop

    def __call__(self, task: _Task) -> None:
        piece, offset = task.piece, task.offset
        source = self._reader.region_reader(piece.key, piece.region)
        limit = piece.region.numel if piece.order else TILE_ELEMENTS
        for tile in piece.region.split(max(limit, 1)):
            if self._stop.is_set():
                return
            read = Buffer.empty(tile.numel, task.source)
            source.read(tile, read)
            moved = Buffer(rounded(turned(read.elements, piece), task.dtype))
            task.file.write(offset, moved.data)
            offset += len(moved.data)
            self._progress(len(moved.data))
        source.finish()


def turned(elements: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A whole piece's elements in the order in which they are written."""
    if not piece.order:
        return elements
    return elements.view(piece.view).permute(piece.order).reshape(-1)


def rounded(elements: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Elements of another dtype, rounded once."""
    if elements.dtype is dtype:
        return elements
    out = torch.empty(elements.numel(), dtype=dtype)
    weighted_sum([elements], [[1.0]], [out])
    return out


def check_read(layout: Layout, ledgers: Sequence[Ledger]) -> None:
    """Compare CRC-32 of what the ranks together have read of every record.

    Raises ``MergeError`` for a record that changed.
    """
    reader = CheckpointReader(layout)
    try:
        reader.verify(ledgers)
    finally:
        reader.close()
