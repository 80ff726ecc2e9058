"""The zip archive that ``torch.save`` writes, read strictly.

Python's ``zipfile``, torch's reader and the bytes themselves may disagree about a damaged or forged
archive: a member that is there twice, a local header unlike its entry in the directory, bytes in
between. Here an archive is what ``torch.save`` lays out and nothing else: members end to end from
the first byte, stored as they are, each described alike before, behind and in the directory, which
is the last thing. ``PKWARE APPNOTE 6.3`` names the fields.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from isal.isal_zlib import crc32

_LOCAL, _ENTRY, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY_BYTES, _LOCAL_BYTES, _END_BYTES, _END64_BYTES, _LOCATOR_BYTES = 46, 30, 22, 56, 20
_FULL16, _FULL32 = 2**16 - 1, 2**32 - 1
_DESCRIBED_BEHIND, _UTF8 = 0x8, 0x800
_MINIZ = (0x31E, 45)  # version made by, version needed: what torch's writer puts into zip64 ends
_TAIL = 2048
"""Bytes read at once at the end: more than the directory of one tensor's archive."""

_SMALL = {"data.pkl", "byteorder", "version", ".format_version", ".storage_alignment"}
_STORAGE = "data/"
_SERIAL = ".data/serialization_id"
_VERSIONS = range(1, 11)
"""Versions of ``torch.save``'s format that ``torch.load`` reads."""

ReadAt = Callable[[int, int], bytes]
"""Start and length to bytes, as many as there are."""


class Member(NamedTuple):
    """A member's bytes in the archive, and their CRC-32 as the archive has it."""

    start: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """``pickle`` is ``data.pkl``; ``storages`` are the members ``data/<key>``, by key."""

    pickle: bytes
    storages: dict[str, Member]


def read_archive(read: ReadAt, nbytes: int) -> Archive:
    """Read the structure of an archive of ``nbytes`` bytes, and every member but the storages.

    Raises:
        ValueError: anything else than what ``torch.save`` writes on a little-endian machine, or a
            member whose CRC-32 is another. Storages are left to the caller.
    """
    tail_start = max(0, nbytes - _TAIL)
    tail = read(tail_start, nbytes - tail_start)
    if len(tail) != nbytes - tail_start:
        raise ValueError("it is cut short")

    def part(start: int, length: int) -> bytes:
        behind = start - tail_start
        return read(start, length) if behind < 0 else tail[behind : behind + length]

    start, size, count = _end(tail, nbytes)
    entries = _entries(part(start, size), count)
    contents: dict[str, bytes] = {}
    storages: dict[str, Member] = {}
    root, position = entries[0].name.partition("/")[0], 0
    for entry in entries:
        member, position = _member(entry, position, part)
        name = _inner_name(entry.name, root)
        if position > start:
            raise ValueError(f"its member {entry.name} does not end before its directory")
        if name in contents or name.removeprefix(_STORAGE) in storages:
            raise ValueError(f"it holds {entry.name} twice")
        if name.startswith(_STORAGE):
            storages[name.removeprefix(_STORAGE)] = member
            continue
        contents[name] = part(member.start, member.nbytes)
        if crc32(contents[name]) != member.crc:
            raise ValueError(f"CRC-32 of its member {entry.name} is wrong")
    if position != start:
        raise ValueError("there are bytes between its members and its directory")
    _check_contents(contents)
    return Archive(contents["data.pkl"], storages)


def check_archive(data: bytes | bytearray) -> Archive:
    """Read a whole archive, and compare every byte's CRC-32. Raises ``ValueError`` as above."""
    view = memoryview(data)
    archive = read_archive(lambda start, length: bytes(view[start : start + length]), len(view))
    for key, member in archive.storages.items():
        if crc32(view[member.start : member.start + member.nbytes]) != member.crc:
            raise ValueError(f"CRC-32 of its member data/{key} is wrong")
    return archive


class _Entry(NamedTuple):
    """A member as the directory describes it."""

    name: str
    encoded: bytes
    versions_flags_method_time: tuple[int, ...]
    crc: int
    nbytes: int
    offset: int


def _end(tail: bytes, nbytes: int) -> tuple[int, int, int]:
    """Where the directory starts, its size in bytes, and how many members it names."""
    if len(tail) < _END_BYTES or tail[-_END_BYTES:][:4] != _END:
        raise ValueError("it does not end as a zip archive does")
    disk, start_disk, here, count, size, start, comment = struct.unpack(
        "<4H2LH", tail[-_END_BYTES + 4 :]
    )
    if (disk, start_disk, comment) != (0, 0, 0) or here != count:
        raise ValueError("its end is damaged")
    after = nbytes - _END_BYTES
    if tail[-_END_BYTES - _LOCATOR_BYTES :][:4] == _LOCATOR:
        after -= _LOCATOR_BYTES + _END64_BYTES
        wide = _end64(tail[-_END_BYTES - _LOCATOR_BYTES - _END64_BYTES : -_END_BYTES], after)
        full = (_FULL16, _FULL32, _FULL32)
        if (count, size, start) != tuple(map(min, wide, full)):
            raise ValueError("its two ends contradict each other")
        count, size, start = wide
    if start + size != after or count == 0:
        raise ValueError("its end does not fit its directory")
    return start, size, count


def _end64(ends: bytes, position: int) -> tuple[int, int, int]:
    """Count, size and start of the directory from the zip64 end at ``position`` and its locator."""
    if len(ends) != _END64_BYTES + _LOCATOR_BYTES:
        raise ValueError("it is cut short")
    count, size, start = struct.unpack("<3Q", ends[32:56])
    end = struct.pack("<4sQ2H2L4Q", _END64, 44, *_MINIZ, 0, 0, count, count, size, start)
    if ends != end + struct.pack("<4sLQL", _LOCATOR, 0, position, 1):
        raise ValueError("its zip64 end is damaged")
    return count, size, start


def _entries(directory: bytes, count: int) -> list[_Entry]:
    """All of the directory, and nothing else in it."""
    entries: list[_Entry] = []
    position = 0
    while position < len(directory) and len(entries) < count:
        head = directory[position : position + _ENTRY_BYTES]
        if len(head) != _ENTRY_BYTES or head[:4] != _ENTRY:
            raise ValueError("its directory is damaged")
        made_by, *common = struct.unpack("<6H", head[4:16])
        crc, packed, nbytes, name_bytes, extra_bytes = struct.unpack("<3L2H", head[16:32])
        *unused, offset = struct.unpack("<3HLL", head[32:46])
        position += _ENTRY_BYTES + name_bytes + extra_bytes
        encoded = directory[position - extra_bytes - name_bytes : position - extra_bytes]
        extra = directory[position - extra_bytes : position]
        wide = [value for value in (nbytes, packed, offset) if value == _FULL32]
        if wide:
            if extra[:4] != struct.pack("<2H", 1, 8 * len(wide)) or len(extra) != 4 + 8 * len(wide):
                raise ValueError("its directory is damaged")
            values = iter(struct.unpack(f"<{len(wide)}Q", extra[4:]))
            nbytes, packed, offset = (
                next(values) if value == _FULL32 else value for value in (nbytes, packed, offset)
            )
        elif extra:
            raise ValueError("its directory is damaged")
        if made_by or any(unused) or packed != nbytes or position > len(directory):
            raise ValueError("its directory is damaged, or it is compressed")
        name = encoded.decode("ascii", "replace")
        entries.append(_Entry(name, encoded, tuple(common), crc, nbytes, offset))
    if len(entries) != count or position != len(directory):
        raise ValueError("its directory is damaged")
    return entries


def _member(entry: _Entry, position: int, read: ReadAt) -> tuple[Member, int]:
    """A member that must start at ``position``, and where the next one must."""
    version, flags, method, *_ = entry.versions_flags_method_time
    if version or method or flags & ~(_DESCRIBED_BEHIND | _UTF8):
        raise ValueError(f"{entry.name} is compressed, encrypted or of an unknown kind")
    head = read(position, _LOCAL_BYTES)
    if entry.offset != position or len(head) != _LOCAL_BYTES or head[:4] != _LOCAL:
        raise ValueError(f"{entry.name} is not where the member before it ends")
    *common, crc, packed, nbytes, name_bytes, extra_bytes = struct.unpack("<5H3L2H", head[4:])
    rest = read(position + _LOCAL_BYTES, name_bytes + extra_bytes)
    behind = flags & _DESCRIBED_BEHIND
    sizes = (0, 0, 0) if behind else (entry.crc, entry.nbytes, entry.nbytes)
    if (
        tuple(common) != entry.versions_flags_method_time
        or (crc, packed, nbytes) != sizes
        or rest[:name_bytes] != entry.encoded
        or len(rest) != name_bytes + extra_bytes
    ):
        raise ValueError(f"{entry.name} has another header than the directory says")
    wide = _check_extra(rest[name_bytes:], entry)
    start = position + _LOCAL_BYTES + len(rest)
    end = start + entry.nbytes
    if behind:
        form = "<4sL2Q" if wide else "<4s3L"
        found = read(end, struct.calcsize(form))
        if found != struct.pack(form, _DESCRIPTOR, entry.crc, entry.nbytes, entry.nbytes):
            raise ValueError(f"{entry.name} has another size or CRC-32 than the directory says")
        end += len(found)
    return Member(start, entry.nbytes, entry.crc), end


def _check_extra(extra: bytes, entry: _Entry) -> bool:
    """A local header's extra fields: the sizes of a large member, padding; whether it has sizes."""
    size = struct.pack("<Q", entry.nbytes) if entry.nbytes >= _FULL32 else b""
    offset = struct.pack("<Q", entry.offset) if entry.offset >= _FULL32 else b""
    # The packed size may be 0: it is not known yet where the header is written.
    packed = extra[12:20] if size and extra[12:20] == bytes(8) else size
    wide = size + packed + offset
    wide = wide and struct.pack("<2H", 1, len(wide)) + wide
    padding = extra[len(wide) :]
    filling = max(0, len(padding) - 4)
    padded = b"FB" + struct.pack("<H", min(filling, _FULL16)) + b"Z" * filling
    if extra[: len(wide)] != wide or padding not in (b"", padded):
        raise ValueError(f"{entry.name} has a header that torch.save does not write")
    return bool(wide)


def _inner_name(name: str, root: str) -> str:
    """A member's name without the archive's own; one that ``torch.save`` gives."""
    outer, _, inner = name.partition("/")
    key = inner.removeprefix(_STORAGE)
    is_storage = key != inner and key.isascii() and key.isdigit()
    if not root or outer != root or not (is_storage or inner in _SMALL or inner == _SERIAL):
        raise ValueError(f"torch.save writes no member {name[:200]!r}")
    return inner


def _check_contents(contents: dict[str, bytes]) -> None:
    for name in ("data.pkl", "version"):
        if name not in contents:
            raise ValueError(f"it has no {name}")
    if contents.get("byteorder", b"little") != b"little":
        raise ValueError("its byte order is not little-endian")
    if contents.get(".format_version", b"1") != b"1":
        raise ValueError("it is of an unknown format version")
    version = contents["version"].removesuffix(b"\n")
    if not (version.isdigit() and len(version) <= 2 and int(version) in _VERSIONS):
        raise ValueError("it is of an unknown version")
