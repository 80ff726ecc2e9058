"""What the stages of one rank work with: where they read and write, who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.region_reader import RegionReader
from wsm_megatron.checkpoint.writer import CheckpointFile, ChunkWriter, Placed
from wsm_megatron.execution.observer import Observer
from wsm_megatron.execution.timing import Phases
from wsm_megatron.planning.tasks import Merge, Output, Task

Progress = Callable[[int], None]
"""Called from worker threads with the bytes read and written since the last call."""


@dataclass(frozen=True)
class Target:
    """Where one merge's share goes: this rank's file, and the places in it, of objects too."""

    file: CheckpointFile
    places: dict[tuple[str, Region | None], Placed]

    def write_object(self, key: str, data: bytes) -> None:
        self.file.write_bytes(self.places[key, None], data)

    def chunks(self, task: Task) -> list[ChunkWriter]:
        """A writer for every output of a task."""
        return [self.file.chunk(self._place(task, output)) for output in task.recipe.outputs]

    def has(self, task: Task) -> bool:
        """Whether an earlier merge, which died, has written all that a task writes here."""
        return all(self.file.has(self._place(task, output)) for output in task.recipe.outputs)

    def _place(self, task: Task, output: Output) -> Placed:
        return self.places[output.key, task.part(output.key, task.region)]


@dataclass(frozen=True)
class Context:
    """What is the same for all work of a rank. Safe to share between threads.

    Attributes:
        readers: of all sources. merges: what is made of them. targets: where each merge goes.
        progress: is told of what was done. phases: and of the time that it took.
        observer: is shown every tile, where the trajectory is wanted.
    """

    readers: Sequence[CheckpointReader]
    merges: Sequence[Merge]
    targets: Sequence[Target]
    allow_nonfinite: bool
    progress: Progress
    phases: Phases
    observer: Observer | None = None

    def for_workers(self, threads: int) -> Context:
        """The same for worker threads, of whose seconds the mean counts."""
        return replace(self, phases=self.phases.for_workers(threads))

    def region_readers(self, task: Task, j: int, inputs: int) -> list[RegionReader]:
        """What a task reads of source ``j``: a region reader for each of its first ``inputs``."""
        keys = task.recipe.inputs[:inputs]
        return [self.readers[j].region_reader(key, task.part(key, task.region)) for key in keys]

    def leave_out(self, task: Task, sources: Iterable[int]) -> None:
        """Do not read what an earlier merge has read for a finished task."""
        keys = task.recipe.inputs
        for j in sources:
            for key, region_reader in zip(
                keys, self.region_readers(task, j, len(keys)), strict=True
            ):
                region_reader.leave_out(task.part(key, task.region))


def finish(region_readers: Iterable[RegionReader], writers: Iterable[ChunkWriter]) -> None:
    """Hand in the checksums of what was read, then complete the chunks that were written."""
    for region_reader in region_readers:
        region_reader.finish()
    for writer in writers:
        writer.finish()
