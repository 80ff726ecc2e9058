"""The memory of one worker thread, and what is computed in it, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wsm_megatron.kernels import Finite, bind
from wsm_megatron.planning.tasks import Merge, Recipe, Rule, Scope
from wsm_megatron.storage.buffer import Buffer

_TILES = 64
"""Tiles of different recipes and sizes that a thread keeps bound; they share their memory."""

Dtypes = Sequence[Sequence[torch.dtype]]
"""Of buffers in rows, as those of :data:`Tensors`."""
Tensors = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Outcome:
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
    """

    def __init__(
        self,
        inputs: Tensors,
        outputs: Tensors,
        recipe: Recipe,
        scope: Scope,
        merges: Sequence[Merge],
    ):
        (*self._sources, arrived), (*written, leaving) = inputs, outputs
        self._has_mains = recipe.rule is Rule.SUM_MAIN
        self._written = dict(zip(scope.ending, written, strict=True))
        sums_in = dict(zip(scope.arriving, arrived, strict=True))
        sums_out = {k: outputs[0] for k, outputs in self._written.items()}
        sums_out |= zip(scope.leaving, leaving, strict=True)
        place = {j: i for i, j in enumerate(scope.sources)}
        self._groups = _groups(scope, merges)
        self._sums = []
        for group in self._groups:
            own = [(place[j], n) for n, j in enumerate(merges[group[0]].members) if j in place]
            before = [sums_in[k] for k in group if k in sums_in]
            ones = [1.0] * len(before)  # 1.0 times a sum is that sum
            self._sums.append(
                bind(
                    [*before, *(self._sources[i][0] for i, _ in own)],
                    [[*ones, *(merges[k].coefficients[n] for _, n in own)] for k in group],
                    [sums_out[k] for k in group],
                )
            )
        self._wrong: list[tuple[int, Finite]] = []
        self._finite: list[Finite] = []
        self._rounded: list[tuple[int, Finite]] = []

    def start(self) -> None:
        """Compute; on CUDA without waiting, on the current stream."""
        if self._has_mains:
            self._wrong = [
                (i, differ(main.to(model.dtype), model))
                for i, (main, *models) in enumerate(self._sources)
                for model in models
            ]
        self._finite = [weighted_sum() for weighted_sum in self._sums]
        self._rounded = [
            (k, round_main(main, model))
            for k, (main, *models) in self._written.items()
            for model in models
        ]

    def outcome(self) -> Outcome:
        """What the last :meth:`start` found; waits for it."""
        wrong = [i for i, differs in self._wrong if differs]
        bad = [
            (k, 0)
            for group, finite in zip(self._groups, self._finite, strict=True)
            if not finite
            for k in group
        ]
        bad += [(k, 1) for k, finite in self._rounded if not finite]
        return Outcome(wrong[0] if wrong else None, tuple(bad))


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

    def finish(self) -> Outcome:
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
        inputs, outputs = tile_dtypes(recipe, scope)
        self._grow(room_for(inputs, numel) + room_for(outputs, numel))
        sources = carve(self._memory, inputs, numel)
        merged = carve(self._memory[room_for(inputs, numel) :], outputs, numel)
        return Tile(sources, merged, Summation(sources, merged, recipe, scope, self._merges))

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


def room_for(dtypes: Dtypes, numel: int) -> int:
    """Bytes that :func:`carve` needs."""
    return sum(_room(dtype, numel) for row in dtypes for dtype in row)


def _room(dtype: torch.dtype, numel: int) -> int:
    """Bytes between buffers: whole lines; not a multiple of 4096, which shares cache sets."""
    room = -(-numel * dtype.itemsize // 64) * 64
    return room + 320 if room % 4096 == 0 else room


def tile_dtypes(recipe: Recipe, scope: Scope) -> tuple[Dtypes, Dtypes]:
    """Of what a tile reads and of what it makes, as :class:`Summation` takes them."""
    read = [recipe.input_dtypes[: scope.inputs(recipe, j)] for j in scope.sources]
    written = [[output.dtype for output in recipe.outputs]] * len(scope.ending)
    sums = torch.float64
    return [*read, [sums] * len(scope.arriving)], [*written, [sums] * len(scope.leaving)]


def _groups(scope: Scope, merges: Sequence[Merge]) -> list[list[int]]:
    """Merges that are summed from the same tensors, in one pass."""
    groups: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
    for k in sorted({*scope.arriving, *scope.leaving, *scope.ending}):
        own = tuple(j for j in merges[k].members if j in scope.sources)
        groups.setdefault((own, k if k in scope.arriving else None), []).append(k)
    return list(groups.values())


def round_main(main: torch.Tensor, model: torch.Tensor) -> Finite:
    """Round a merged main param to its model tensor, as Megatron copies mains to weights.

    Returns:
        whether no finite value became an infinite one; on a CPU at once, on CUDA as a tensor.
    """
    model.copy_(main)
    if model.numel() == 0 or torch.finfo(model.dtype).max >= torch.finfo(main.dtype).max:
        return True
    if model.device.type != "cpu":
        return torch.isfinite(model).all()
    ends = torch.aminmax(model)  # NaN where there is one; much faster than isfinite on a CPU
    return all(math.isfinite(end) for end in ends)


def differ(left: torch.Tensor, right: torch.Tensor) -> Finite:
    """Whether any bit differs; on a CPU at once, on CUDA as a tensor."""
    left, right = left.view(torch.uint8), right.view(torch.uint8)
    return not torch.equal(left, right) if left.device.type == "cpu" else (left != right).any()
