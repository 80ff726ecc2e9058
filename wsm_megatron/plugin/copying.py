"""Copying live shards to the host without holding up training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from wsm_megatron.plugin.shards import Shard


class ShardCopier:
    """Copies all shards of a rank into one flat fp32 host tensor.

    On CUDA the main params travel on a side stream into pinned memory, while forward and backward
    of the next step go on; the step itself waits for the copy on the device (``guard``), for it
    changes them. Without guards all that follows waits: a captured step calls no hooks. Buffers
    change earlier, in the forward and backward passes, but are tiny: they travel on the current
    stream, in order. On the CPU a copy is complete when ``start`` returns.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._cuda = any(shard.device.type == "cuda" for shard in shards)
        self._stream: Any = torch.cuda.Stream() if self._cuda else None
        self._copied: Any = None
        self._guards: list[Any] = []

    def allocate(self, numel: int) -> torch.Tensor:
        """A flat fp32 host tensor, pinned where the shards are on CUDA."""
        return torch.empty(numel, dtype=torch.float32, pin_memory=self._cuda)

    def guard(self, optimizers: Sequence[Any]) -> None:
        """Let every step of these ``torch.optim`` optimizers wait for a copy under way."""
        if self._cuda:
            self._guards += [o.register_step_pre_hook(self._wait) for o in optimizers]

    def start(self, flat: torch.Tensor) -> _Copied:
        """Launch the copy of every shard, in order, into ``flat``."""
        if not self._cuda:
            self._copy(flat, lambda shard: True)
            return _Copied()
        self._copy(flat, lambda shard: shard.is_buffer)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(flat, lambda shard: not shard.is_buffer)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        copied = _Copied(self._copied)
        if not self._guards:
            self._wait()
        return copied

    def close(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def _copy(self, flat: torch.Tensor, wanted: Callable[[Shard], bool]) -> None:
        start = 0
        for shard in self._shards:
            if wanted(shard):
                flat[start : start + shard.size].copy_(shard.owned(), non_blocking=self._cuda)
            start += shard.size

    def _wait(self, *_: Any) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


class _Copied:
    """A copy under way; ``synchronize`` waits on the host until it is complete."""

    def __init__(self, event: Any = None) -> None:
        self._event = event

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()
