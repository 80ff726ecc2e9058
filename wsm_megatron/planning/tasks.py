"""What is done: a recipe for a tensor, the tasks that it is done in, the merges it is done for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.region import Region, span_of
from wsm_megatron.optimizer.flat_buckets import FlatMainParam
from wsm_megatron.optimizer.representation import ROUNDED, Representation

VALUE = torch.float32
"""What main params are summed to, where it is not their own dtype."""


class Rule(Enum):
    """How the tensors of a recipe come about."""

    SUM = "merged"
    SUM_MAIN = "main merged, model rounded from it"
    SUM_MODEL = "merged, main rebuilt from it"
    COPY = "copied from the newest source"


@dataclass(frozen=True)
class Output:
    """A tensor of the merged checkpoint."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """One rule applied to one tensor, or to a main param and its model tensor together.

    ``inputs`` are read from every source, for ``COPY`` from the newest one only. ``outputs`` are
    written in this order; with two of them the first is the main param. With two inputs these are
    the main param and the model tensor that it is checked against; for ``SUM_MODEL``, and for
    ``COPY`` where main params are rebuilt, the model tensor alone is read. ``SUM_MAIN`` may write
    the model tensor alone. ``main`` says how the main param is kept. ``clears``: what would be
    copied is written as zeros.
    """

    rule: Rule
    role: Role
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    input_dtypes: tuple[torch.dtype, ...]
    main: Representation = ROUNDED
    clears: bool = False

    @property
    def key(self) -> str:
        return self.outputs[-1].key

    def copied_from(self, output: Output) -> str:
        """The input that an output of ``COPY`` is taken from, or a main param is rebuilt from."""
        return output.key if output.key in self.inputs else self.inputs[-1]

    @property
    def what(self) -> str:
        """What is done, for messages."""
        return "zeros: the model is the main param" if self.clears else self.rule.value

    @property
    def rebuilds(self) -> bool:
        """What is summed is no input, but made from both."""
        return self.rule is Rule.SUM_MAIN and self.main.rebuilt

    @property
    def splits(self) -> bool:
        """The sum is no output, but is made into these."""
        if self.rule not in (Rule.SUM_MAIN, Rule.SUM_MODEL):
            return False
        return self.main.rebuilt or len(self.outputs) == 1

    @property
    def indivisible(self) -> bool:
        """One rank has to read all inputs of a source."""
        return self.rule is Rule.COPY or (len(self.inputs) > 1 and not self.main.apart)

    def scratch(self, sources: int, merges: int) -> int:
        """Bytes of one element that are neither read nor written, while it is summed."""
        return VALUE.itemsize * (sources * self.rebuilds + merges * self.splits)

    def cost(self, sources: int, merges: int) -> int:
        """Bytes of one element, read from ``sources`` and written for ``merges``."""
        read = sum(dtype.itemsize for dtype in self.input_dtypes)
        return sources * read + merges * sum(output.dtype.itemsize for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Task:
    """One recipe over one region: the unit of work. Its outputs are one chunk each.

    ``flat``: where the main param lies in a flat bucket, whose regions are not the model's.
    """

    recipe: Recipe
    region: Region
    flat: FlatMainParam | None = None

    def __reduce__(self) -> tuple[type[Task], tuple[Recipe, Region, FlatMainParam | None]]:
        return Task, (
            self.recipe,
            self.region,
            self.flat,
        )  # what dataclasses do takes ten times that

    def part(self, key: str, tile: Region) -> Region:
        """Where the elements of ``tile``, a row-major part of ``region``, lie in a tensor."""
        if self.flat is None or key != self.flat.bucket:
            return tile
        first = span_of(tile.within(self.region), self.region.sizes).start
        return self.flat.region(first, tile.numel)

    def split(self, limit: int) -> Iterator[Task]:
        """The same work as tasks of at most ``limit`` elements."""
        for region in self.region.split(limit):
            flat = self.flat
            if flat is not None:
                flat = replace(flat, start=self.part(flat.bucket, region).offsets[-1])
            yield Task(self.recipe, region, flat)


@dataclass(frozen=True)
class Merge:
    """Coefficients of one merged checkpoint, for some of the sources, oldest first."""

    source_indices: tuple[int, ...]
    coefficients: tuple[float, ...]

    @property
    def newest(self) -> int:
        return self.source_indices[-1]


@dataclass(frozen=True)
class Scope:
    """How much of a task one rank does: which sources it reads, which merges it finishes.

    A rank that does a task by itself reads every source and finishes every merge. Where sources lie
    on several nodes, a task is a pipeline: each rank adds its sources to the float64 sums that it
    is sent, and hands them on.

    Attributes:
        sources: that are read, oldest first.
        ending: merges that are finished, and written.
        arriving: merges whose sums over older sources come from another rank.
        leaving: merges whose sums go on to another rank.
        unchecked: sources of which the main param alone is read: another rank reads its model.
    """

    sources: tuple[int, ...]
    ending: tuple[int, ...]
    arriving: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()
    unchecked: tuple[int, ...] = ()

    @property
    def alone(self) -> bool:
        """No other rank takes part."""
        return not (self.arriving or self.leaving or self.unchecked)

    def inputs(self, recipe: Recipe, j: int) -> int:
        """How many of a recipe's inputs are read of source ``j``."""
        return 1 if j in self.unchecked else len(recipe.inputs)

    def bytes_read(self, recipe: Recipe) -> int:
        """Bytes of one element, of all sources."""
        read = (recipe.input_dtypes[: self.inputs(recipe, j)] for j in self.sources)
        return sum(dtype.itemsize for dtypes in read for dtype in dtypes)

    def bytes_written(self, recipe: Recipe) -> int:
        """Bytes of one element, for all merges."""
        return recipe.cost(0, len(self.ending))


@dataclass(frozen=True, eq=False)
class Stage:
    """A task, and how much of it a rank does: what is executed."""

    task: Task
    scope: Scope

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        recipe = self.task.recipe
        return self.task.region.numel * (
            self.scope.bytes_read(recipe) + self.scope.bytes_written(recipe)
        )


def whole_stages(tasks: Iterable[Task], merges: Sequence[Merge]) -> list[Stage]:
    """The stages of a rank that does tasks by itself."""
    ending = tuple(range(len(merges)))
    scopes = {rule: Scope(sources, ending) for rule, sources in sources_read(merges).items()}
    return [Stage(task, scopes[task.recipe.rule]) for task in tasks]


def sources_read(merges: Sequence[Merge]) -> dict[Rule, tuple[int, ...]]:
    """The sources that tasks of each rule read, each once for all merges together."""
    copied = tuple(sorted({merge.newest for merge in merges}))
    summed = tuple(sorted({j for merge in merges for j in merge.source_indices}))
    return {rule: copied if rule is Rule.COPY else summed for rule in Rule}


def bytes_read(tasks: Iterable[Task], merges: Sequence[Merge]) -> list[int]:
    """Bytes that each task reads."""
    read = sources_read(merges)
    return [task.region.numel * task.recipe.cost(len(read[task.recipe.rule]), 0) for task in tasks]


def costs(tasks: Sequence[Task], merges: Sequence[Merge]) -> list[int]:
    """Bytes that each task reads and writes."""
    read = bytes_read(tasks, merges)
    written = [task.region.numel * task.recipe.cost(0, len(merges)) for task in tasks]
    return [r + w for r, w in zip(read, written, strict=True)]
