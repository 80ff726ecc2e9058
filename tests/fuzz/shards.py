"""Mutations of ``.distcp`` files: bytes change, nobody says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.fuzz import stored
from tests.fuzz.case import Case, kind
from tests.fuzz.instead import put


def _shard(case: Case) -> Path:
    return case.chance.choice(sorted(case.victim.glob("*.distcp")))


def _flip(case: Case, path: Path, start: int, length: int) -> None:
    data = bytearray(path.read_bytes())
    if data and length:
        data[start + case.chance.randrange(length)] ^= 1 << case.chance.randrange(8)
    path.write_bytes(data)


@kind("shard: flip", silent=True)
def flip(case: Case) -> None:
    path = _shard(case)
    for _ in range(case.chance.randint(1, 3)):
        _flip(case, path, 0, path.stat().st_size)


@kind("shard: flip beside the data", silent=True)
def flip_frame(case: Case) -> None:
    """In the headers, the pickle or the directory of an entry: its first and last kilobyte."""
    info = case.chance.choice(list(stored.load(case.victim).storage_data.values()))
    part = min(1000, info.length)
    start = case.chance.choice((info.offset, info.offset + info.length - part))
    _flip(case, case.victim / info.relative_path, start, part)


@kind("shard: flip in a byte entry", silent=True)
def flip_object(case: Case) -> None:
    metadata = stored.load(case.victim)
    keys = set(stored.objects(metadata))
    infos = [info for index, info in metadata.storage_data.items() if index.fqn in keys]
    info = case.chance.choice(infos)
    _flip(case, case.victim / info.relative_path, info.offset, info.length)


@kind("shard: cut", silent=True)
def cut(case: Case) -> None:
    path = _shard(case)
    os.truncate(path, case.chance.randrange(path.stat().st_size))


@kind("shard: longer")
def longer(case: Case) -> None:
    with _shard(case).open("ab") as file:
        file.write(case.chance.randbytes(case.chance.randint(1, 5000)))


@kind("shard: zeros", silent=True)
def zeros(case: Case) -> None:
    path = _shard(case)
    data = bytearray(path.read_bytes())
    start = case.chance.randrange(len(data))
    length = case.chance.choice((16, 512, 4096, len(data)))
    data[start : start + length] = bytes(len(data[start : start + length]))
    path.write_bytes(data)


@kind("shard: a part of another", silent=True)
def mixed(case: Case) -> None:
    path, other = _shard(case), _shard(case)
    data, theirs = bytearray(path.read_bytes()), other.read_bytes()
    length = min(case.chance.choice((64, 4096)), len(data), len(theirs))
    start = case.chance.randrange(len(data) - length + 1)
    their = case.chance.randrange(len(theirs) - length + 1)
    data[start : start + length] = theirs[their : their + length]
    path.write_bytes(data)


@kind("shard: two exchanged", silent=True)
def exchanged(case: Case) -> None:
    one, other = case.chance.sample(sorted(case.victim.glob("*.distcp")), 2)
    one.rename(case.victim / "x")
    other.rename(one)
    (case.victim / "x").rename(other)


@kind("shard: of another checkpoint")
def of_another(case: Case) -> None:
    """A file of the other iteration: every byte is sound, and it is the wrong one."""
    path = _shard(case)
    (other,) = [p for p in case.run.glob("iter_*") if p != case.victim]
    shutil.copyfile(other / path.name, path)


@kind("shard: gone")
def gone(case: Case) -> None:
    _shard(case).unlink()


@kind("shard: no file")
def no_file(case: Case) -> None:
    path = _shard(case)
    path.unlink()
    put(path, case.chance.choice(("folder", "fifo", "loop", "dangling", "empty")))
