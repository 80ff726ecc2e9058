"""Whether the window fits this host, and what a merge puts aside besides."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.collectives import is_first_rank, raise_together
from wsm_megatron.plugin.wsm import WSM
from wsm_megatron.process.memory import available_memory

logger = logging.getLogger(__name__)

_GB = 1e9


@dataclass(frozen=True)
class Room:
    """What the ranks of this rank's host need, and what is free there; bytes.

    Attributes:
        snapshot: one snapshot. aside: what a merge overwrites, and averages over steps, in host
            memory.
        memory: free. disk: free where snapshots go to; None where they stay in host memory.
    """

    ranks: int
    snapshot: int
    aside: int
    memory: int
    disk: int | None

    @classmethod
    def here(cls, wsm: WSM, folder: Path | None) -> Room:
        """Args:
        folder: of the disk store; None where the window is in host memory.
        """
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        disk = None if folder is None else free_bytes(folder)
        nbytes = wsm.nbytes * ranks
        aside = (wsm.swap_nbytes + wsm.averaging_nbytes) * ranks
        return cls(ranks, nbytes, aside, free_bytes(None), disk)

    def window(self, number: int) -> int:
        """Of ``number`` snapshots, and one being copied."""
        return (number + 1) * self.snapshot

    def in_memory(self, number: int) -> int:
        """How many snapshots have room in host memory for good."""
        return number + 1 if self.disk is None else 1

    def fits(self, number: int) -> bool:
        """Whether a window of ``number`` snapshots fits."""
        memory = self.in_memory(number) * self.snapshot + self.aside <= self.memory
        return memory and (self.disk is None or self.window(number) <= self.disk)

    @property
    def most(self) -> int:
        """Snapshots of the largest window that fits; 0 or less where none does."""
        if not self.fits(0):
            return 0
        free = self.memory - self.aside if self.disk is None else self.disk
        return free // max(self.snapshot, 1) - 1


def reserve_room(wsm: WSM, number: int, folder: Path | None) -> None:
    """Make sure of room for ``number`` snapshots and one being copied, for what averages take
    besides, and for what is overwritten while merged weights are in place; allocate what lies in
    host memory for good.

    Args:
        folder: of the disk store; None where the window is in host memory.

    Raises:
        UsageError: it does not fit, on this rank's host. Collective: on every rank.
    """
    room = Room.here(wsm, folder)
    window, in_memory = room.window(number), room.in_memory(number)
    where = f"on the file system of {folder}" if folder else "of host memory"
    if is_first_rank():
        logger.info(
            "wsm: %d snapshots, and one being copied, take %.3f GB a rank, %.3f GB %s for "
            "the %d ranks of this host; the weights that a merge puts aside, and averages over "
            "steps, take %.3f GB of host memory, of which %.3f GB are free",
            *(number, window / room.ranks / _GB, window / _GB, where, room.ranks),
            *(room.aside / _GB, room.memory / _GB),
        )
    error = None
    if in_memory * room.snapshot + room.aside > room.memory:
        error = UsageError(_too_large(number, room, folder))
    elif room.disk is not None and window > room.disk:
        error = UsageError(
            f"a window of {number} snapshots needs {window / _GB:.3f} GB, and "
            f"{room.disk / _GB:.3f} GB {where} are free: take fewer snapshots "
            "(--wsm-merge-num), or give a larger --wsm-merge-dir"
        )
    raise_together(error, "making room for the window")
    wsm.reserve(in_memory)


def _too_large(number: int, room: Room, folder: Path | None) -> str:
    window = f"a window of {number} snapshots needs" if folder is None else "a snapshot needs"
    kept = room.in_memory(number) * room.snapshot
    way_out = (
        "take fewer snapshots (--wsm-merge-num), use --wsm-merge-store disk, or fewer ranks a host"
        if folder is None
        else "use fewer ranks a host"
    )
    return (
        f"{window} {kept / _GB:.3f} GB, and the weights that a merge puts aside, and averages over "
        f"steps, {room.aside / _GB:.3f} GB, for the {room.ranks} ranks of this host, but "
        f"{room.memory / _GB:.3f} GB of host memory are free: {way_out}"
    )


def free_bytes(folder: Path | None) -> int:
    """Bytes available for a store: on the file system of ``folder``, or of host memory (None)."""
    if folder is None:
        return available_memory()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
