"""Inner products of the sources, from the tiles that a merge sums: no byte is read again."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable

import torch

from wsm_megatron.checkpoint.keys import Role, model_of
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.execution.tiles import Tile
from wsm_megatron.execution.value_checks import writes_padding
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.tasks import VALUE, Recipe, Rule, Stage, Task
from wsm_megatron.schedule.window import Checkpoint, positions
from wsm_megatron.trajectory.gram import Gram, GramSums, Group, added
from wsm_megatron.trajectory.record import PathPoint, Trajectory

_NUMBERED = re.compile(r"(.*?\blayers\.\d+)\.")
_STACKED = re.compile(r"(.*?\blayers)\.")


class Observer:
    """Takes in what is summed of every source. Safe to share between threads.

    Args:
        sources: of the job; every tile must have all of them.
    """

    def __init__(self, sources: int):
        self._sources = sources
        self._local = threading.local()
        self._threads: list[GramSums] = []

    def take(self, stage: Stage, tile: Tile, region: Region) -> None:
        """A tile that was read and not read over yet."""
        task, recipe = stage.task, stage.task.recipe
        assert len(tile.sources) == self._sources
        if not is_observed(task):
            return
        values = [source[0].elements for source in tile.sources]
        if recipe.rebuilds:
            values = [torch.empty(region.numel, dtype=VALUE) for _ in tile.sources]
            for (main, model), value in zip(tile.sources, values, strict=True):
                recipe.main.rebuild(main.elements, model.elements, value)
        self._sums().add((_role(recipe), part_of(recipe.key, region)), values)

    def sums(self) -> dict[Group, Gram]:
        """What all threads have taken in."""
        return added(one.sums() for one in self._threads)

    def _sums(self) -> GramSums:
        if not hasattr(self._local, "sums"):
            self._local.sums = GramSums(self._sources)
            self._threads.append(self._local.sums)
        return self._local.sums


def trajectory_of(job: Job, of_ranks: Iterable[dict[Group, Gram]]) -> Trajectory | None:
    """What all ranks have observed of a job's sources; None where nothing was read."""
    grams = added(of_ranks)
    if not grams:
        return None
    known: dict[int, Checkpoint] = {}
    for output in job.outputs:
        known.update(zip(output.source_indices, output.decay.checkpoints, strict=True))
    checkpoints = [known[j] for j in range(len(job.sources))]
    where, unit = positions(checkpoints)
    points = tuple(
        PathPoint(str(source.path), source.iteration, checkpoint.lr)
        for source, checkpoint in zip(job.sources, checkpoints, strict=True)
    )
    seen = sum(gram.elements for gram in grams.values())
    summed = sum(task.region.numel for task in job.plan.tasks if is_observed(task))
    return Trajectory(points, where, unit, grams, summed - seen)


def is_observed(task: Task) -> bool:
    """Whether the sources' inner products are taken of it: it is summed, and no padding."""
    return task.recipe.rule is not Rule.COPY and not writes_padding(task, task.recipe.inputs[0])


def _role(recipe: Recipe) -> str:
    return Role.MAIN.value if recipe.rule is Rule.SUM_MAIN else recipe.role.value


def part_of(key: str, region: Region) -> str:
    """The layer, or other part of the model, that a region of a tensor belongs to.

    Megatron stacks layers that are alike along a first axis: there the region says which.
    """
    name = model_of(key) or key
    if numbered := _NUMBERED.match(name):
        return numbered[1]
    if (stacked := _STACKED.match(name)) and region.offsets:
        first, count = region.offsets[0], region.sizes[0]
        return f"{stacked[1]}.{first}" + (f"-{first + count - 1}" if count > 1 else "")
    return ".".join(name.split(".")[:2])
