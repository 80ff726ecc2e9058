"""Archives as ``torch.save`` lays them out, and forged ones: any field of any header can be set."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_FIELDS = ("version", "flags", "method", "time", "date", "crc", "packed", "size")
_OURS: Mapping[str, int] = dict(made_by=0, disk=0, internal=0, external=0, comment_bytes=0)


@dataclass
class Member:
    """A member; ``local`` and ``entry`` set fields of its header and of its directory entry."""

    name: str
    data: bytes
    local: dict[str, int] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    local_name: str | None = None
    extra: bytes | None = None
    descriptor: bytes | None = None
    after: bytes = b""


def saved(pickled: bytes, storages: Mapping[str, bytes] | None = None) -> list[Member]:
    """The members that ``torch.save`` writes around a pickle and its storages."""
    return [
        Member("archive/data.pkl", pickled),
        Member("archive/.format_version", b"1"),
        Member("archive/.storage_alignment", b"64"),
        Member("archive/byteorder", b"little"),
        *(Member(f"archive/data/{key}", data) for key, data in (storages or {}).items()),
        Member("archive/version", b"3\n"),
        Member("archive/.data/serialization_id", b"0" * 40),
    ]


def archive(members: Iterable[Member], **end: int) -> bytes:
    """Members end to end, their directory and its end; ``end`` sets fields of the end."""
    body, directory, count = bytearray(), bytearray(), 0
    for member in members:
        count += 1
        crc, size, name = zlib.crc32(member.data), len(member.data), member.name.encode()
        known = dict(
            version=0, flags=0x808, method=0, time=0, date=0, crc=crc, packed=size, size=size
        )
        entry = {**known, **_OURS, "offset": len(body), **member.entry}
        local = {**known, "crc": 0, "packed": 0, "size": 0, **member.local}
        local_name = name if member.local_name is None else member.local_name.encode()
        padding = -(len(body) + 34 + len(local_name)) % 64
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        extra = extra if member.extra is None else member.extra
        body += b"PK\x03\x04" + struct.pack("<5H3L", *(local[f] for f in _FIELDS))
        body += struct.pack("<2H", len(local_name), len(extra)) + local_name + extra + member.data
        described = b"PK\x07\x08" + struct.pack("<3L", crc, size, size)
        body += described if member.descriptor is None else member.descriptor
        body += member.after
        directory += b"PK\x01\x02" + struct.pack("<H", entry["made_by"])
        directory += struct.pack("<5H3L", *(entry[f] for f in _FIELDS))
        directory += struct.pack("<3H", len(name), len(entry.get("extra", b"")), 0)
        directory += struct.pack(
            "<2HLL", *(entry[f] for f in ("disk", "internal", "external", "offset"))
        )
        directory += name + entry.get("extra", b"")
    ends = dict(disk=0, start_disk=0, here=count, count=count, size=len(directory), start=len(body))
    return bytes(body + directory) + _end({**ends, "comment": 0, **end})


def _end(fields: dict[str, int]) -> bytes:
    names = ("disk", "start_disk", "here", "count", "size", "start", "comment")
    return b"PK\x05\x06" + struct.pack("<4H2LH", *(fields[name] for name in names))
