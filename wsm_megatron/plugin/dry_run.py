"""``--wsm-merge-dry-run``: which windows a run can afford, what they cover, what they cost."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.plugin.arguments import tokens_per_iteration
from wsm_megatron.plugin.collectives import all_gather, is_first_rank, on_all_ranks
from wsm_megatron.plugin.combination import Reach
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.room import Room
from wsm_megatron.plugin.swap import sum_seconds
from wsm_megatron.plugin.wsm import WSM

logger = logging.getLogger(__name__)

_GB = 1e9
_SAMPLE = 64 * 2**20  # bytes that are moved to measure a rate
_SOURCES = 4  # that are summed to measure a rate


@dataclass(frozen=True)
class Rank:
    """What one rank found: bytes, and bytes a second measured while all ranks did the same.

    Attributes:
        nbytes: of a snapshot. aside: of what a merge overwrites.
        copied: to the host. summed: of all sources together.
        written, read: of the disk store's file system; None without one, or where it cannot be
            written to.
    """

    room: Room
    nbytes: int
    aside: int
    copied: float
    summed: float
    written: float | None = None
    read: float | None = None

    @classmethod
    def measured(cls, wsm: WSM, device: torch.device, folder: Path | None) -> Rank:
        """Leaves no trace on the disk. Collective, so that ranks of one host measure together."""
        room, nbytes = Room.here(wsm, folder), max(4, min(wsm.nbytes, _SAMPLE))
        on_all_ranks(True)
        copied = nbytes / _copy_seconds(nbytes, device)
        summed = _SOURCES * nbytes / max(sum_seconds(nbytes, _SOURCES), 1e-9)
        written, read = _disk_rates(folder, nbytes) if folder else (None, None)
        return cls(room, wsm.nbytes, wsm.swap_nbytes, copied, summed, written, read)

    @property
    def snapshot_seconds(self) -> float:
        """To copy one to the host."""
        return self.nbytes / self.copied

    def merge_seconds(self, number: int) -> float:
        """To put a merge of ``number`` snapshots in place and the weights back, without what the
        ranks exchange."""
        sources = number * self.nbytes
        from_disk = sources / self.read if self.read else 0.0
        return from_disk + sources / self.summed + 2 * self.aside / self.copied


def report(
    wsm: WSM, config: WSMConfig, args: Any, every: int, folder: Path | None, device: torch.device
) -> None:
    """Log what :func:`lines` says, on the first rank. Collective.

    Args:
        wsm: of this run, without a disk store. folder: of the disk store, where there is one.
        every: iterations between snapshots. device: of the weights.
    """
    ranks: list[Rank] = all_gather(Rank.measured(wsm, device, folder))
    if is_first_rank():
        for line in lines(ranks, config, every, tokens_per_iteration(args)):
            logger.info("wsm: dry run: %s", line)


def lines(ranks: Sequence[Rank], config: WSMConfig, every: int, tokens: int | None) -> list[str]:
    """Of the rank and the host where it is tightest.

    Args:
        tokens: an iteration.
    """
    tightest = min(ranks, key=lambda rank: rank.room.most).room
    said = [
        f"a snapshot takes {_gb(max(rank.nbytes for rank in ranks))} a rank, "
        f"{_gb(tightest.snapshot)} for the {tightest.ranks} ranks of a host, and about "
        f"{max(rank.snapshot_seconds for rank in ranks):.3g} s to copy{_written(ranks)}",
        f"there is one every {every} iterations{_covered(every, tokens)}",
        _free(tightest),
        f"the largest window that fits: {_window(tightest.most, every, tokens)}"
        if tightest.most >= 2
        else "no window fits",
    ]
    said += [_one(ranks, tightest, reach, every, tokens) for reach in config.reaches]
    if config.eval:
        seconds = [
            max(rank.merge_seconds(_size(one.reach, every, tokens)) for rank in ranks)
            for one in config.combinations
        ]
        said.append(
            f"with every evaluation {len(seconds)} more, and about {sum(seconds):.3g} s to put "
            "the merges in place and the weights back"
        )
    return said


def _one(
    ranks: Sequence[Rank], tightest: Room, reach: Reach, every: int, tokens: int | None
) -> str:
    number = _size(reach, every, tokens)
    fits = all(rank.room.fits(number) for rank in ranks)
    return (
        f"{reach.flag} {reach.length}: {_window(number, every, tokens)}: "
        f"{_gb(tightest.window(number))} a host, with one being copied, "
        f"{'fits' if fits else 'does not fit'}; a merge takes about "
        f"{max(rank.merge_seconds(number) for rank in ranks):.3g} s"
    )


def _size(reach: Reach, every: int, tokens: int | None) -> int:
    number = reach.size(every, tokens)
    assert number is not None, "the interval between snapshots is known here"
    return number


def _window(number: int, every: int, tokens: int | None) -> str:
    reaches = (number - 1) * every
    return f"{number} snapshots over {reaches} iterations{_covered(reaches, tokens)}"


def _covered(iterations: int, tokens: int | None) -> str:
    return "" if tokens is None else f", {iterations * tokens:,} tokens"


def _free(room: Room) -> str:
    disk = "" if room.disk is None else f", {_gb(room.disk)} on the disk of snapshots"
    return (
        f"free are {_gb(room.memory)} of host memory{disk}; a merge puts {_gb(room.aside)} aside "
        "in host memory"
    )


def _written(ranks: Sequence[Rank]) -> str:
    seconds = [rank.nbytes / rank.written for rank in ranks if rank.written]
    return f", {max(seconds):.3g} s to write in the background" if seconds else ""


def _gb(nbytes: int) -> str:
    return f"{nbytes / _GB:.3f} GB"


def _copy_seconds(nbytes: int, device: torch.device) -> float:
    cuda = device.type == "cuda"
    live = torch.ones(nbytes // 4, device=device)
    host = torch.ones(nbytes // 4, pin_memory=cuda)  # written once: its pages are there
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    host.copy_(live)
    return max(time.perf_counter() - began, 1e-9)


def _disk_rates(folder: Path, nbytes: int) -> tuple[float | None, float | None]:
    """Bytes a second, written and synced, and read again past the page cache."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    data = os.urandom(nbytes)
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            began = time.perf_counter()
            file.write(data)
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            file.read(nbytes)
            read = time.perf_counter() - began
    except OSError as error:
        logger.warning("wsm: dry run: %s cannot be written to: %s", place, error)
        return None, None
    return nbytes / max(written, 1e-9), nbytes / max(read, 1e-9)
