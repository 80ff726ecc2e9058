"""What each rank sees of a run whose files lie on several nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.foreign_formats import UNFINISHED, Kind
from wsm_megatron.checkpoint.layout import MARKER_FILE, METADATA_FILE, Layout, check_size
from wsm_megatron.checkpoint.run_directory import (
    RunDirectory,
    Unusable,
    checkpoint_name,
    checkpoint_path,
    list_checkpoints,
    tracked_iteration,
)
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.storage.fingerprint import Fingerprint
from wsm_megatron.storage.retry import with_retries

_END_BYTES = 4096
"""Of a file's end: it holds the CRC-32 of the last tensor, and so tells one save from another."""


_NO_MARKER = Kind(
    "unfinished, or of fsdp_dtensor or torch_dcp",
    "no rank sees a metadata.json, which Megatron writes last with torch_dist; checkpoints of FSDP "
    "merge where every rank sees all of their files",
)


@dataclass(frozen=True)
class SeenFile:
    """One file as a rank sees it: size, modification and change time (ns), CRC-32 of its last
    bytes.
    """

    size: int
    modified: int
    changed: int
    end: int

    def is_same(self, other: SeenFile) -> bool:
        """Copies of one file may have been made at different times."""
        return (self.size, self.end) == (other.size, other.end)


Inventory = Mapping[int, Mapping[str, SeenFile]]
"""What one rank sees: by iteration, the files directly in the checkpoint's folder, by name."""


def take_inventory(root: Path) -> Inventory:
    """Look at the checkpoints under ``root``; nothing where there is no such directory.

    Raises:
        StorageError: it cannot be read.
    """
    if not root.is_dir():
        return {}
    found = with_retries(partial(list_checkpoints, root), lambda: f"{root}: listing")
    return {iteration: _files(path) for iteration, path in found.items()}


def _files(path: Path) -> dict[str, SeenFile]:
    names = with_retries(partial(os.listdir, path), lambda: f"{path}: listing")
    places = [path / name for name in names]
    seen = [with_retries(partial(_see, place), partial(_reading, place)) for place in places]
    return {name: one for name, one in zip(names, seen, strict=True) if one is not None}


def _see(path: Path) -> SeenFile | None:
    """None for a folder or device, and for a file that is deleted while its run goes on."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            stream.seek(max(0, stat.st_size - _END_BYTES))
            end = crc32(stream.read(_END_BYTES))
            return SeenFile(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, end)
    except (FileNotFoundError, IsADirectoryError):
        return None


def _reading(path: Path) -> str:
    return f"{path}: reading"


@dataclass(frozen=True)
class JobInventory:
    """What all ranks see together.

    Attributes:
        root: as rank 0 calls the run's directory; other ranks may have another name for theirs.
        inventories: by rank.
        trackers: the tracker's text by rank, where there is one.
    """

    root: Path
    inventories: Sequence[Inventory]
    trackers: Sequence[str | None] = ()

    def run(self) -> RunDirectory:
        """All checkpoints; those are finished of which some rank sees ``metadata.json``.

        Raises:
            UsageError: there are none.
        """
        found = {iteration for inventory in self.inventories for iteration in inventory}
        if not found:
            raise UsageError(f"{self.root}: no rank sees an iter_XXXXXXX checkpoint there")
        finished = {i for i in found if self.ranks(i).get(MARKER_FILE)}
        unusable = (
            Unusable(
                checkpoint_name(i), i, _NO_MARKER if METADATA_FILE in self.ranks(i) else UNFINISHED
            )
            for i in sorted(found - finished)
        )
        return RunDirectory(self.root, tuple(sorted(finished)), tuple(unusable), self.tracker())

    def tracker(self) -> str | None:
        """The tracker's text: Megatron's rank 0 writes it, so a node may have an older copy."""
        texts = [text for text in self.trackers if text is not None]
        return max(texts, key=lambda text: tracked_iteration(text) or -1, default=None)

    def ranks(self, iteration: int) -> dict[str, tuple[int, ...]]:
        """The ranks that see each file of a checkpoint."""
        ranks: dict[str, tuple[int, ...]] = {}
        for rank, inventory in enumerate(self.inventories):
            for name in inventory.get(iteration, ()):
                ranks[name] = (*ranks.get(name, ()), rank)
        return ranks

    def reporter(self, iteration: int) -> int:
        """The rank that reads a checkpoint's metadata for all: of those that can, the one that
        sees most.

        Raises:
            MergeError: no rank sees both of its metadata files.
        """
        if not (able := self._able(iteration)):
            raise MergeError(
                f"{checkpoint_path(self.root, iteration)}: no rank sees {METADATA_FILE} and "
                f"{MARKER_FILE}; the node of Megatron's rank 0, which wrote them, must take part"
            )
        return max(able, key=lambda rank: (len(self.inventories[rank][iteration]), -rank))

    def is_reported(self, iteration: int) -> bool:
        """Whether some rank sees a checkpoint's metadata."""
        return bool(self._able(iteration))

    def _able(self, iteration: int) -> set[int]:
        ranks = self.ranks(iteration)
        return set(ranks.get(METADATA_FILE, ())) & set(ranks.get(MARKER_FILE, ()))

    def fingerprint(self, rank: int, iteration: int) -> Fingerprint:
        """What tells later that the files which a rank sees have changed."""
        files = self.inventories[rank].get(iteration, {})
        return tuple((name, s.size, s.modified, s.changed) for name, s in sorted(files.items()))

    def sees_all(self, rank: int, layout: Layout, iteration: int) -> bool:
        return layout.files.keys() <= self.inventories[rank].get(iteration, {}).keys()

    def check(self, layout: Layout, iteration: int) -> None:
        """Files that a checkpoint's metadata names are long enough, and the same on all ranks.

        Raises:
            MergeError: naming checkpoint, file and rank.
        """
        for file, end in sorted(layout.files.items()):
            for rank, one in self._seen(iteration, file):
                check_size(layout.path, f"{file} of rank {rank}", one.size, end)
        for file in (METADATA_FILE, MARKER_FILE, *sorted(layout.files)):
            seen = list(self._seen(iteration, file))
            for rank, other in seen[1:]:
                first, known = seen[0]
                if not known.is_same(other):
                    raise MergeError(
                        f"{layout.path}: {file} is another file on rank {rank} than on rank "
                        f"{first}: one is of another save; remove it"
                    )

    def _seen(self, iteration: int, file: str) -> Iterator[tuple[int, SeenFile]]:
        for rank, inventory in enumerate(self.inventories):
            if (seen := inventory.get(iteration, {}).get(file)) is not None:
                yield rank, seen
