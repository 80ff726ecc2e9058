"""What is done: a recipe for a tensor, the tasks that it is done in, the merges it is done for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.region import Box, span_of
from wsm_megatron.optimizer.flat_buckets import FlatMain


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
    ``COPY`` where main params are rebuilt, the model tensor alone is read.
    """

    rule: Rule
    role: Role
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    input_dtypes: tuple[torch.dtype, ...]

    @property
    def key(self) -> str:
        return self.outputs[-1].key

    def copied_from(self, output: Output) -> str:
        """The input that an output of ``COPY`` is taken from, or a main param is rebuilt from."""
        return output.key if output.key in self.inputs else self.inputs[-1]

    def cost(self, sources: int, merges: int) -> int:
        """Bytes of one element, read from ``sources`` and written for ``merges``."""
        read = sum(dtype.itemsize for dtype in self.input_dtypes)
        return sources * read + merges * sum(output.dtype.itemsize for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Task:
    """One recipe over one box: the unit of work. Its outputs are one chunk each.

    ``flat``: where the main param lies in a flat bucket, whose boxes are not the model's.
    """

    recipe: Recipe
    box: Box
    flat: FlatMain | None = None

    def __reduce__(self) -> tuple[type[Task], tuple[Recipe, Box, FlatMain | None]]:
        return Task, (self.recipe, self.box, self.flat)  # what dataclasses do takes ten times that

    def part(self, key: str, tile: Box) -> Box:
        """Where the elements of ``tile``, a row-major part of ``box``, lie in a tensor."""
        if self.flat is None or key != self.flat.bucket:
            return tile
        first = span_of(tile.within(self.box), self.box.sizes).start
        return Box((self.flat.start + first,), (tile.numel,))

    def split(self, limit: int) -> Iterator[Task]:
        """The same work as tasks of at most ``limit`` elements."""
        for box in self.box.split(limit):
            flat = self.flat
            if flat is not None:
                flat = FlatMain(flat.bucket, self.part(flat.bucket, box).offsets[0])
            yield Task(self.recipe, box, flat)


@dataclass(frozen=True)
class Merge:
    """Coefficients of one merged checkpoint, for some of the sources, oldest first."""

    members: tuple[int, ...]
    coefficients: tuple[float, ...]

    @property
    def newest(self) -> int:
        return self.members[-1]


def sources_read(merges: Sequence[Merge]) -> dict[Rule, tuple[int, ...]]:
    """The sources that tasks of each rule read, each once for all merges together."""
    copied = tuple(sorted({merge.newest for merge in merges}))
    summed = tuple(sorted({j for merge in merges for j in merge.members}))
    return {rule: copied if rule is Rule.COPY else summed for rule in Rule}


def bytes_read(tasks: Iterable[Task], merges: Sequence[Merge]) -> list[int]:
    """Bytes that each task reads."""
    read = sources_read(merges)
    return [task.box.numel * task.recipe.cost(len(read[task.recipe.rule]), 0) for task in tasks]


def costs(tasks: Sequence[Task], merges: Sequence[Merge]) -> list[int]:
    """Bytes that each task reads and writes."""
    read = bytes_read(tasks, merges)
    written = [task.box.numel * task.recipe.cost(0, len(merges)) for task in tasks]
    return [r + w for r, w in zip(read, written, strict=True)]
