"""All entries of a checkpoint, every byte read once: values looked at, checksums put together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from isal.isal_zlib import crc32, crc32_combine

from wsm_megatron.checkpoint.layout import Chunk, Location, ObjectEntry, TensorEntry
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError, PassingError
from wsm_megatron.execution.context import Progress
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.execution.value_checks import is_damaged
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.retry import check_storage, with_retries

_TILE_ELEMENTS = 2**20
_AROUND = "what lies around its tensors"


@dataclass(frozen=True)
class Part:
    """A chunk of a tensor, or an object, where it lies."""

    entry: TensorEntry | ObjectEntry
    location: Location
    chunk: Chunk | None = None


@dataclass
class EntriesRead:
    """What was found.

    Attributes:
        crcs: CRC-32 of the bytes at each location that is sound.
        problems: of the others, by their place in the order of files.
    """

    crcs: dict[Location, int] = field(default_factory=dict)
    problems: dict[int, MergeError] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of what is sound."""
        return sum(location.length for location in self.crcs)

    @property
    def problem(self) -> MergeError | None:
        """The first."""
        return self.problems[min(self.problems)] if self.problems else None


def parts_of(reader: CheckpointReader) -> list[Part]:
    """All that a checkpoint's entries are stored in, in the order of files."""
    layout = reader.layout
    parts = [Part(t, chunk.location, chunk) for t in layout.tensors.values() for chunk in t.chunks]
    parts += [Part(entry, entry.location) for entry in layout.objects.values()]
    return sorted(parts, key=lambda part: (part.location, part.entry.key))


def read_entries(
    reader: CheckpointReader, parts: Sequence[Part], allow_nonfinite: bool, progress: Progress
) -> EntriesRead:
    """Read parts of a checkpoint on threads, those after a damaged one too.

    Raises:
        PassingError: storage fails or hangs.
    """
    done = EntriesRead()

    def look(number: int) -> None:
        part = parts[number]
        try:
            done.crcs[part.location] = _read(reader, part, allow_nonfinite, progress)
        except PassingError:
            raise
        except MergeError as error:
            done.problems[number] = error

    run_workers(range(len(parts)), look, default_threads(), threading.Event(), check_storage)
    return done


def checksums_of_files(
    reader: CheckpointReader, parts: Sequence[Part], read: EntriesRead
) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of the files in which every entry is sound: from what was read of these, and
    the bytes between them."""
    files: dict[str, list[Location]] = {}
    for location in sorted({part.location for part in parts}):
        files.setdefault(location.file, []).append(location)
    sound = {name: at for name, at in files.items() if read.crcs.keys() >= set(at)}
    joined = {name: _joined(reader, name, at, read.crcs) for name, at in sound.items()}
    return {name: found for name, found in joined.items() if found is not None}


def _joined(
    reader: CheckpointReader, name: str, locations: list[Location], crcs: dict[Location, int]
) -> tuple[int, int] | None:
    path = reader.layout.path / name
    size = with_retries(path.stat, lambda: f"{path}: looking").st_size
    end = crc = 0
    for location in locations:
        if location.offset < end:
            return None
        crc = reader.crc_on(Location(name, end, location.offset - end), crc, _AROUND)
        crc = crc32_combine(crc, crcs[location], location.length)
        end = location.offset + location.length
    return size, reader.crc_on(Location(name, end, size - end), crc, _AROUND)


def _read(reader: CheckpointReader, part: Part, allow_nonfinite: bool, progress: Progress) -> int:
    """CRC-32 of the bytes at a location, which are sound."""
    if part.chunk is None:
        assert isinstance(part.entry, ObjectEntry)
        data = reader.read_object(part.entry)  # checks the archive to the last byte
        progress(len(data))
        return crc32(data)
    return _read_chunk(reader, part, part.chunk, allow_nonfinite, progress)


def _read_chunk(
    reader: CheckpointReader, part: Part, chunk: Chunk, allow_nonfinite: bool, progress: Progress
) -> int:
    (file, offset, length), key = part.location, part.entry.key
    region, record = Region(chunk.offsets, chunk.sizes), reader.record(key, chunk)
    region_reader = reader.region_reader(key, region)
    crc = reader.crc_on(Location(file, offset, record.start), 0, _AROUND)
    for tile in region.split(_TILE_ELEMENTS):
        data = Buffer.empty(tile.numel, record.dtype)
        region_reader.read(tile, data)
        if not allow_nonfinite and is_damaged(key, region, data.elements):
            raise MergeError(f"{reader.layout.path}: {key} at {region.offsets} holds NaN or Inf")
        crc = crc32(data.data, crc)
        progress(len(data.data))
    region_reader.finish()
    end = record.start + record.nbytes
    progress(length - record.nbytes)
    return reader.crc_on(Location(file, offset + end, length - end), crc, _AROUND)
