"""WSM: keep checkpoints of a model in training, and merge them in place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.plugin.collectives import failures, is_first_rank
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.restart import is_live, leads_to, take_stock
from wsm_megatron.plugin.ring import MergeRecipe, Ring
from wsm_megatron.plugin.shards import collect, parts
from wsm_megatron.plugin.store import DiskStore, MemoryStore, Store
from wsm_megatron.plugin.swap import swap_nbytes, swapped
from wsm_megatron.schedule.window import Checkpoint, Consumed

logger = logging.getLogger(__name__)

Load = Callable[[int], int | Consumed | None]
"""Loads an iteration into model and optimizer; see :meth:`WSM.resume`."""


class WSM:
    """The merge of a model in training: ``keep`` now and then, ``with merged():`` to use it.

    ::

        wsm = WSM(model, optimizer, WSMConfig(num=8, decay="1-sqrt"))
        for iteration in ...:
            train_step()
            if iteration % 100 == 0:
                wsm.keep(iteration, tokens)
        with wsm.merged():
            evaluate(model)  # or save it

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
        moments = config.optimizer_state == "merge"
        self._shards = collect(self._chunks, optimizer, moments=moments)
        self._store: Store = (
            MemoryStore(self._shards)
            if folder is None
            else DiskStore(self._shards, Path(folder), layout_of_rank())
        )
        self._store.guard([part.optimizer for part in parts(optimizer)])
        self._ring = Ring(config)
        self._copying: list[int] = []
        self._awaited: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes that one kept checkpoint costs this rank."""
        return self._store.nbytes

    @property
    def swap_nbytes(self) -> int:
        """Bytes of host memory that :meth:`merged` takes on this rank while it is entered: a copy
        of what it overwrites (the model weights are 2 bytes a parameter on every rank)."""
        return swap_nbytes(self._chunks, self._shards)

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that count, oldest first; the same on every rank."""
        return self._ring.kept

    def __contains__(self, iteration: int) -> bool:
        return iteration in self._ring

    def reserve(self, number: int) -> None:
        """Allocate host memory for ``number`` checkpoints beforehand; one is enough for disk."""
        self._store.reserve(number)

    def keep(self, iteration: int, tokens: int | Consumed, *, durable: bool = True) -> float:
        """Start keeping the live main params and buffers. Collective; returns once the copy is
        launched.

        Whether it worked on every rank is found out at the next keep or merge: a rank that failed
        (no memory, disk full, NaN) makes all ranks leave this checkpoint out, with one warning.
        Training is never stopped.

        Args:
            iteration: larger than every iteration kept before.
            tokens: trained so far, the checkpoint's position in the decay; or, where the sequence
                length may change, what they are counted from.
            durable: False for a checkpoint that counts only after :meth:`confirm`.

        Returns:
            How long training stood still for it on this rank, in seconds.
        """
        began = time.perf_counter()
        self.settle()
        if any(iteration <= checkpoint.iteration for checkpoint in self.kept):
            raise UsageError(
                f"keep({iteration}): iteration {self.kept[-1].iteration} is kept already"
            )
        self._put(_consumed(iteration, tokens))
        if not durable:
            self._awaited.add(iteration)
        return time.perf_counter() - began

    def confirm(self, iteration: int) -> None:
        """Let a checkpoint kept with ``durable=False`` count from the next keep or merge on."""
        self._awaited.discard(iteration)

    def settle(self) -> tuple[int, ...]:
        """Wait for copies under way and agree on what counts. Collective.

        Returns the iterations that left the window.
        """
        for iteration in self._copying:
            if failed := failures(self._store.finish(iteration)):
                self._forget(iteration)
                if is_first_rank():
                    reasons = "; ".join(failed)
                    logger.warning("wsm: window without iteration %d: %s", iteration, reasons)
        self._copying = []
        left: list[int] = []
        for iteration in self._ring.pending:
            if iteration not in self._awaited:
                left += self._ring.confirm(iteration)
        for gone in left:
            self._store.drop(gone)
        return tuple(left)

    def recipe(self) -> MergeRecipe | None:
        """The merge that :meth:`merged` would make now, or None for fewer than two checkpoints.
        Collective."""
        self.settle()
        return self._ring.recipe()

    @contextmanager
    def merged(self) -> Iterator[MergeRecipe]:
        """Merged weights in place: main params, buffers and model weights. Collective.

        On exit, also after an exception, everything is as it was, bit for bit; moments are
        touched only with ``optimizer_state="merge"``. Raises ``MergeError`` where fewer than two
        checkpoints are kept, and on every rank where one rank fails.
        """
        recipe = self.recipe()
        if recipe is None:
            raise MergeError(
                f"a merge needs at least two kept checkpoints, there are {len(self.kept)}: "
                "call keep() more often or later, and see the warnings of keeps that failed"
            )
        with swapped(self._chunks, self._optimizer, self._shards, self._store, recipe):
            yield recipe

    def resume(
        self,
        iteration: int,
        tokens: int | Consumed,
        available: Sequence[int] = (),
        load: Load | None = None,
    ) -> None:
        """Take up the window after a restart at ``iteration``. Collective; weights are loaded.

        What the disk store holds is used where it belongs to this run: whatever is newer than the
        restart is deleted, and the kept main params of ``iteration`` itself, or where it was not
        kept those of the newest ordinary checkpoint, must equal the loaded ones. The rest of the
        window is refilled through ``load``.

        Args:
            iteration: where training goes on.
            tokens: trained so far, as in :meth:`keep`.
            available: iterations of the run's ordinary checkpoints.
            load: loads such a checkpoint into model and optimizer and returns its tokens, or None
                for one that is not to be used. Called last with ``iteration`` where it was called
                at all.
        """
        on_disk, misfits = take_stock(self._store, iteration)
        witness = max((i for i in on_disk if i in (iteration, *available)), default=None)
        if witness is not None and not self._is_of_this_run(witness, iteration, load):
            if is_first_rank():
                logger.warning(
                    "wsm: the shards kept at iteration %d are not what was loaded: this is another "
                    "run, all kept shards are dropped",
                    witness,
                )
            on_disk = self._drop(on_disk)
        loads, beyond, later = 0, -1, _consumed(iteration, tokens)
        for wanted in sorted({i for i in (*on_disk, *available) if i <= iteration}, reverse=True):
            if not self._ring.may_hold(wanted):
                break
            if wanted in on_disk and leads_to(on_disk[wanted], later):
                later = on_disk.pop(wanted)
                self._ring.add(later)
            elif wanted == iteration:
                self._put(later)
            elif load is not None and wanted in available:
                loads += 1
                found = load(wanted)
                if found is not None and leads_to(one := _consumed(wanted, found), later):
                    self._put(later := one)
            if wanted in self.settle():
                beyond = wanted
                break
        if load is not None and loads:
            load(iteration)
        self._drop(on_disk)
        self._refuse_misfits({i for i in misfits if i > beyond})

    def _is_of_this_run(self, witness: int, iteration: int, load: Load | None) -> bool:
        """Whether the shards kept at ``witness`` equal what is loaded of that iteration."""
        if witness == iteration or load is None:
            return witness != iteration or is_live(self._store, self._shards, witness)
        fit = load(witness) is not None
        same = is_live(self._store, self._shards, witness)
        load(iteration)
        return same or not fit  # an unfit checkpoint says nothing about the shards

    def _drop(self, checkpoints: Iterable[int]) -> dict[int, Consumed]:
        for iteration in list(checkpoints):
            self._store.drop(iteration)
        return {}

    def _refuse_misfits(self, misfits: set[int]) -> None:
        missing = {i for i in misfits if i not in self and self._ring.may_hold(i)}
        if missing:
            raise UsageError(
                f"shards of iterations {sorted(missing)} were kept under another parallel layout, "
                "and no checkpoint of the run is there to refill them from: restart with that "
                "layout, or move the folder of kept shards away to begin with an empty window"
            )

    def close(self) -> None:
        """Stop the worker thread and forget the hooks on the optimizer; kept files stay."""
        self._store.close()

    def _put(self, checkpoint: Consumed) -> None:
        self._ring.add(checkpoint)
        self._copying.append(checkpoint.iteration)
        self._store.put(checkpoint)

    def _forget(self, iteration: int) -> None:
        self._ring.discard(iteration)
        self._store.drop(iteration)


def _consumed(iteration: int, tokens: int | Consumed) -> Consumed:
    """Tokens alone are samples of one token each."""
    return tokens if isinstance(tokens, Consumed) else Consumed(iteration, tokens, 1)


def layout_of_rank() -> dict[str, int]:
    """Sizes of the parallel layout, and this rank's place in it."""
    from megatron.core import parallel_state as ps

    layout = {"world": 1, "rank": 0}
    if dist.is_initialized():
        layout = {"world": dist.get_world_size(), "rank": dist.get_rank()}
    if ps.is_initialized():
        layout |= {
            "tp": ps.get_tensor_model_parallel_world_size(),
            "pp": ps.get_pipeline_model_parallel_world_size(),
            "ep": ps.get_expert_model_parallel_world_size(),
            "dp": ps.get_data_parallel_world_size(with_context_parallel=True),
            "tp_rank": ps.get_tensor_model_parallel_rank(),
            "pp_rank": ps.get_pipeline_model_parallel_rank(),
            "ep_rank": ps.get_expert_model_parallel_rank(),
            "dp_rank": ps.get_data_parallel_rank(with_context_parallel=True),
        }
    return layout
