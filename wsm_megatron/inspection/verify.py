"""Checking a checkpoint on disk: complete, readable, checksums, finite, provenance, sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.common_state import PROVENANCE_KEY, load_common, read_common
from wsm_megatron.checkpoint.layout import PROVENANCE_FILE, read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.execution.value_checks import is_damaged
from wsm_megatron.inspection.manifest import FilesCheck, check_files
from wsm_megatron.inspection.recompute import recompute
from wsm_megatron.planning.provenance import described, is_sealed, read_provenance
from wsm_megatron.safe_pickle.archive import check_archive
from wsm_megatron.storage.buffer import Buffer

_TILE_ELEMENTS = 2**20
SOURCES = ("sample", "all")


@dataclass(frozen=True)
class VerifyReport:
    """What was checked.

    Attributes:
        files: files that were compared with the list in ``wsm_merge.json``.
        unchecked: what an older ``wsm_merge.json`` gives nothing to compare with.
        samples: elements recomputed from the sources.
        recomputed: ``sample`` or ``all`` of them; None where it was not asked for.
    """

    path: Path
    tensors: int
    objects: int
    bytes_read: int
    merged: bool
    files: int = 0
    unchecked: tuple[str, ...] = ()
    samples: int = 0
    recomputed: str | None = None


def verify(
    path: Path,
    *,
    sources: bool | str = False,
    sources_from: Path | None = None,
    allow_nonfinite: bool = False,
    seed: int = 0,
) -> VerifyReport:
    """Check a checkpoint from end to end.

    Of a merged one every byte of every file is compared with what the merge wrote, and everything
    that it did not write is named.

    Args:
        path: an ``iter_XXXXXXX`` directory.
        sources: also make the merge again from the sources that the provenance names, by a float64
            reference of its own, and compare it bit for bit: ``"sample"`` (or True) some elements
            of every tensor, ``"all"`` every element.
        sources_from: the run directory where the sources are now.
        allow_nonfinite: let NaN and Inf pass.
        seed: of the choice of samples.

    Raises:
        UsageError: unfinished, or ``sources`` without provenance or without its sources.
        MergeError: what is wrong, where.
    """
    recomputed = _wanted(sources, sources_from)
    provenance = read_provenance(path) if path.is_dir() else None
    if provenance is None and recomputed is not None:
        read_layout(path)
        raise UsageError(f"{path}: no {PROVENANCE_FILE}; not a checkpoint of this tool")
    files = check_files(path, provenance) if provenance is not None else None
    if files is not None and files.problems:
        cause = _damaged_tensor(path, files, allow_nonfinite)
        raise MergeError(f"{path} is not what the merge wrote: {files.problems}{cause}")
    reader = CheckpointReader(read_layout(path))
    try:
        _check_common(reader, provenance)
        _check_entries(reader, allow_nonfinite)
        samples = 0
        if recomputed is not None and provenance is not None:
            everything = recomputed == "all"
            samples = recompute(
                reader, provenance, everything=everything, run=sources_from, seed=seed
            )
        return VerifyReport(
            path=path,
            tensors=len(reader.layout.tensors),
            objects=len(reader.layout.objects),
            bytes_read=reader.bytes_read + (files.bytes_read if files is not None else 0),
            merged=provenance is not None,
            files=len(files.same) if files is not None else 0,
            unchecked=_unchecked(provenance, files),
            samples=samples,
            recomputed=recomputed,
        )
    finally:
        reader.close()


def _wanted(sources: bool | str, sources_from: Path | None) -> str | None:
    """How much is to be made again: one of :data:`SOURCES`, or None."""
    wanted = ("sample" if sources is True else sources) or None
    if wanted not in (None, *SOURCES):
        raise UsageError(f"sources is {wanted!r}, not one of {', '.join(SOURCES)}")
    if sources_from is not None and wanted is None:
        raise UsageError("--sources-from has no effect without --sources")
    return wanted


def _unchecked(provenance: dict[str, Any] | None, files: FilesCheck | None) -> tuple[str, ...]:
    if provenance is None or files is None or is_sealed(provenance):
        return ()
    return (PROVENANCE_FILE, *files.unlisted)


def _damaged_tensor(path: Path, files: FilesCheck, allow_nonfinite: bool) -> str:
    """Which tensor it is, where a file of tensors has changed and can still be read."""
    if not any(name.endswith(".distcp") for name in files.changed):
        return ""
    try:
        reader = CheckpointReader(read_layout(path))
        try:
            _check_entries(reader, allow_nonfinite)
        finally:
            reader.close()
    except (UsageError, MergeError) as error:
        return f"; {error}"
    return ""


def _check_common(reader: CheckpointReader, provenance: dict[str, Any] | None) -> None:
    """The common state is whole, and says of the merge what ``wsm_merge.json`` says."""
    path = reader.layout.path
    data, where = read_common(path, reader.layout)
    for part in (data,) if isinstance(data, bytes) else data.values():
        _check_archive(where, part)
    said = load_common(data, where).get(PROVENANCE_KEY)
    if said is None:
        return
    if provenance is None:
        raise MergeError(
            f"{path}: {PROVENANCE_FILE} is missing: by its common state this is a merged checkpoint"
        )
    if said != described(provenance):
        raise MergeError(f"{path}: {PROVENANCE_FILE} and {where} tell of two merges")


def _check_entries(reader: CheckpointReader, allow_nonfinite: bool) -> None:
    layout = reader.layout
    for region, key, data in _tensors(reader):
        if not allow_nonfinite and is_damaged(key, region, data):
            raise MergeError(f"{layout.path}: {key} at {region.offsets} holds NaN or Inf")
    for entry in layout.objects.values():
        reader.read_object(entry)  # checks the archive to the last byte


def _tensors(reader: CheckpointReader) -> Iterator[tuple[Region, str, torch.Tensor]]:
    """Every chunk's elements, piece by piece; settles each chunk's CRC-32."""
    for key, entry in reader.layout.tensors.items():
        for chunk in entry.chunks:
            region = Region(chunk.offsets, chunk.sizes)
            region_reader = reader.region_reader(key, region)
            for tile in region.split(_TILE_ELEMENTS):
                data = torch.empty(tile.numel, dtype=entry.dtype)
                region_reader.read(tile, Buffer(data))
                yield region, key, data
            region_reader.finish()


def _check_archive(where: str, data: bytes) -> None:
    """Objects are zip archives too (``torch.save``), with a CRC-32 for every record."""
    try:
        check_archive(data)
    except ValueError as error:
        raise MergeError(f"{where} is damaged: {error}") from error
