"""Free space: enough for all that a job writes, before anything is created."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from wsm_megatron.errors import MergeError
from wsm_megatron.storage.retry import watched


@dataclass
class _Share:
    """What goes to one file system."""

    place: Path
    roots: list[Path] = field(default_factory=list)
    needed: int = 0
    there: int = 0


def check_space(needed: Mapping[Path, int], there: Mapping[Path, int]) -> None:
    """Compare what is needed with what is free, for all targets of a file system together.

    Args:
        needed: bytes of each target's checkpoint. there: of those, or of leftovers that are removed
            first, what is on disk already.

    Raises:
        MergeError: less is free.
    """
    shares: dict[int, _Share] = {}
    for target, nbytes in needed.items():
        place = next(path for path in target.absolute().parents if path.is_dir())
        with watched(partial("{}: looking".format, place)):
            share = shares.setdefault(place.stat().st_dev, _Share(place))
        share.roots += [target.parent] if target.parent not in share.roots else []
        share.needed += nbytes
        share.there += there[target]
    for share in shares.values():
        with watched(partial("{}: asking for its free space".format, share.place)):
            free = shutil.disk_usage(share.place).free + share.there
        if free < share.needed:
            raise MergeError(
                f"{', '.join(map(str, share.roots))}: {share.needed / 1e9:.3f} GB needed and "
                f"{free / 1e9:.3f} GB free; nothing was written"
            )


def allocated(directory: Path) -> int:
    """Bytes that a directory takes up on disk: of files with holes, those that are there.

    Files may come and go meanwhile.
    """
    total = 0
    with watched(lambda: f"{directory}: looking"):
        for folder, _, names in os.walk(directory):
            for name in names:
                with suppress(FileNotFoundError):
                    stat = os.stat(os.path.join(folder, name), follow_symlinks=False)
                    total += min(stat.st_size, 512 * stat.st_blocks)
    return total
