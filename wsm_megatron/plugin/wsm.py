"""WSM: take snapshots of a model in training, and merge them in place."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.plugin.block_mean import warn_of_lost_points
from wsm_megatron.plugin.combination import Combination
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.moving_average import MovingAverage
from wsm_megatron.plugin.optimizers import parts
from wsm_megatron.plugin.refill import Load, Refill
from wsm_megatron.plugin.shards import collect, lacks_state, layout_of_rank
from wsm_megatron.plugin.snapshots import Snapshots
from wsm_megatron.plugin.store import DiskStore, MemoryStore, Store
from wsm_megatron.plugin.swap import swap_nbytes, swapped
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.half_life import Averaged
from wsm_megatron.schedule.window import Checkpoint, Consumed


class WSM:
    """The merge of a model in training: ``snapshot`` now and then, ``with merged():`` to use it.

    ::

        wsm = WSM(model, optimizer, WSMConfig(num=8, decay="1-sqrt"))
        for iteration in ...:
            train_step()
            if iteration % 100 == 0:
                wsm.snapshot(iteration, tokens)
        with wsm.merged():
            evaluate(model)  # or save it

    With ``average_every=K`` the loop also calls ``wsm.add_step(iteration)`` after every step, and
    means over every K-th step are merged. With ``half_life=H`` there is no window: each snapshot
    is a sample of a moving average.

    Every method marked *collective* must be called by all ranks, in the same order. Works on
    megatron-core alone; ``hooks.py`` drives it for Megatron-LM's ``pretrain()``.

    Args:
        model: a model chunk or the list of them, wrapped in Megatron's DDP.
        optimizer: the Megatron optimizer over it.
        config: what to keep and how to merge it.
        folder: where the disk store lives; needed with ``store="disk"``, refused otherwise.

    Raises ``UsageError`` for an optimizer that is not supported.
    """

    def __init__(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        optimizer: Any,
        config: WSMConfig,
        folder: str | Path | None = None,
    ) -> None:
        folder = folder if folder is not None else config.dir
        if (folder is None) != (config.store == "memory"):
            raise UsageError(
                f"store={config.store!r}: a folder belongs to store='disk', only to it"
            )
        self.config = config
        self._chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
        self._optimizer = optimizer
        self._folder = None if folder is None else Path(folder)
        self._reserved = 0
        self._moments = config.optimizer_state == "merge"
        self._own(optimizer)

    def _own(self, optimizer: Any) -> None:
        """Begin with an empty store of what this rank owns now."""
        self._shards = collect(self._chunks, optimizer, moments=self._moments)
        self._expected = self._moments and lacks_state(optimizer)
        every = self.config.points_every
        self._store: Store = (
            MemoryStore(self._shards, every)
            if self._folder is None
            else DiskStore(self._shards, self._folder, layout_of_rank(), every)
        )
        self._store.guard([part.steps for part in parts(optimizer) if not part.is_captured])
        self._moving: MovingAverage | None = None
        if self.config.moving is not None:
            self._moving = MovingAverage(self.config.moving, self._shards, self._store)
        self._window = Snapshots(self.config, self._store)
        self._snapshots = self._moving or self._window

    def _meet_moments(self) -> None:
        """Where moments were but expected: which there are is known once the optimizer has made
        them, in its first step."""
        if not self._expected or self._snapshots.kept or lacks_state(self._optimizer):
            return
        self._expected = False
        shards = collect(self._chunks, self._optimizer, moments=True)
        if [shard.describe() for shard in shards] != [one.describe() for one in self._shards]:
            self._store.close()
            self._own(self._optimizer)
            self._store.reserve(self._reserved)

    @property
    def nbytes(self) -> int:
        """Bytes that one snapshot costs this rank, its block mean included."""
        return self._store.nbytes

    @property
    def averaging_nbytes(self) -> int:
        """Bytes of host memory that averages over steps take on this rank, besides snapshots: the
        block mean that is being summed, or the moving average."""
        moving = self._moving.nbytes if self._moving is not None else 0
        return self._store.stepping_nbytes + moving

    @property
    def swap_nbytes(self) -> int:
        """Bytes of host memory that :meth:`merged` takes on this rank while it is entered: a copy
        of what it overwrites (the model weights are 2 bytes a parameter on every rank)."""
        return swap_nbytes(self._chunks, self._shards)

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """The snapshots that count, oldest first; the same on every rank."""
        return self._snapshots.kept

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The merges that the window is kept for: each decay over each length."""
        return self.config.combinations

    def __contains__(self, iteration: int) -> bool:
        return iteration in self._snapshots

    def reserve(self, number: int) -> None:
        """Allocate host memory for ``number`` snapshots beforehand; one is enough for disk."""
        self._reserved += number
        self._store.reserve(number)

    def snapshot(self, iteration: int, tokens: int | Consumed, *, durable: bool = True) -> float:
        """Start copying the live main params and buffers. Collective; returns once the copy is
        launched.

        Whether it worked on every rank is found out at the next snapshot or merge: a rank that
        failed (no memory, disk full, NaN) makes all ranks leave this one out, with one warning.
        Training is never stopped.

        Args:
            iteration: larger than every iteration kept before.
            tokens: trained so far, the snapshot's position in the decay; or, where the sequence
                length may change, what they are counted from.
            durable: False for a snapshot that counts only after :meth:`confirm`.

        Returns:
            How long training stood still for it on this rank, in seconds.
        """
        began = time.perf_counter()
        self.settle()
        self._meet_moments()
        if any(iteration <= checkpoint.iteration for checkpoint in self.kept):
            raise UsageError(
                f"snapshot({iteration}): iteration {self.kept[-1].iteration} is kept already"
            )
        self._snapshots.take(Consumed.of(iteration, tokens), durable=durable)
        return time.perf_counter() - began

    def add_step(self, iteration: int) -> None:
        """Call it after every training step, before or after a snapshot of that iteration: with
        ``average_every`` each K-th is taken into the mean of its block. Not collective; returns
        once the copy is launched.

        Where that fails, or a NaN is in it, the snapshot that ends the block fails.
        """
        every = self.config.points_every
        if every is None or iteration % every or iteration < self.config.start_iter:
            return
        self._meet_moments()
        self._store.add_step(iteration)

    def confirm(self, iteration: int) -> None:
        """Let a snapshot taken with ``durable=False`` count from the next one, or merge, on."""
        self._snapshots.confirm(iteration)

    def settle(self) -> tuple[int, ...]:
        """Wait for copies under way and agree on what counts. Collective.

        Returns the iterations that left the window.
        """
        return self._snapshots.settle()

    def coefficients(self, combination: Combination | None = None) -> MergeCoefficients | None:
        """The merge that :meth:`merged` would make now, or None for fewer than two snapshots. That
        of a moving average is of one source. Collective."""
        self.settle()
        return self._snapshots.coefficients(combination)

    def averaged(self, iteration: int) -> dict[str, Any]:
        """What is merged for an iteration of :attr:`kept`, where that is an average over steps, for
        a provenance: ``mean``, of a block, or ``moving_average``. Empty for a snapshot itself."""
        if self._moving is not None:
            return self._moving.describe(iteration)
        block = self._store.block(iteration)
        return {} if block is None or block.points == 1 else {"mean": block.describe()}

    @contextmanager
    def merged(self, combination: Combination | None = None) -> Iterator[MergeCoefficients]:
        """Merged weights in place: main params, buffers and model weights. Collective.

        On exit, also after an exception, everything is as it was, bit for bit; moments are
        touched only with ``optimizer_state="merge"``. Raises ``MergeError`` where fewer than two
        snapshots are kept, and on every rank where one rank fails.

        Args:
            combination: one of :attr:`combinations`; the first where none is named.
        """
        merge = self.coefficients(combination)
        if merge is None and self._moving is not None:
            raise MergeError("a moving average needs at least one snapshot, and none is there")
        if merge is None:
            raise MergeError(
                f"a merge needs at least two snapshots, {len(self.kept)} are kept: take them more "
                "often, or merge later, and see the warnings of those that failed"
            )
        self._store.finish_steps()
        sources = self._moving or self._store
        with swapped(self._chunks, self._optimizer, self._shards, sources, merge):
            yield merge

    def emitted(self) -> None:
        """Call it when merged weights were saved as a checkpoint: a moving average goes on from
        what that holds, float32, as a restart from it does. Collective."""
        if self._moving is not None:
            self._moving.go_on_from_float32()

    def restore(self, state: Averaged) -> None:
        """Let a moving average go on after a restart: what is loaded now is the merged checkpoint
        that says ``state``. Collective.

        Raises ``UsageError`` where it has another half-life, or there is no moving average.
        """
        if self._moving is None:
            raise UsageError("only a moving average is restored; a window is refilled")
        self._moving.restore(state)

    def refill(
        self,
        iteration: int,
        tokens: int | Consumed,
        available: Sequence[int] = (),
        load: Load | None = None,
    ) -> None:
        """Fill the window again after a restart at ``iteration``. Collective; weights are loaded.

        What the disk store holds is used where it belongs to this run: whatever is newer than the
        restart is deleted, and the main params of the snapshot of ``iteration`` itself, or where
        there is none of the newest ordinary checkpoint, must equal the loaded ones. The rest of
        the window is refilled through ``load``.

        Args:
            iteration: where training goes on.
            tokens: trained so far, as in :meth:`snapshot`.
            available: iterations of the run's ordinary checkpoints.
            load: loads such a checkpoint into model and optimizer and returns its tokens, or None
                for one that is not to be used. Called last with ``iteration`` where it was called
                at all.

        Raises ``ValueError`` where the disk store holds snapshots of another layout, and nothing
        is there to refill them from.

        Of snapshots that are refilled from ordinary checkpoints there are no block means: they
        count as they are, with a warning.
        """
        if self._moving is not None:
            raise UsageError("a moving average is restored, not refilled")
        Refill(
            snapshots=self._window,
            store=self._store,
            shards=self._shards,
            start=Consumed.of(iteration, tokens),
            available=available,
            load=load,
        ).run()
        if self.config.points_every is not None:
            blocks = [self._store.block(c.iteration) for c in self.kept]
            warn_of_lost_points([c.iteration for c in self.kept], blocks, iteration, self.config)

    def close(self) -> None:
        """Stop the worker thread and forget the hooks on the optimizer; kept files stay."""
        self._store.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in _RENAMED:
                raise AttributeError(f"'WSM' object has no attribute {name!r}")
            message = f"WSM.{name} is WSM.{_RENAMED[name]} now"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(self, _RENAMED[name])


_RENAMED = {"keep": "snapshot", "resume": "refill", "recipe": "coefficients"}
"""Methods by their former names, which still do for one release."""
