"""A merge job: everything decided before the first tensor byte is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.formats import CheckpointFormat, KeyPath, StoredCommon
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.checkpoint.side_files import Files, SideFiles, copy_side_files
from wsm_megatron.checkpoint.writer import Item, Placed, place
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.planning.plan import MergePlan
from wsm_megatron.planning.sources import Source
from wsm_megatron.planning.tasks import Merge, Task, bytes_read, costs
from wsm_megatron.schedule.coefficients import MergeCoefficients


@dataclass(frozen=True)
class OutputCheckpoint:
    """One merged checkpoint of a job.

    Attributes:
        source_indices: its sources, as indices into the job's, oldest first.
        objects: byte entries taken over from its newest source.
        common: its common state, ready to be written.
        format: what it is written as.
    """

    root: Path
    iteration: int
    source_indices: tuple[int, ...]
    decay: MergeCoefficients
    objects: tuple[str, ...]
    common: StoredCommon
    format: CheckpointFormat
    provenance: dict[str, Any]

    @property
    def path(self) -> Path:
        return checkpoint_path(self.root, self.iteration)

    @property
    def newest(self) -> int:
        return self.source_indices[-1]

    @property
    def merge(self) -> Merge:
        return Merge(self.source_indices, self.decay.coefficients)


@dataclass(frozen=True)
class RankPlan:
    """What one rank does.

    Attributes:
        tasks: those that it does by itself.
        written: for every output, the tasks whose chunks it stores, in the order of its file.
        objects: for every output, the byte entries that it copies.
        side_files: outputs, by number, whose side files it copies.
        nbytes: bytes that it reads and writes, by itself and with others.
    """

    tasks: Sequence[Task]
    written: Sequence[Sequence[Task]]
    objects: Sequence[Sequence[str]]
    side_files: Sequence[int]
    nbytes: int


@dataclass(frozen=True)
class Job:
    """Sources, what is made of them, and the plan that all outputs share.

    Attributes:
        scattered_for: what the ranks' shares were cut for, where some of its outputs are left out:
            those that remain keep their places in the ranks' files.
    """

    config: MergeConfig
    sources: tuple[Source, ...]
    outputs: tuple[OutputCheckpoint, ...]
    plan: MergePlan
    scattered_for: tuple[Merge, ...] = ()
    execution: ExecutionOptions = ExecutionOptions()

    def iterations(self, output: OutputCheckpoint) -> tuple[int, ...]:
        return tuple(self.sources[j].iteration for j in output.source_indices)

    def newest(self, output: OutputCheckpoint) -> Layout:
        return self.sources[output.newest].layout

    @property
    def merges(self) -> list[Merge]:
        return [output.merge for output in self.outputs]

    def only(self, outputs: Sequence[int]) -> Job:
        """The same job for some of its outputs, and the sources that these are of."""
        kept, used = [self.outputs[k] for k in outputs], self.used_by(outputs)
        place = {j: n for n, j in enumerate(used)}
        return replace(
            self,
            sources=tuple(self.sources[j] for j in used),
            outputs=tuple(
                replace(p, source_indices=tuple(place[j] for j in p.source_indices)) for p in kept
            ),
            scattered_for=self.scattered_for or tuple(self.merges),
        )

    def of_weights(self, keys: Collection[str]) -> Job:
        """The same merges of some model tensors: nothing else is read, and nothing copied."""
        nothing = StoredCommon(None)
        return replace(
            self,
            sources=tuple(replace(source, beside=SideFiles()) for source in self.sources),
            outputs=tuple(replace(one, objects=(), common=nothing) for one in self.outputs),
            plan=self.plan.of_weights(keys),
        )

    def used_by(self, outputs: Sequence[int]) -> list[int]:
        """The sources that some of its outputs are of."""
        return sorted({j for k in outputs for j in self.outputs[k].source_indices})

    def rank_plans(self, ranks: int) -> tuple[RankPlan, ...]:
        """What every rank does where all see all files: rank 0 also what is no tensor."""
        shares = self.plan.shares(ranks, self.scattered_for or self.merges)
        every = [output.objects for output in self.outputs]
        none: list[tuple[str, ...]] = [() for _ in every]
        return tuple(
            self.rank_plan(
                rank,
                share,
                [share] * len(every),
                none if rank else every,
                () if rank else range(len(every)),
            )
            for rank, share in enumerate(shares)
        )

    def rank_plan(
        self,
        rank: int,
        tasks: Sequence[Task],
        written: Sequence[Sequence[Task]],
        objects: Sequence[Sequence[str]],
        side_files: Sequence[int],
        more: int = 0,
    ) -> RankPlan:
        """A rank's plan. ``more``: bytes that it reads and writes with other ranks."""
        nbytes = sum(costs(tasks, self.merges)) + self._objects_read(objects)
        nbytes += self._objects_written(objects, rank == 0) + more
        return RankPlan(tasks, written, objects, side_files, nbytes)

    def bytes_to_read(self) -> int:
        """Bytes of tensors and objects, over all ranks."""
        objects = [output.objects for output in self.outputs]
        return sum(bytes_read(self.plan.tasks, self.merges)) + self._objects_read(objects)

    def bytes_to_write(self) -> int:
        """Bytes of all outputs' tensors, objects and side files."""
        objects = [output.objects for output in self.outputs]
        tensors = self.plan.bytes_to_write() * len(self.outputs)
        beside = sum(self.sources[output.newest].beside.nbytes for output in self.outputs)
        return tensors + self._objects_written(objects, True) + beside

    def stored_bytes(self) -> list[int]:
        """Bytes that each output takes up: containers, objects, common state, side files."""
        tensors = sum(item.stored_bytes for item in chunks_of(self.plan.tasks))
        return [tensors + self._beside_tensors(output) for output in self.outputs]

    def _beside_tensors(self, output: OutputCheckpoint) -> int:
        objects = sum(item.nbytes for item in self._objects(output, output.objects, True))
        return objects + output.common.nbytes_beside + self.sources[output.newest].beside.nbytes

    def copy_beside(self, output: OutputCheckpoint, directory: Path) -> Files:
        """Copy what lies beside the newest source's tensors; size and CRC-32 of the copies."""
        source, kept = self.sources[output.newest], self.config.keeps_optimizer
        return copy_side_files(source.path, source.beside, directory, output.iteration, kept)

    def placed(self, k: int, rank: int, rank_plan: RankPlan) -> list[Placed]:
        """Everything that one rank stores for output ``k``, in the order of its file."""
        items = self._objects(self.outputs[k], rank_plan.objects[k], rank == 0)
        return place([*items, *chunks_of(rank_plan.written[k])], rank)

    def consumers(self, objects: Sequence[Sequence[str]]) -> dict[tuple[int, str], list[int]]:
        """Of byte entries that outputs copy: which outputs take each, by source and key."""
        consumers: dict[tuple[int, str], list[int]] = {}
        for k, keys in enumerate(objects):
            for key in keys:
                consumers.setdefault((self.outputs[k].newest, key), []).append(k)
        return consumers

    def on_disk(
        self, output: OutputCheckpoint, placed: Sequence[Placed]
    ) -> tuple[list[Placed], dict[str, KeyPath]]:
        """What is placed, under the keys of the newest source and in its order, and where in
        Megatron's nested state dict that is, where the format says so."""
        newest = self.newest(output)
        if not (newest.paths or newest.stored):
            return list(placed), {}
        order = {newest.stored_key(key): n for n, key in enumerate(newest.entries)}
        named = [
            replace(one, item=replace(one.item, key=newest.stored_key(one.item.key)))
            for one in placed
        ]
        named.sort(key=lambda one: order.get(one.item.key, len(order)))
        known = {**newest.paths, **output.common.paths}
        keys = dict.fromkeys(one.item.key for one in named)
        return named, {key: known[key] for key in keys if key in known}

    def marker(self, output: OutputCheckpoint) -> dict[str, Any] | None:
        """What goes into ``metadata.json``; None where its format has none."""
        return output.format.marker(self.newest(output).marker)

    def _objects(
        self, output: OutputCheckpoint, keys: Sequence[str], with_common: bool
    ) -> list[Item]:
        layout = self.newest(output)
        items = [Item(key, nbytes=layout.objects[key].nbytes) for key in keys]
        common = output.common.entries if with_common else {}
        return [*items, *(Item(key, nbytes=len(data)) for key, data in common.items())]

    def _objects_read(self, objects: Sequence[Sequence[str]]) -> int:
        return sum(self.sources[j].layout.objects[key].nbytes for j, key in self.consumers(objects))

    def _objects_written(self, objects: Sequence[Sequence[str]], with_common: bool) -> int:
        return sum(
            item.nbytes
            for output, keys in zip(self.outputs, objects, strict=True)
            for item in self._objects(output, keys, with_common)
        )


def chunks_of(tasks: Sequence[Task]) -> list[Item]:
    """What tasks write, in order."""
    return [
        Item(output.key, task.part(output.key, task.region), output.dtype, output.shape)
        for task in tasks
        for output in task.recipe.outputs
    ]


def places(placed: Sequence[Placed]) -> dict[tuple[str, Region | None], Placed]:
    """By key and region, which objects have none of."""
    return {(one.item.key, one.item.region): one for one in placed}
