"""Checking a checkpoint on disk: complete, readable, checksums, finite, provenance, sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.common_state import PROVENANCE_KEY, load_common, read_common
from wsm_megatron.checkpoint.layout import PROVENANCE_FILE, read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.execution.rank import ProgressFactory, no_progress
from wsm_megatron.inspection.entries import (
    EntriesRead,
    checksums_of_files,
    parts_of,
    read_entries,
)
from wsm_megatron.inspection.manifest import FilesCheck, check_files
from wsm_megatron.inspection.recompute import recompute
from wsm_megatron.planning.provenance import described, is_sealed, read_provenance
from wsm_megatron.safe_pickle.archive import check_archive

SOURCES = ("sample", "all")


@dataclass(frozen=True)
class VerifyReport:
    """What was checked.

    Attributes:
        files: files that were compared with the list in ``wsm_merge.json``.
        bytes_read: without what --sources reads.
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
    progress: ProgressFactory | None = None,
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
        progress: shows the bytes that are read.

    Raises:
        UsageError: unfinished, or ``sources`` without provenance or without its sources.
        MergeError: what is wrong, where.
    """
    recomputed = _wanted(sources, sources_from)
    provenance = read_provenance(path) if path.is_dir() else None
    if provenance is None and recomputed is not None:
        read_layout(path)
        raise UsageError(f"{path}: no {PROVENANCE_FILE}; not a checkpoint of this tool")
    bar = progress or no_progress
    with _opened(path, provenance) as reader:
        entries, files = _read_through(reader, provenance, allow_nonfinite, bar)
        _check_common(reader, provenance)
        samples = 0
        if recomputed is not None and provenance is not None:
            everything = recomputed == "all"
            samples = recompute(
                reader, provenance, bar, everything=everything, run=sources_from, seed=seed
            )
        return VerifyReport(
            path=path,
            tensors=len(reader.layout.tensors),
            objects=len(reader.layout.objects),
            bytes_read=entries.nbytes + (files.bytes_read if files is not None else 0),
            merged=provenance is not None,
            files=len(files.same) if files is not None else 0,
            unchecked=_unchecked(provenance, files),
            samples=samples,
            recomputed=recomputed,
        )


@contextmanager
def _opened(path: Path, provenance: dict[str, Any] | None) -> Iterator[CheckpointReader]:
    """A reader. Where not even that is possible of a merge, all of its files are compared."""
    try:
        reader = CheckpointReader(read_layout(path))
    except (UsageError, MergeError) as error:
        if provenance is not None:
            _check_files(path, provenance, {}, error)
        raise
    try:
        yield reader
    finally:
        reader.close()


def _read_through(
    reader: CheckpointReader,
    provenance: dict[str, Any] | None,
    allow_nonfinite: bool,
    progress: ProgressFactory,
) -> tuple[EntriesRead, FilesCheck | None]:
    """Every entry, and of a merge every file: raises what is wrong in them."""
    parts, files = parts_of(reader), None
    with progress(0, sum(part.location.length for part in parts)) as bar:
        entries = read_entries(reader, parts, allow_nonfinite, bar)
    if provenance is not None:
        known = checksums_of_files(reader, parts, entries)
        files = _check_files(reader.layout.path, provenance, known, entries.problem)
    if entries.problem is not None:
        raise entries.problem
    return entries, files


def _check_files(
    path: Path,
    provenance: dict[str, Any],
    known: Mapping[str, tuple[int, int]],
    problem: Exception | None,
) -> FilesCheck:
    """Raise ``MergeError`` where they are not what the merge wrote, with what is wrong in them."""
    files = check_files(path, provenance, known)
    if files.problems:
        cause = "" if problem is None else f"; {problem}"
        raise MergeError(f"{path} is not what the merge wrote: {files.problems}{cause}")
    return files


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


def _check_archive(where: str, data: bytes) -> None:
    """Objects are zip archives too (``torch.save``), with a CRC-32 for every record."""
    try:
        check_archive(data)
    except ValueError as error:
        raise MergeError(f"{where} is damaged: {error}") from error
