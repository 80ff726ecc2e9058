"""What the stages of one rank work with: where they read and write, who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region_reader import RegionReader
from wsm_megatron.execution.observer import Observer
from wsm_megatron.execution.targets import ChunkSink, Target
from wsm_megatron.execution.timing import Phases
from wsm_megatron.planning.tasks import Merge, Stage, Task

Progress = Callable[[int], None]
"""Called from worker threads with the bytes read and written since the last call."""


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

    def pass_over(self, stage: Stage) -> None:
        """A stage of which an earlier merge has written all."""
        self.leave_out(stage.task, stage.scope.sources)
        for k in stage.scope.ending:
            self.targets[k].take_over(stage.task)
        self.progress(stage.nbytes)


def finish(region_readers: Iterable[RegionReader], writers: Iterable[ChunkSink]) -> None:
    """Hand in the checksums of what was read, then complete the chunks that were written."""
    for region_reader in region_readers:
        region_reader.finish()
    for writer in writers:
        writer.finish()
