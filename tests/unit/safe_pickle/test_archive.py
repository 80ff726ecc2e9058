"""The zip archive of ``torch.save``: what torch refuses, or reads as something else, is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.archives import Member, archive, saved
from tests.reference import RUNS
from wsm_megatron.checkpoint.container import locate
from wsm_megatron.safe_pickle.archive import check_archive, read_archive

PICKLE = b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s."
STORAGES = {"0": b"12345678", "1": b""}


def of_torch(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_what_torch_saves_is_read() -> None:
    tensor = torch.arange(6, dtype=torch.int32)
    data = of_torch({"a": tensor, "empty": torch.empty(0), "text": "x" * 5000})
    found = check_archive(data)
    with zipfile.ZipFile(io.BytesIO(data)) as other:
        assert found.pickle == other.read("archive/data.pkl")
    assert {key: member.nbytes for key, member in found.storages.items()} == {"0": 24, "1": 0}
    start = found.storages["0"].start
    assert data[start : start + 24] == tensor.numpy().tobytes()


@pytest.mark.parametrize("path", sorted(RUNS.glob("*/iter_0000008/common.pt")), ids=str)
def test_fixtures_are_read(path: Path) -> None:
    check_archive(path.read_bytes())


@pytest.mark.parametrize("second", [False, True])
def test_members_of_more_than_4_gib_are_read(tmp_path: Path, second: bool) -> None:
    large = torch.empty(2**32 + 100, dtype=torch.uint8)  # virtual memory, never touched
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():
        torch.save([large, torch.ones(3)] if second else large, path)
    with path.open("rb") as file:

        def read(start: int, length: int) -> bytes:
            file.seek(start)
            return file.read(length)

        found = read_archive(read, path.stat().st_size)
        assert found.storages["0"].nbytes == large.numel()
        if not second:
            assert locate(file).nbytes == large.numel()


def test_forged_archives_are_read_by_torch_where_nothing_is_forged() -> None:
    data = archive(saved(PICKLE, STORAGES))
    assert torch.load(io.BytesIO(data), weights_only=True) == {"a": 1}
    assert check_archive(data).pickle == PICKLE


def test_older_versions_lack_some_members() -> None:
    members = [m for m in saved(PICKLE) if m.name.endswith(("data.pkl", "version"))]
    data = archive(members)
    assert torch.load(io.BytesIO(data), weights_only=True) == {"a": 1}
    assert check_archive(data).pickle == PICKLE


@pytest.mark.parametrize(
    "name", ["data.pkl", "byteorder", "data/0", "version", ".data/serialization_id"]
)
def test_every_flipped_bit_is_noticed(name: str) -> None:
    """But for the CRC-32 of a member: it then fits no data, which is noticed as well."""
    data = archive(saved(PICKLE, STORAGES))
    position = data.index(f"archive/{name}".encode())
    check_archive(data)
    end = data.index(b"PK\x03\x04", position) if b"PK\x03\x04" in data[position:] else len(data)
    for place in range(position - 30, end):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError):
                check_archive(bytes(flipped))


def test_every_flipped_bit_of_a_real_entry_is_noticed() -> None:
    data = of_torch([torch.arange(5), "rng"])
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(ValueError):
            check_archive(bytes(flipped))


def test_every_truncation_is_noticed() -> None:
    data = of_torch([1, 2])
    for length in range(len(data)):
        with pytest.raises(ValueError):
            check_archive(data[:length])
    for more in (b"\x00", b"PK\x05\x06", bytes(22)):
        with pytest.raises(ValueError):
            check_archive(data + more)
        with pytest.raises(ValueError):
            check_archive(more + data)


def changed(name: str, **fields: Any) -> list[Member]:
    members = saved(PICKLE, STORAGES)
    for member in members:
        if member.name == f"archive/{name}":
            for field, value in fields.items():
                setattr(member, field, value)
    return members


def twice(name: str, data: bytes, first: bool) -> list[Member]:
    members = saved(PICKLE, STORAGES)
    members.insert(0 if first else len(members), Member(name, data))
    return members


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (twice("archive/data.pkl", b"N.", True), "twice"),
        (twice("archive/data.pkl", b"N.", False), "twice"),
        (twice("archive/data/0", b"87654321", True), "twice"),
        (twice("archive/DATA.PKL", b"N.", True), "no member"),  # torch looks without case
        (twice("archive/Data/0", b"87654321", True), "no member"),
        (twice("other/data.pkl", b"N.", False), "no member"),
        (twice("archive/constants.pkl", b"N.", False), "no member"),  # of TorchScript
        (twice("archive/.data/version", b"9", False), "no member"),
        (twice("archive/data/1/2", b"", False), "no member"),
        (twice("archive/", b"", False), "no member"),
        (changed("byteorder", data=b"big"), "byte order"),
        (changed("version", data=b"11\n"), "version"),
        (changed("version", data=b"x"), "version"),
        (changed(".format_version", data=b"2"), "format version"),
        (changed("data.pkl", entry={"crc": 5}), "CRC-32"),
        (changed("data/0", entry={"crc": 5}), "CRC-32"),
        (changed("data/0", entry={"size": 4, "packed": 4}), "size or CRC-32"),
        (changed("data/0", entry={"flags": 0x809}), "encrypted"),
        (changed("data/0", entry={"flags": 0x809}, local={"flags": 0x809}), "encrypted"),
        (changed("data/0", entry={"method": 8}, local={"method": 8}), "compressed"),
        (changed("data/0", entry={"method": 99}, local={"method": 99}), "unknown kind"),
        (changed("data/0", entry={"packed": 4}), "compressed"),
        (changed("data/0", entry={"disk": 1}), "directory is damaged"),
        (changed("data/0", entry={"external": 0x10}), "directory is damaged"),  # a folder's bit
        (changed("data/0", entry={"made_by": 0x314}), "directory is damaged"),
        (changed("data/0", local={"crc": 1}), "another header"),
        (changed("data/0", local={"size": 8}), "another header"),
        (changed("data/0", local={"flags": 0x800}), "another header"),
        (changed("data/0", local={"time": 1}), "another header"),
        (changed("data/0", local_name="archive/data/9"), "another header"),
        (changed("data/0", descriptor=b""), "size or CRC-32"),
        (changed("data/0", extra=b"FB\x04\x00ZZZA"), "torch.save does not write"),
        (changed("data/0", extra=b"XX\x04\x00ZZZZ"), "torch.save does not write"),
        (changed("data/0", after=b"garbage"), "where the member before it ends"),
        (changed(".data/serialization_id", after=b"garbage"), "bytes between"),
        (changed("data/0", entry={"offset": 0}), "where the member before it ends"),
        ([m for m in saved(PICKLE) if not m.name.endswith("version")], "no version"),
        ([m for m in saved(PICKLE) if not m.name.endswith("pkl")], "no data.pkl"),
        ([], "does not fit"),
    ],
)
def test_forged_members_are_refused(members: list[Member], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_archive(archive(members))


@pytest.mark.parametrize(
    "end",
    [
        {"disk": 1},
        {"start_disk": 1},
        {"here": 3},
        {"count": 3},
        {"count": 3, "here": 3},
        {"count": 0xFFFF, "here": 0xFFFF},
        {"size": 5},
        {"start": 5},
        {"start": 0xFFFFFFFF},
        {"comment": 1},
    ],
    ids=str,
)
def test_forged_ends_are_refused(end: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="end|directory"):
        check_archive(archive(saved(PICKLE), **end))


@pytest.mark.parametrize(
    "change",
    [
        lambda wide: struct.pack_into("<Q", wide, 24, 9),
        lambda wide: struct.pack_into("<Q", wide, 40, 9),
        lambda wide: struct.pack_into("<Q", wide, 48, 9),
        lambda wide: struct.pack_into("<L", wide, 56 + 16, 2),
        lambda wide: struct.pack_into("<Q", wide, 56 + 8, 0),
    ],
)
def test_two_ends_that_contradict_each_other_are_refused(
    change: Callable[[bytearray], None],
) -> None:
    data = of_torch([1])
    wide = bytearray(data[-98:-22])
    assert wide[:4] == b"PK\x06\x06"
    change(wide)
    with pytest.raises(ValueError, match="end"):
        check_archive(data[:-98] + wide + data[-22:])
