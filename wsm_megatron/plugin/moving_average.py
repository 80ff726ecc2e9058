"""A moving average of the main params and buffers, by half-life."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Any

import torch

from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.collectives import failures, is_first_rank
from wsm_megatron.plugin.combination import Combination
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.store import Store
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.half_life import Averaged, HalfLife
from wsm_megatron.schedule.window import Checkpoint, Consumed, count_tokens

logger = logging.getLogger(__name__)

_TILE = 1 << 20  # elements that are float64 at a time, besides the average


class MovingAverage:
    """In the place of :class:`.Snapshots`: each snapshot is a sample of one average, and forgotten.

    The average lies on the shards of this rank, in float64. A sample is copied by the store, and
    taken in by ``settle`` once every rank has it, whole and finite; else it is left out on all,
    with a warning of the first.

    Args:
        store: of the same shards, in memory.
    """

    def __init__(self, half_life: HalfLife, shards: Sequence[Shard], store: Store) -> None:
        self._half_life, self._shards, self._store = half_life, shards, store
        ends = list(accumulate(shard.size for shard in shards))
        self._starts = [0, *ends[:-1]] if ends else []
        self._average = torch.zeros(ends[-1] if ends else 0, dtype=torch.float64)
        self._state: Averaged | None = None
        self._copying: tuple[Consumed, Future[None]] | None = None
        self._summing: Future[None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: the average, and a shard of it on its way to a merge."""
        return 8 * self._average.numel() + 4 * max((s.size for s in self._shards), default=0)

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """The newest sample, as which the average counts; none before the first."""
        return () if self._state is None else count_tokens([self._state.last])

    def __contains__(self, iteration: int) -> bool:
        newest = self._state.last if self._state is not None else None
        if self._copying is not None:
            newest = self._copying[0]
        return newest is not None and newest.iteration == iteration

    def take(self, checkpoint: Consumed, *, durable: bool = True) -> None:
        """Start copying the live shards. A sample is no checkpoint: it waits for no save."""
        assert self._copying is None, "settle before the next sample"
        self._copying = (checkpoint, self._store.put(checkpoint))

    def confirm(self, iteration: int) -> None:
        """Nothing waits for a save."""

    def settle(self) -> tuple[int, ...]:
        """Wait for the copy under way, agree on it, and begin to take it in. Collective.

        Returns nothing: no iteration leaves a window.
        """
        if self._copying is None:
            return ()
        (sample, copy), self._copying = self._copying, None
        if failed := failures(copy.exception()):
            self._store.drop(sample.iteration)
            if is_first_rank():
                logger.warning(
                    "wsm: moving average without iteration %d: %s",
                    *(sample.iteration, "; ".join(failed)),
                )
            return ()
        state = self._advanced(sample)
        self._state = state
        self._wait()
        self._summing = self._store.submit(lambda: self._take_in(state))
        return ()

    def coefficients(self, combination: Combination | None = None) -> MergeCoefficients | None:
        """A merge of one: the average as it is, the only combination. None before the first
        sample."""
        if not (kept := self.kept):
            return None
        return MergeCoefficients(
            checkpoints=kept,
            decay=None,
            positions=(kept[0].iteration,),
            unit="iterations",
            coefficients=(1.0,),
            why_iterations=None,
        )

    def source(self, iteration: int, index: int) -> torch.Tensor:
        """The average of shard number ``index``, rounded to float32; flat, on the CPU."""
        self._wait()
        return self._place(index).float()

    def describe(self, iteration: int) -> dict[str, Any]:
        """For the provenance of a merged checkpoint; ``Averaged.read`` reads it."""
        assert self._state is not None and iteration == self._state.last.iteration
        return {"moving_average": self._state.describe()}

    def go_on_from_float32(self) -> None:
        """Round the average as a merged checkpoint holds it: a run that restarts from that, and one
        that goes on, have the same average from there on."""
        self._wait()
        for tile in self._average.split(_TILE):
            tile.copy_(tile.float())

    def restore(self, state: Averaged) -> None:
        """Go on from ``state``, of which the live main params and buffers are the average.

        Raises ``UsageError`` where that was of another half-life.
        """
        if state.half_life != self._half_life:
            raise UsageError(
                f"a moving average of half-life {state.half_life} cannot go on as one of "
                f"{self._half_life}"
            )
        self._wait()
        for index, shard in enumerate(self._shards):
            self._place(index).copy_(shard.owned().float())
        self._state = state

    def _advanced(self, sample: Consumed) -> Averaged:
        if self._state is None:
            return Averaged(half_life=self._half_life, last=sample)
        state = self._state.advanced(sample)
        if state.samples == 1 and is_first_rank():
            logger.warning(
                "wsm: the moving average begins anew at iteration %d: how many tokens it lies "
                "after iteration %d is not known",
                *(sample.iteration, self._state.last.iteration),
            )
        return state

    def _take_in(self, state: Averaged) -> None:
        """E + (x - E) / W, each operation rounded in float64. Runs in the store's worker."""
        iteration = state.last.iteration
        for index in range(len(self._shards)):
            sample = self._store.get(iteration, index)
            for average, part in _tiles(self._place(index), sample):
                if state.samples == 1:
                    average.copy_(part)
                else:
                    average.add_(part.double().sub_(average).div_(state.weight))
        self._store.drop(iteration)

    def _place(self, index: int) -> torch.Tensor:
        return self._average[self._starts[index] :][: self._shards[index].size]

    def _wait(self) -> None:
        if self._summing is not None:
            self._summing.result()
            self._summing = None


def _tiles(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(_TILE) for tensor in tensors), strict=True)
