"""Summing on a GPU: tiles go there and back through pinned memory, on a stream of each thread.

A thread reads its next tile while its last one is copied in, summed and copied out; the streams of
several threads keep both copy engines and the kernel busy at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wsm_megatron.execution.tiles import (
    Summation,
    Tensors,
    Tile,
    TileResult,
    Workspace,
    carve_all,
    room_for,
    tile_dtypes,
)
from wsm_megatron.planning.tasks import Merge, Recipe, Scope

Move = tuple[torch.Tensor, torch.Tensor]


class StagedTile(Tile):
    """A tile whose sums are made on a device.

    Args:
        host: inputs and outputs in pinned memory.
        moves: from host to device before the sum, from device to host after it: (to, from), bytes.
    """

    def __init__(
        self,
        host: tuple[Tensors, Tensors],
        summation: Summation,
        moves: tuple[Move, Move],
        stream: torch.cuda.Stream | None,
    ):
        super().__init__(*host, summation)
        self._moves, self._stream = moves, stream
        self._done = None if stream is None else torch.cuda.Event()

    def start(self) -> None:
        (there, host), (back, merged) = self._moves
        with torch.cuda.stream(self._stream):
            there.copy_(host, non_blocking=True)
            super().start()
            back.copy_(merged, non_blocking=True)
            if self._done is not None:
                self._done.record(self._stream)

    def finish(self) -> TileResult:
        if self._done is not None:
            self._done.synchronize()
        return super().finish()


class _Slot(Workspace):
    """Pinned memory for one tile, and as much on the device."""

    def __init__(
        self,
        merges: Sequence[Merge],
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ):
        super().__init__(merges)
        self._device, self._stream = device, stream
        self._there = torch.empty(0, dtype=torch.uint8, device=device)

    def _make(self, recipe: Recipe, scope: Scope, numel: int) -> Tile:
        kinds = tile_dtypes(recipe, scope)
        inputs, outputs, scratch = (room_for(rows, numel) for rows in kinds)
        split, end = inputs, inputs + outputs
        self._grow(end + scratch)
        to_read, to_write, _ = carve_all(self._memory, kinds, numel)
        sources, merged, between = carve_all(self._there, kinds, numel)
        there, host = self._there, self._memory
        return StagedTile(
            (to_read, to_write),
            Summation(sources, merged, between, recipe, scope, self._merges),
            ((there[:split], host[:split]), (host[split:end], there[split:end])),
            self._stream,
        )

    def _grow(self, nbytes: int) -> None:
        if self._memory.numel() < nbytes:
            self._tiles.clear()
            pinned = self._stream is not None
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
            self._there = torch.empty(nbytes, dtype=torch.uint8, device=self._device)


class StagedWorkspace(Workspace):
    """One thread's slots and stream.

    Args:
        device: CUDA; in tests a CPU plays its part, without streams.
    """

    depth = 2

    def __init__(self, merges: Sequence[Merge], device: torch.device):
        super().__init__(merges)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = [_Slot(merges, device, stream) for _ in range(self.depth)]

    def tile(self, recipe: Recipe, scope: Scope, numel: int) -> Tile:
        self._slots.append(self._slots.pop(0))
        return self._slots[-1].tile(recipe, scope, numel)
