"""Whether the window fits this host, and what a merge puts aside besides."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.collectives import is_first_rank, raise_together
from wsm_megatron.plugin.wsm import WSM
from wsm_megatron.process.memory import available_memory

logger = logging.getLogger(__name__)

_GB = 1e9


def reserve_room(wsm: WSM, number: int, folder: Path | None) -> None:
    """Make sure of room for ``number`` snapshots and one being copied, for what averages take
    besides, and for what is overwritten while merged weights are in place; allocate what lies in
    host memory for good.

    Args:
        folder: of the disk store; None where the window is in host memory.

    Raises:
        UsageError: it does not fit, on this rank's host. Collective: on every rank.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    window, aside = (number + 1) * wsm.nbytes * ranks, wsm.swap_nbytes * ranks
    aside += wsm.averaging_nbytes * ranks
    in_memory = 1 if folder else number + 1
    needed, free = in_memory * wsm.nbytes * ranks + aside, free_bytes(None)
    where = f"on the file system of {folder}" if folder else "of host memory"
    if is_first_rank():
        logger.info(
            "wsm: %d snapshots, and one being copied, take %.3f GB a rank, %.3f GB %s for "
            "the %d ranks of this host; the weights that a merge puts aside, and averages over "
            "steps, take %.3f GB of host memory, of which %.3f GB are free",
            *(number, window / ranks / _GB, window / _GB, where, ranks, aside / _GB, free / _GB),
        )
    error = None
    if needed > free:
        error = UsageError(_too_large(number, needed - aside, aside, free, ranks, folder))
    elif folder is not None and window > free_bytes(folder):
        error = UsageError(
            f"a window of {number} snapshots needs {window / _GB:.3f} GB, and "
            f"{free_bytes(folder) / _GB:.3f} GB {where} are free: take fewer snapshots "
            "(--wsm-merge-num), or give a larger --wsm-merge-dir"
        )
    raise_together(error, "making room for the window")
    wsm.reserve(in_memory)


def _too_large(
    number: int, kept: int, aside: int, free: int, ranks: int, folder: Path | None
) -> str:
    window = f"a window of {number} snapshots needs" if folder is None else "a snapshot needs"
    way_out = (
        "take fewer snapshots (--wsm-merge-num), use --wsm-merge-store disk, or fewer ranks a host"
        if folder is None
        else "use fewer ranks a host"
    )
    return (
        f"{window} {kept / _GB:.3f} GB, and the weights that a merge puts aside, and averages over "
        f"steps, {aside / _GB:.3f} GB, for the {ranks} ranks of this host, but {free / _GB:.3f} GB "
        f"of host memory are free: {way_out}"
    )


def free_bytes(folder: Path | None) -> int:
    """Bytes available for a store: on the file system of ``folder``, or of host memory (None)."""
    if folder is None:
        return available_memory()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
