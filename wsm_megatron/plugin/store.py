"""The bytes of snapshots: in host memory, or as one safetensors file a rank and snapshot.

Nothing here communicates, or knows which snapshots count: ``snapshots.py`` does.
"""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wsm_megatron.errors import MergeError
from wsm_megatron.plugin.copying import ShardCopier
from wsm_megatron.plugin.shards import Shard
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


class Store(ABC):
    """A rank's shards: of each snapshot, end to end in one flat fp32 tensor."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        ends = list(accumulate(shard.size for shard in shards))
        self._spans = list(zip([0, *ends], ends, strict=False))
        self._numel = ends[-1] if ends else 0
        self._shards = shards
        self._copier = ShardCopier(shards)
        self._free: list[torch.Tensor] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wsm-snapshot")

    @property
    def nbytes(self) -> int:
        """Bytes that one snapshot costs this rank."""
        return 4 * self._numel

    def reserve(self, number: int) -> None:
        """Allocate (on CUDA machines: pin) room for ``number`` snapshots now."""
        self._free += [self._copier.allocate(self._numel) for _ in range(number)]

    def guard(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Let the steps of these optimizers wait, on the device, for a copy under way."""
        self._copier.guard(optimizers)

    def put(self, checkpoint: Consumed) -> Future[None]:
        """Start copying the live shards; they may change once the guarded optimizers step again.

        Never raises: the future, which is done once this rank has the bytes, says what went wrong.
        """
        try:
            flat = self._free.pop() if self._free else self._copier.allocate(self._numel)
            copied = self._copier.start(flat)
            return self._worker.submit(self._complete, checkpoint, flat, copied)
        except Exception as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def _complete(self, checkpoint: Consumed, flat: torch.Tensor, copied: Any) -> None:
        copied.synchronize()
        try:
            self._check_finite(flat)
            self._hold(checkpoint, flat)
        except Exception:
            self._free.append(flat)
            raise

    def _check_finite(self, flat: torch.Tensor) -> None:
        if all(bool(part.isfinite().all()) for part in flat.split(_CHECKED)):
            return
        names = [
            shard.name
            for shard, (start, stop) in zip(self._shards, self._spans, strict=True)
            if not bool(flat[start:stop].isfinite().all())
        ]
        raise MergeError(f"NaN or Inf in {names[0]} ({len(names)} tensors of this rank)")

    @abstractmethod
    def _hold(self, checkpoint: Consumed, flat: torch.Tensor) -> None:
        """Take over a filled flat tensor. Runs in the worker thread."""

    @abstractmethod
    def get(self, iteration: int, index: int) -> torch.Tensor:
        """Shard number ``index`` of a snapshot: flat fp32, on the CPU, not to be changed."""

    @abstractmethod
    def drop(self, iteration: int) -> None:
        """Forget a snapshot, also one of which the copy failed."""

    def found(self) -> Found:
        """What an earlier run of this rank left behind."""
        return Found()

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        self._copier.close()


class MemoryStore(Store):
    """In host memory (pinned where the shards come from CUDA); slots are used again."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(shards)
        self._slots: dict[int, torch.Tensor] = {}

    def _hold(self, checkpoint: Consumed, flat: torch.Tensor) -> None:
        self._slots[checkpoint.iteration] = flat

    def get(self, iteration: int, index: int) -> torch.Tensor:
        start, stop = self._spans[index]
        return self._slots[iteration][start:stop]

    def drop(self, iteration: int) -> None:
        if (flat := self._slots.pop(iteration, None)) is not None:
            self._free.append(flat)


class DiskStore(Store):
    """``DIR/iter_XXXXXXX/rank_XXXXX.safetensors``: one file a rank and snapshot, or none.

    A file is written under a temporary name, fsynced and renamed: one that has its name is whole.
    Its header says which iteration, which rank of which layout, and which elements it holds.
    """

    def __init__(self, shards: Sequence[Shard], folder: Path, layout: dict[str, int]) -> None:
        super().__init__(shards)
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

    def _hold(self, checkpoint: Consumed, flat: torch.Tensor) -> None:
        target = self.path(checkpoint.iteration)
        unfinished = target.with_suffix(_UNFINISHED)
        tensors = {
            shard.name: flat[start:stop]
            for shard, (start, stop) in zip(self._shards, self._spans, strict=True)
        }
        try:
            target.parent.mkdir(exist_ok=True)
            save_file(tensors, unfinished, metadata=self._header(checkpoint))
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
        if iteration not in self._open:
            self._open[iteration] = safe_open(self.path(iteration), framework="pt")
        tensor = self._open[iteration].get_tensor(self._shards[index].name)
        assert tensor.numel() == self._shards[index].size
        return tensor

    def drop(self, iteration: int) -> None:
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
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                logger.warning("%s: not a file of a snapshot, not used: %s", path, error)
                continue
            if fits:
                checkpoints.append(checkpoint)
            else:
                misfits.append(checkpoint.iteration)
        return Found(tuple(checkpoints), tuple(misfits))

    def _fits(self, header: dict[str, str]) -> bool:
        shards = [shard.describe() for shard in self._shards]
        return (
            json.loads(header["layout"]) == self._layout and json.loads(header["shards"]) == shards
        )


def _read_header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _number(text: str | None) -> int | None:
    return None if text in (None, "None") else int(text)


def _remove_if_empty(folder: Path) -> None:
    """Of the ranks that share a folder the last one succeeds."""
    with suppress(OSError):
        folder.rmdir()
