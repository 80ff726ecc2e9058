"""The bytes of snapshots: in host memory, or as one safetensors file a rank and snapshot.

On request the mean of the steps up to a snapshot goes with it. Nothing here communicates, or knows
which snapshots count: ``snapshots.py`` does.
"""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wsm_megatron.errors import MergeError
from wsm_megatron.kernels.finite import all_finite
from wsm_megatron.plugin.block_mean import BlockMean, is_averaged
from wsm_megatron.plugin.copying import ShardCopier
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.schedule.block_means import Block
from wsm_megatron.schedule.window import Consumed
from wsm_megatron.storage.durable import fsync_path

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished"
_COUNTED = ("samples", "seq_length", "began")  # of Consumed, in a file's header
_CHECKED = 1 << 20  # elements looked at in one go for NaN and Inf


@dataclass(frozen=True)
class Found:
    """What a store holds from an earlier run of this rank."""

    checkpoints: tuple[Consumed, ...] = ()
    """Of complete snapshots in this same layout; oldest first."""
    misfits: tuple[int, ...] = ()
    """Iterations of snapshots under another parallel layout."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """Of those complete snapshots that have a mean: what it is over."""


class Store(ABC):
    """A rank's shards: of each snapshot, end to end in one flat fp32 tensor; behind them the means
    over its block, where there are any.

    Args:
        every: steps between two points of a block mean; None for no means.
    """

    def __init__(self, shards: Sequence[Shard], every: int | None = None) -> None:
        ends = list(accumulate(shard.size for shard in shards))
        self._spans = list(zip([0, *ends], ends, strict=False))
        self._numel = ends[-1] if ends else 0
        self._shards = shards
        self._copier = ShardCopier(shards)
        self._free: list[torch.Tensor] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wsm-snapshot")
        self._blocks: dict[int, Block] = {}
        self._means: dict[int, tuple[int, int]] = {}
        self._block_mean: BlockMean | None = None
        if every is not None:
            self._means = self._places_of_means()
            averaged = [shards[index] for index in self._means]
            self._block_mean = BlockMean(every, averaged, self._worker)

    def _places_of_means(self) -> dict[int, tuple[int, int]]:
        """Where in a flat tensor the mean of each averaged shard lies, by the shard's index."""
        places, end = {}, self._numel
        for index, shard in enumerate(self._shards):
            if is_averaged(shard):
                places[index] = (end, end + shard.size)
                end += shard.size
        return places

    @property
    def numel(self) -> int:
        """Elements of one snapshot."""
        return self._numel

    @property
    def nbytes(self) -> int:
        """Bytes that one snapshot, and its mean, cost this rank."""
        return 4 * self._flat_numel

    @property
    def stepping_nbytes(self) -> int:
        """Bytes of host memory that block means take besides, however many snapshots there are."""
        return self._block_mean.nbytes if self._block_mean is not None else 0

    @property
    def _flat_numel(self) -> int:
        return max((end for _, end in self._means.values()), default=self._numel)

    def reserve(self, number: int) -> None:
        """Allocate (on CUDA machines: pin) room for ``number`` snapshots now."""
        self._free += [self._copier.allocate(self._flat_numel) for _ in range(number)]

    def guard(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Let the steps of these optimizers wait, on the device, for a copy under way."""
        self._copier.guard(optimizers)
        if self._block_mean is not None:
            self._block_mean.guard(optimizers)

    def add_step(self, iteration: int) -> None:
        """Start taking the live shards into the mean of the block, unless a snapshot of this
        iteration did. Without block means nothing. What goes wrong fails the next snapshot."""
        if self._block_mean is not None:
            self._block_mean.add_step(iteration)

    def finish_steps(self) -> None:
        """Wait until no step is being copied any more: live shards may be overwritten."""
        if self._block_mean is not None:
            self._block_mean.wait()

    def put(self, checkpoint: Consumed) -> Future[None]:
        """Start copying the live shards; they may change once the guarded optimizers step again.

        Never raises: the future, which is done once this rank has the bytes, says what went wrong.
        """
        if self._block_mean is not None:
            self._block_mean.ends_at(checkpoint.iteration)
        try:
            flat = self._free.pop() if self._free else self._copier.allocate(self._flat_numel)
            copied = self._copier.start(flat)
        except Exception as error:
            return self._worker.submit(self._give_up, error)
        return self._worker.submit(self._complete, checkpoint, flat, copied)

    def _give_up(self, error: Exception) -> None:
        """The copy could not be started: the block ends all the same."""
        if self._block_mean is not None:
            self._block_mean.sum.clear()
        raise error

    def _complete(self, checkpoint: Consumed, flat: torch.Tensor, copied: Any) -> None:
        try:
            copied.synchronize()
            block = None
            if self._block_mean is not None:
                parts = [flat[slice(*self._spans[index])] for index in self._means]
                mean = flat[self._numel :]
                block = self._block_mean.sum.finish(checkpoint.iteration, parts, mean)
            self._check_finite(flat)
            self._hold(checkpoint, flat, block)
            if block is not None:
                self._blocks[checkpoint.iteration] = block
        except Exception:
            self._free.append(flat)
            raise

    def _check_finite(self, flat: torch.Tensor) -> None:
        if all(bool(all_finite(part)) for part in flat.split(_CHECKED)):
            return
        names = [name for name, part in self._named(flat).items() if not bool(all_finite(part))]
        raise MergeError(f"NaN or Inf in {names[0]} ({len(names)} tensors of this rank)")

    def _named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every shard, and every mean, by name."""
        shards = zip(self._shards, self._spans, strict=True)
        named = {shard.name: flat[start:stop] for shard, (start, stop) in shards}
        means = self._means.items()
        return named | {_mean_of(self._shards[i]): flat[slice(*span)] for i, span in means}

    def source(self, iteration: int, index: int) -> torch.Tensor:
        """What a merge sums of a snapshot for shard number ``index``: the mean over its block where
        there is one, else the shard; as :meth:`get`."""
        if iteration in self._blocks and index in self._means:
            return self._mean(iteration, index)
        return self.get(iteration, index)

    def block(self, iteration: int) -> Block | None:
        """What the mean of a snapshot is over; None where it has none."""
        return self._blocks.get(iteration)

    @abstractmethod
    def _hold(self, checkpoint: Consumed, flat: torch.Tensor, block: Block | None) -> None:
        """Take over a filled flat tensor. Runs in the worker thread."""

    @abstractmethod
    def get(self, iteration: int, index: int) -> torch.Tensor:
        """Shard number ``index`` of a snapshot: flat fp32, on the CPU, not to be changed."""

    @abstractmethod
    def _mean(self, iteration: int, index: int) -> torch.Tensor:
        """Its mean over the block of a snapshot that has one, as :meth:`get`."""

    def drop(self, iteration: int) -> None:
        """Forget a snapshot, also one of which the copy failed."""
        self._blocks.pop(iteration, None)

    def found(self) -> Found:
        """What an earlier run of this rank left behind."""
        return Found()

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Do work on the snapshots' bytes in the worker thread, after all that was asked before."""
        return self._worker.submit(work)

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        self._copier.close()
        if self._block_mean is not None:
            self._block_mean.close()


class MemoryStore(Store):
    """In host memory (pinned where the shards come from CUDA); slots are used again."""

    def __init__(self, shards: Sequence[Shard], every: int | None = None) -> None:
        super().__init__(shards, every)
        self._slots: dict[int, torch.Tensor] = {}

    def _hold(self, checkpoint: Consumed, flat: torch.Tensor, block: Block | None) -> None:
        self._slots[checkpoint.iteration] = flat

    def get(self, iteration: int, index: int) -> torch.Tensor:
        start, stop = self._spans[index]
        return self._slots[iteration][start:stop]

    def _mean(self, iteration: int, index: int) -> torch.Tensor:
        return self._slots[iteration][slice(*self._means[index])]

    def drop(self, iteration: int) -> None:
        super().drop(iteration)
        if (flat := self._slots.pop(iteration, None)) is not None:
            self._free.append(flat)


class DiskStore(Store):
    """``DIR/iter_XXXXXXX/rank_XXXXX.safetensors``: one file a rank and snapshot, or none.

    A file is written under a temporary name, fsynced and renamed: one that has its name is whole.
    Its header says which iteration, which rank of which layout, and which elements it holds; and,
    where means lie beside them, which block they are over.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        folder: Path,
        layout: dict[str, int],
        every: int | None = None,
    ) -> None:
        super().__init__(shards, every)
        self._folder, self._layout = folder, layout
        self._open: dict[int, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(f"iter_*/{self.path(0).with_suffix(_UNFINISHED).name}"):
            unfinished.unlink()
        for empty in folder.glob("iter_*"):
            _remove_if_empty(empty)

    def path(self, iteration: int) -> Path:
        """The file of this rank."""
        name = f"rank_{self._layout['rank']:05d}.safetensors"
        return self._folder / f"iter_{iteration:07d}" / name

    def _hold(self, checkpoint: Consumed, flat: torch.Tensor, block: Block | None) -> None:
        target = self.path(checkpoint.iteration)
        unfinished = target.with_suffix(_UNFINISHED)
        header = self._header(checkpoint)
        if block is not None:
            header["block"] = json.dumps(block.describe())
        try:
            target.parent.mkdir(exist_ok=True)
            save_file(self._named(flat), unfinished, metadata=header)
            fsync_path(unfinished)
            os.replace(unfinished, target)
            fsync_path(target.parent)
        except Exception:
            unfinished.unlink(missing_ok=True)
            raise
        self._free.append(flat)

    def _header(self, checkpoint: Consumed) -> dict[str, str]:
        return {
            "format": "wsm-shards-1",
            "iteration": str(checkpoint.iteration),
            **{name: str(getattr(checkpoint, name)) for name in _COUNTED},
            "layout": json.dumps(self._layout),
            "shards": json.dumps([shard.describe() for shard in self._shards]),
        }

    def get(self, iteration: int, index: int) -> torch.Tensor:
        return self._read(iteration, self._shards[index].name, self._shards[index].size)

    def _mean(self, iteration: int, index: int) -> torch.Tensor:
        return self._read(iteration, _mean_of(self._shards[index]), self._shards[index].size)

    def _read(self, iteration: int, name: str, size: int) -> torch.Tensor:
        if iteration not in self._open:
            self._open[iteration] = safe_open(self.path(iteration), framework="pt")
        tensor: torch.Tensor = self._open[iteration].get_tensor(name)
        assert tensor.numel() == size
        return tensor

    def drop(self, iteration: int) -> None:
        super().drop(iteration)
        self._open.pop(iteration, None)
        target = self.path(iteration)
        try:
            target.unlink(missing_ok=True)
        except OSError as error:  # not worth the run; the next restart tries again
            logger.warning("wsm: cannot remove %s: %s", target, error)
        _remove_if_empty(target.parent)

    def found(self) -> Found:
        checkpoints, misfits = [], []
        for path in sorted(self._folder.glob(f"iter_*/{self.path(0).name}")):
            try:
                header = _read_header(path)
                checkpoint = Consumed(
                    int(header["iteration"]), *(_number(header.get(name)) for name in _COUNTED)
                )
                fits = self._fits(header)
                block = Block(**json.loads(header["block"])) if "block" in header else None
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
                logger.warning("%s: not a file of a snapshot, not used: %s", path, error)
                continue
            if not fits:
                misfits.append(checkpoint.iteration)
                continue
            checkpoints.append(checkpoint)
            if block is not None and self._means:
                self._blocks[checkpoint.iteration] = block
        return Found(tuple(checkpoints), tuple(misfits), dict(self._blocks))

    def _fits(self, header: dict[str, str]) -> bool:
        shards = [shard.describe() for shard in self._shards]
        return (
            json.loads(header["layout"]) == self._layout and json.loads(header["shards"]) == shards
        )


def _mean_of(shard: Shard) -> str:
    """The name of a shard's mean in a file."""
    return f"mean.{shard.name}"


def _read_header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _number(text: str | None) -> int | None:
    return None if text in (None, "None") else int(text)


def _remove_if_empty(folder: Path) -> None:
    """Of the ranks that share a folder the last one succeeds."""
    with suppress(OSError):
        folder.rmdir()
