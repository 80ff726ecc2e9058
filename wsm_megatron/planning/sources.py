"""The source checkpoints of a merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.layout import METADATA_FILE, Layout, read_layout
from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.checkpoint.side_files import SideFiles, find_side_files
from wsm_megatron.errors import UsageError
from wsm_megatron.optimizer.indexed_state import with_names
from wsm_megatron.storage.fingerprint import Fingerprint, fingerprint


@dataclass(frozen=True)
class Source:
    """One checkpoint to merge.

    Attributes:
        metadata_crc: CRC-32 of its ``.metadata``.
        save_id: what tells one save from another; None where the writer gave it none.
        fingerprint: of its files when it was opened.
        beside: what lies beside its tensors.
        fingerprints: of every rank's files, where ranks see different ones.
    """

    path: Path
    iteration: int
    layout: Layout
    metadata_crc: int
    save_id: str | None
    fingerprint: Fingerprint
    beside: SideFiles = field(default_factory=SideFiles)
    fingerprints: tuple[Fingerprint, ...] = ()

    @property
    def identity(self) -> Fingerprint | tuple[Fingerprint, ...]:
        """What tells one state of its files from another, on every rank that sees any."""
        return self.fingerprints or self.fingerprint


def open_source(path: Path, iteration: int, whole: bool = True, optimizer: bool = False) -> Source:
    """Open one selected checkpoint: its layout, and what tells later that it changed.

    Args:
        whole: all of its files must be there.
        optimizer: its optimizer state matters: some formats number it, and it is named here.
    """
    before = fingerprint(path)
    layout = read_layout(path, whole)
    layout = with_names(layout) if optimizer else layout
    metadata = read_file(path / METADATA_FILE)
    beside = find_side_files(path, layout.files)
    return Source(path, iteration, layout, crc32(metadata), save_id(metadata), before, beside)


def save_id(metadata: bytes) -> str | None:
    """The id that ``torch.distributed.checkpoint`` gives every save (``StorageMeta.save_id``).

    Looked for in the bytes of ``.metadata``: there the attribute's name is followed, a few opcodes
    later, by its value, and reading all of the pickle for it would take seconds.
    """
    found = _SAVE_ID.search(metadata, max(0, metadata.rfind(b"save_id")))
    return found[1].decode() if found else None


_SAVE_ID = re.compile(rb"save_id.{0,12}?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.DOTALL)


def check_saves(sources: Sequence[Source]) -> None:
    """Raise ``UsageError`` for two sources that are one save under two names."""
    known: dict[str, Source] = {}
    for source in sources:
        if source.save_id is None:
            continue
        if other := known.get(source.save_id):
            raise UsageError(
                f"{other.path} and {source.path} are copies of one save (id {source.save_id}): "
                "the merge would count it twice; leave one of them out (--iterations, --source)"
            )
        known[source.save_id] = source
