"""The memory of one worker thread, and what is computed in it, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wsm_megatron.kernels import Finite, bind
from wsm_megatron.planning.tasks import VALUE, Merge, Recipe, Rule, Scope
from wsm_megatron.storage.buffer import Buffer

_TILES = 64
"""Tiles of different recipes and sizes that a thread keeps bound; they share their memory."""

Dtypes = Sequence[Sequence[torch.dtype]]
"""Of buffers in rows, as those of :data:`Tensors`."""
Tensors = list[list[torch.Tensor]]


@dataclass(frozen=True)
class TileResult:
    """What was found while a tile was summed.

    Attributes:
        wrong_main: the first source, by its place in the scope, whose main param, rounded, is not
            its model tensor.
        nonfinite: merge and output, by number, that hold a value which is not finite.
    """

    wrong_main: int | None
    nonfinite: tuple[tuple[int, int], ...]


class Summation:
    """The weighted sums of one tile, bound to tensors of one device.

    Args:
        inputs: ``[source][input]``, of the scope's sources; then the sums that arrived, in one row.
        outputs: ``[merge][output]``, of the merges that end; then the sums that leave, in one row.
            All are of one size.
        scratch: what is summed of each source where that is no input, and the sum of each merge
            where that is no output; two rows.
    """

    def __init__(
        self,
        inputs: Tensors,
        outputs: Tensors,
        scratch: Tensors,
        recipe: Recipe,
        scope: Scope,
        merges: Sequence[Merge],
    ):
        (*self._sources, arrived), (*written, leaving) = inputs, outputs
        self._recipe, self._has_mains = recipe, recipe.rule is Rule.SUM_MAIN
        self._written = dict(zip(scope.ending, written, strict=True))
        values, sums = scratch
        self._values = values or [source[0] for source in self._sources]
        sums = sums or [outputs[0] for outputs in written]
        sums_in = dict(zip(scope.arriving, arrived, strict=True))
        sums_out = self._merged = dict(zip(scope.ending, sums, strict=True))
        sums_out = sums_out | dict(zip(scope.leaving, leaving, strict=True))
        place = {j: i for i, j in enumerate(scope.sources)}
        self._groups = _groups(scope, merges)
        self._sums = []
        for group in self._groups:
            own = [
                (place[j], n) for n, j in enumerate(merges[group[0]].source_indices) if j in place
            ]
            before = [sums_in[k] for k in group if k in sums_in]
            ones = [1.0] * len(before)  # 1.0 times a sum is that sum
            self._sums.append(
                bind(
                    [*before, *(self._values[i] for i, _ in own)],
                    [[*ones, *(merges[k].coefficients[n] for _, n in own)] for k in group],
                    [sums_out[k] for k in group],
                )
            )
        self._wrong: list[tuple[int, Finite]] = []
        self._finite: list[Finite] = []
        self._rounded: list[tuple[int, Finite]] = []

    def start(self) -> None:
        """Compute; on CUDA without waiting, on the current stream."""
        recipe = self._recipe
        if self._has_mains:
            self._wrong = [
                (i, recipe.main.differ(main, model))
                for i, (main, *models) in enumerate(self._sources)
                for model in models
            ]
        if recipe.rebuilds:
            for (main, model), value in zip(self._sources, self._values, strict=True):
                recipe.main.rebuild(main, model, value)
        self._finite = [weighted_sum() for weighted_sum in self._sums]
        self._rounded = [
            (k, recipe.main.write(self._merged[k], main, model))
            for k, outputs in self._written.items()
            for main, model in self._to_write(outputs)
        ]

    def _to_write(
        self, outputs: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
        """Main param and model tensor that are made from a sum; the sum may be the former."""
        if self._recipe.splits:
            return [(None if len(outputs) == 1 else outputs[0], outputs[-1])]
        return [(None, model) for model in outputs[1:]]

    def outcome(self) -> TileResult:
        """What the last :meth:`start` found; waits for it."""
        wrong = [i for i, differs in self._wrong if differs]
        bad = [
            (k, 0)
            for group, finite in zip(self._groups, self._finite, strict=True)
            if not finite
            for k in group
        ]
        last = len(self._recipe.outputs) - 1
        bad += [(k, last) for k, finite in self._rounded if not finite]
        return TileResult(wrong[0] if wrong else None, tuple(bad))


class Tile:
    """Buffers for one tile of a recipe: inputs of a scope's sources, outputs of its merges.

    Attributes:
        sources: ``[source][input]``, to be read into before :meth:`start`.
        arrived: sums that came from another rank; filled before :meth:`start` too.
        outputs: ``[merge][output]``, filled when :meth:`finish` returns.
        leaving: sums that go on to another rank; filled likewise.
    """

    def __init__(self, inputs: Tensors, outputs: Tensors, summation: Summation):
        *self.sources, self.arrived = [[Buffer(one) for one in row] for row in inputs]
        *self.outputs, self.leaving = [[Buffer(one) for one in row] for row in outputs]
        self._summation = summation

    def start(self) -> None:
        """Sum what was read, or begin to."""
        self._summation.start()

    def finish(self) -> TileResult:
        """Wait until the outputs hold the sums."""
        return self._summation.outcome()


class Memory:
    """One thread's memory, carved anew for whatever it works on."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def buffers(self, dtypes: Dtypes, numel: int) -> list[list[Buffer]]:
        """Room for ``numel`` elements each, until something else is asked for."""
        self._grow(room_for(dtypes, numel))
        return [[Buffer(one) for one in row] for row in carve(self._memory, dtypes, numel)]

    def _grow(self, nbytes: int) -> None:
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)


class Workspace(Memory):
    """Memory for tiles, which stay bound to it, one for every kind.

    Args:
        merges: what is made of the sources.
    """

    depth = 1
    """Tiles that may be under way at once: read, started and not finished."""

    def __init__(self, merges: Sequence[Merge]):
        super().__init__()
        self._merges = merges
        self._tiles: dict[tuple[Recipe, Scope, int], Tile] = {}

    def tile(self, recipe: Recipe, scope: Scope, numel: int) -> Tile:
        """Buffers for ``numel`` elements of a recipe, until ``depth`` more tiles are asked for."""
        found = self._tiles.get((recipe, scope, numel))
        if found is None:
            if len(self._tiles) >= _TILES:
                self._tiles.clear()
            found = self._tiles[recipe, scope, numel] = self._make(recipe, scope, numel)
        return found

    def _make(self, recipe: Recipe, scope: Scope, numel: int) -> Tile:
        kinds = tile_dtypes(recipe, scope)
        self._grow(sum(room_for(rows, numel) for rows in kinds))
        sources, merged, scratch = carve_all(self._memory, kinds, numel)
        summation = Summation(sources, merged, scratch, recipe, scope, self._merges)
        return Tile(sources, merged, summation)

    def _grow(self, nbytes: int) -> None:
        if self._memory.numel() < nbytes:
            self._tiles.clear()  # they would keep the old memory
        super()._grow(nbytes)


def carve(memory: torch.Tensor, dtypes: Dtypes, numel: int) -> Tensors:
    """Tensors of ``numel`` elements, end to end in ``memory`` (uint8)."""
    start = 0
    carved: Tensors = []
    for row in dtypes:
        carved.append([])
        for dtype in row:
            carved[-1].append(memory[start : start + numel * dtype.itemsize].view(dtype))
            start += _room(dtype, numel)
    return carved


def carve_all(memory: torch.Tensor, kinds: Sequence[Dtypes], numel: int) -> list[Tensors]:
    """Several of :func:`carve`, end to end."""
    carved, start = [], 0
    for dtypes in kinds:
        carved.append(carve(memory[start:], dtypes, numel))
        start += room_for(dtypes, numel)
    return carved


def room_for(dtypes: Dtypes, numel: int) -> int:
    """Bytes that :func:`carve` needs."""
    return sum(_room(dtype, numel) for row in dtypes for dtype in row)


def _room(dtype: torch.dtype, numel: int) -> int:
    """Bytes between buffers: whole lines; not a multiple of 4096, which shares cache sets."""
    room = -(-numel * dtype.itemsize // 64) * 64
    return room + 320 if room % 4096 == 0 else room


def tile_dtypes(recipe: Recipe, scope: Scope) -> tuple[Dtypes, Dtypes, Dtypes]:
    """Of what a tile reads, of what it makes, and of what is in between, as :class:`Summation`
    takes them."""
    read = [recipe.input_dtypes[: scope.inputs(recipe, j)] for j in scope.sources]
    written = [[output.dtype for output in recipe.outputs]] * len(scope.ending)
    between = [
        [VALUE] * len(scope.sources) if recipe.rebuilds else [],
        [VALUE] * len(scope.ending) if recipe.splits else [],
    ]
    sums = torch.float64
    return (
        [*read, [sums] * len(scope.arriving)],
        [*written, [sums] * len(scope.leaving)],
        between,
    )


def _groups(scope: Scope, merges: Sequence[Merge]) -> list[list[int]]:
    """Merges that are summed from the same tensors, in one pass."""
    groups: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
    for k in sorted({*scope.arriving, *scope.leaving, *scope.ending}):
        own = tuple(j for j in merges[k].source_indices if j in scope.sources)
        groups.setdefault((own, k if k in scope.arriving else None), []).append(k)
    return list(groups.values())
