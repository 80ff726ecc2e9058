"""What is done: a recipe for a tensor, and the tasks that it is done in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from wsm_megatron.checkpoint.box import Box, span_of
from wsm_megatron.checkpoint.roles import Role
from wsm_megatron.engine.flat import FlatMain


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

    ``inputs`` are read from every source (from the newest one only for ``COPY``, whose one input
    has the output's key): for ``SUM_MAIN`` the main param, then the model tensor that it is checked
    against. ``outputs`` are written in this order; with two of them the first is the main param.
    """

    rule: Rule
    role: Role
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    input_dtypes: tuple[torch.dtype, ...]

    @property
    def key(self) -> str:
        return self.outputs[-1].key

    def cost(self, sources: int, merges: int) -> int:
        """Bytes read and written for one element."""
        reads = sum(d.itemsize for d in self.input_dtypes) * (
            merges if self.rule is Rule.COPY else sources
        )
        return reads + merges * sum(output.dtype.itemsize for output in self.outputs)


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
