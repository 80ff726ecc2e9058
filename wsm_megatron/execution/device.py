"""Where a rank sums: on its CPU or its GPU, whichever a short measurement says is faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from isal.isal_zlib import crc32

from wsm_megatron.errors import UsageError
from wsm_megatron.execution.gpu_tiles import StagedWorkspace
from wsm_megatron.execution.memory_budget import STAGED_BYTES, TILE_BYTES
from wsm_megatron.execution.tiles import Workspace
from wsm_megatron.kernels import bind
from wsm_megatron.planning.tasks import Merge
from wsm_megatron.storage.buffer import Buffer

logger = logging.getLogger(__name__)

WORTH = 16 * 10**9
"""Bytes of sources a rank must have to read before a GPU is asked: starting CUDA takes seconds."""
_GAIN = 1.1
"""How much faster a GPU must be to be taken: it is other work's too."""
_ROUNDS = 5


@dataclass(frozen=True)
class Device:
    """What a rank sums on, and why.

    Attributes:
        staged: tiles are copied there and back.
    """

    torch_device: torch.device
    reason: str
    staged: bool = False

    @property
    def depth(self) -> int:
        return StagedWorkspace.depth if self.staged else Workspace.depth

    @property
    def wanted_bytes(self) -> int:
        """Bytes of all sources in one tile."""
        return STAGED_BYTES if self.staged else TILE_BYTES

    def workspace(self, merges: Sequence[Merge]) -> Workspace:
        if self.staged:
            return StagedWorkspace(merges, self.torch_device)
        return Workspace(merges)


@dataclass(frozen=True)
class Rates:
    """Bytes of sources a second, measured on this rank.

    Attributes:
        host: one thread reads them from the page cache and computes their CRC-32.
        cpu: one thread sums them.
        copy: they go to the device. device: they are summed there.
    """

    host: float
    cpu: float
    copy: float
    device: float

    def on_cpu(self, threads: int) -> float:
        """A thread reads, then sums."""
        return threads / (1 / self.host + 1 / self.cpu)

    def on_device(self, threads: int) -> float:
        """Threads read while others' tiles are copied and summed: the slowest of these decides."""
        return min(threads * self.host, self.copy, self.device)

    def choose(self, threads: int) -> tuple[bool, str]:
        """Whether the device is worth it, and the reason."""
        cpu, device = self.on_cpu(threads), self.on_device(threads)
        reason = (
            f"measured {device / 1e9:.1f} GB/s of sources by GPU (host side "
            f"{threads * self.host / 1e9:.1f}, copies {self.copy / 1e9:.1f}, sums "
            f"{self.device / 1e9:.1f}), {cpu / 1e9:.1f} GB/s by {threads} CPU threads"
        )
        return device > _GAIN * cpu, reason


def host_device(reason: str) -> Device:
    """The CPU of this rank."""
    return Device(torch.device("cpu"), reason)


def choose_device(
    wanted: str, sources: int, merges: int, nbytes: int, threads: int, local_rank: int = 0
) -> Device:
    """The device of this rank.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``.
        nbytes: bytes of sources that this rank reads.
        threads: at most, of this rank.
        local_rank: of the ranks on this machine; GPUs are dealt out in turn.

    Raises:
        UsageError: ``cuda`` is wanted and there is none.
    """
    if wanted == "cpu":
        return host_device("--device cpu")
    if wanted == "auto" and nbytes < WORTH:
        return host_device(f"less than {WORTH / 1e9:.0f} GB to read: too little to start CUDA for")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise UsageError("--device cuda: torch sees no CUDA device here")
        return host_device("no CUDA device")
    cuda = torch.device("cuda", local_rank % torch.cuda.device_count())
    if wanted == "cuda":
        return Device(cuda, "--device cuda", staged=True)
    worth, reason = measure(cuda, sources, merges).choose(threads)
    return Device(cuda, reason, staged=True) if worth else host_device(reason)


def measure(device: torch.device, sources: int, merges: int) -> Rates:
    """Measure with bf16 sources; takes a fraction of a second, after CUDA has started."""
    numel = max(1, TILE_BYTES // 2 // sources)
    tile = torch.ones(sources * numel, dtype=torch.bfloat16)
    other = Buffer(torch.empty_like(tile))

    def read() -> None:
        other.elements.copy_(tile)
        crc32(other.data)

    host = _rate(tile.nbytes, read)
    cpu = _rate(tile.nbytes, _sum_on(tile, sources, merges))
    staged = torch.ones(STAGED_BYTES // 2 // sources * sources, dtype=torch.bfloat16)
    if device.type == "cuda":
        staged = staged.pin_memory()
    there = torch.empty_like(staged, device=device)
    copy = _rate(staged.nbytes, lambda: there.copy_(staged, non_blocking=True), device)
    summed = _rate(staged.nbytes, _sum_on(there, sources, merges), device)
    return Rates(host, cpu, copy, summed)


def _sum_on(sources: torch.Tensor, count: int, merges: int) -> Callable[[], object]:
    numel = sources.numel() // count
    outputs = torch.empty(merges, numel, dtype=sources.dtype, device=sources.device)
    rows = [[1 / count] * count] * merges
    return bind(list(sources.view(count, numel)), rows, list(outputs))


def _rate(nbytes: int, work: Callable[[], object], device: torch.device | None = None) -> float:
    """The best of several rounds, after one to warm up."""
    best = 0.0
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, nbytes / (time.perf_counter() - started))
    return best
