"""The memory of one worker thread, and what is computed in it, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wsm_megatron.checkpoint.buffer import Buffer
from wsm_megatron.engine.plan import Recipe, Rule
from wsm_megatron.kernels import bind

_TILES = 64
"""Tiles of different recipes and sizes that a thread keeps bound; they share their memory."""


@dataclass(frozen=True)
class Merge:
    """Coefficients of one merged checkpoint, for some of the sources, oldest first."""

    members: tuple[int, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What was found while a tile was summed.

    Attributes:
        wrong_main: the first source whose main param, rounded, is not its model tensor.
        nonfinite: merges that hold a value which is not finite.
    """

    wrong_main: int | None
    nonfinite: tuple[int, ...]


class Tile:
    """Buffers for one tile of a recipe: inputs of every source, outputs of every merge.

    Attributes:
        sources: ``[source][input]``, to be read into.
        outputs: ``[merge][output]``, filled by :meth:`sum`.
    """

    def __init__(
        self,
        sources: list[list[Buffer]],
        outputs: list[list[Buffer]],
        recipe: Recipe,
        merges: Sequence[Merge],
    ):
        self.sources, self.outputs = sources, outputs
        self._sum = Summation(
            [[buffer.elements for buffer in inputs] for inputs in sources],
            [[buffer.elements for buffer in merged] for merged in outputs],
            recipe,
            merges,
        )

    def sum(self) -> Outcome:
        return self._sum()


class Summation:
    """The weighted sums of one tile, bound to tensors of one device.

    Args:
        inputs: ``[source][input]``. outputs: ``[merge][output]``; all of one size.
    """

    def __init__(
        self,
        inputs: list[list[torch.Tensor]],
        outputs: list[list[torch.Tensor]],
        recipe: Recipe,
        merges: Sequence[Merge],
    ):
        self._inputs, self._outputs = inputs, outputs
        self._has_mains = recipe.rule is Rule.SUM_MAIN
        self._groups = _same_members(merges)
        self._sums = [
            bind(
                [inputs[j][0] for j in merges[group[0]].members],
                [merges[k].coefficients for k in group],
                [outputs[k][0] for k in group],
            )
            for group in self._groups
        ]

    def __call__(self) -> Outcome:
        wrong = self._wrong_main() if self._has_mains else None
        finite = [weighted_sum() for weighted_sum in self._sums]
        for main, *models in self._outputs:
            for model in models:  # the main param rounded, as Megatron copies mains to weights
                model.copy_(main)
        bad = [
            k for group, good in zip(self._groups, finite, strict=True) if not good for k in group
        ]
        return Outcome(wrong, tuple(bad))

    def _wrong_main(self) -> int | None:
        for j, (main, model) in enumerate(self._inputs):
            if not _same_bits(main.to(model.dtype), model):
                return j
        return None


class Workspace:
    """One thread's buffers, kept from tile to tile.

    Args:
        sources: how many there are. merges: what is made of them.
    """

    def __init__(self, sources: int, merges: Sequence[Merge]):
        self._sources, self._merges = sources, merges
        self._memory: dict[tuple[object, torch.dtype], torch.Tensor] = {}
        self._tiles: dict[tuple[Recipe, int], Tile] = {}

    def tile(self, recipe: Recipe, numel: int) -> Tile:
        """Buffers for ``numel`` elements of a recipe; valid until another tile is asked for."""
        found = self._tiles.get((recipe, numel))
        if found is None:
            if len(self._tiles) >= _TILES:
                self._tiles.clear()
            found = self._tiles[recipe, numel] = self._make(recipe, numel)
        return found

    def buffer(self, dtype: torch.dtype, numel: int) -> Buffer:
        """Room for elements that are copied."""
        return Buffer(self._take("copy", dtype, numel))

    def _make(self, recipe: Recipe, numel: int) -> Tile:
        sources = [
            [
                Buffer(self._take(("source", j, i), dtype, numel))
                for i, dtype in enumerate(recipe.input_dtypes)
            ]
            for j in range(self._sources)
        ]
        outputs = [
            [
                Buffer(self._take(("output", k, o), output.dtype, numel))
                for o, output in enumerate(recipe.outputs)
            ]
            for k in range(len(self._merges))
        ]
        return Tile(sources, outputs, recipe, self._merges)

    def _take(self, slot: object, dtype: torch.dtype, numel: int) -> torch.Tensor:
        memory = self._memory.get((slot, dtype))
        if memory is None or memory.numel() < numel:
            self._tiles.clear()  # those bound to the old memory would keep it
            memory = self._memory[slot, dtype] = torch.empty(numel, dtype=dtype)
        return memory[:numel]


def _same_members(merges: Sequence[Merge]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for k, merge in enumerate(merges):
        groups.setdefault(merge.members, []).append(k)
    return list(groups.values())


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
