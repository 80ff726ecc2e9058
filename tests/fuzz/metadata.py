"""Mutations of ``.metadata``: damage, and lies about what is where."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

from tests.fuzz import stored
from tests.fuzz.case import Case, kind
from tests.fuzz.pickles import bomb, hostile


@kind("metadata: flip")
def flip(case: Case) -> None:
    path = case.victim / ".metadata"
    data = bytearray(path.read_bytes())
    for _ in range(case.chance.randint(1, 3)):
        data[case.chance.randrange(len(data))] ^= 1 << case.chance.randrange(8)
    path.write_bytes(data)


@kind("metadata: other opcodes")
def opcodes(case: Case) -> None:
    path = case.victim / ".metadata"
    data = bytearray(path.read_bytes())
    for _ in range(case.chance.randint(1, 3)):
        data[case.chance.randrange(len(data))] = case.chance.choice(
            b"()]}NKXhjqr\x94\x85\x86tuaesbR.0"
        )
    path.write_bytes(data)


@kind("metadata: cut")
def cut(case: Case) -> None:
    path = case.victim / ".metadata"
    os.truncate(path, case.chance.randrange(path.stat().st_size))


@kind("metadata: bomb")
def bombs(case: Case) -> None:
    (case.victim / ".metadata").write_bytes(bomb(case.chance))


@kind("metadata: hostile global")
def globals_(case: Case) -> None:
    attack = hostile(case.chance)
    if case.chance.random() < 0.5:
        (case.victim / ".metadata").write_bytes(pickle.dumps(attack))
        return
    stored.change(case.victim, lambda m: setattr(m, "planner_data", {"x": [attack]}))


def _tensor(case: Case, metadata: Metadata) -> tuple[str, Any]:
    key = case.chance.choice(stored.tensors(metadata))
    return key, metadata.state_dict_metadata[key]


def _index(case: Case, metadata: Metadata) -> tuple[MetadataIndex, Any]:
    return case.chance.choice(list(metadata.storage_data.items()))


@kind("metadata: two chunks exchanged")
def exchanged(case: Case) -> None:
    """Of one shape and dtype, where there are such: sound containers in the wrong places."""

    def change(metadata: Metadata) -> None:
        tensors = stored.tensors(metadata)
        chunks: dict[Any, list[MetadataIndex]] = {}
        for key in tensors:
            entry: Any = metadata.state_dict_metadata[key]
            for chunk in entry.chunks:
                same = (chunk.sizes, entry.properties.dtype)
                chunks.setdefault(same, []).append(MetadataIndex(key, chunk.offsets))
        groups = [group for group in chunks.values() if len(group) > 1]
        if groups and case.chance.random() < 0.8:
            one, other = case.chance.sample(case.chance.choice(groups), 2)
        else:
            one, other = case.chance.sample(list(metadata.storage_data), 2)
        places = metadata.storage_data
        places[one], places[other] = places[other], places[one]

    stored.change(case.victim, change)


@kind("metadata: a chunk missing")
def missing(case: Case) -> None:
    def change(metadata: Metadata) -> None:
        key, entry = _tensor(case, metadata)
        what = case.chance.choice(("chunk", "storage", "both", "all", "entry"))
        chunk = case.chance.choice(entry.chunks)
        if what in ("chunk", "both"):
            entry.chunks.remove(chunk)
        if what in ("storage", "both"):
            del metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        if what == "all":
            entry.chunks.clear()
        if what == "entry":
            del metadata.state_dict_metadata[key]

    stored.change(case.victim, change)


@kind("metadata: a chunk twice")
def twice(case: Case) -> None:
    def change(metadata: Metadata) -> None:
        _, entry = _tensor(case, metadata)
        chunk = case.chance.choice(entry.chunks)
        other = case.chance.choice(entry.chunks)
        entry.chunks.append(ChunkStorageMetadata(chunk.offsets, chunk.sizes))
        if case.chance.random() < 0.5 and other is not chunk:
            entry.chunks.remove(other)

    stored.change(case.victim, change)


@kind("metadata: a chunk elsewhere")
def elsewhere(case: Case) -> None:
    """Moved along an axis: it overlaps others, and leaves a hole of its size."""

    def change(metadata: Metadata) -> None:
        key, entry = _tensor(case, metadata)
        chunk = case.chance.choice(entry.chunks)
        if not chunk.offsets:
            return
        axis = case.chance.randrange(len(chunk.offsets))
        steps = (1, -1, 2, chunk.sizes[axis], -chunk.sizes[axis], entry.size[axis], 2**40)
        moved = list(chunk.offsets)
        moved[axis] += case.chance.choice(steps)
        index = MetadataIndex(key, chunk.offsets)
        chunk.offsets = torch.Size(moved)
        metadata.storage_data[MetadataIndex(key, chunk.offsets)] = metadata.storage_data.pop(index)

    stored.change(case.victim, change)


@kind("metadata: another size")
def sizes(case: Case) -> None:
    def change(metadata: Metadata) -> None:
        _, entry = _tensor(case, metadata)
        one = case.chance.choice([entry, *entry.chunks])
        name = "size" if one is entry else "sizes"
        size = list(getattr(one, name))
        if not size:
            return
        axis = case.chance.randrange(len(size))
        new = (0, 1, size[axis] + 1, size[axis] - 1, 2 * size[axis], -1, 2**31, 2**62)
        size[axis] = case.chance.choice(new)
        if case.chance.random() < 0.2:
            case.chance.shuffle(size)
        if case.chance.random() < 0.1:
            size.append(1)
        setattr(one, name, torch.Size(size))

    stored.change(case.victim, change)


@kind("metadata: another dtype")
def dtype(case: Case) -> None:
    def change(metadata: Metadata) -> None:
        _, entry = _tensor(case, metadata)
        names = ("float16", "float32", "bfloat16", "float64", "int64", "int16", "uint8", "bool")
        names += ("complex64", "float8_e4m3fn", "qint8")
        entry.properties.dtype = getattr(torch, case.chance.choice(names))

    stored.change(case.victim, change)


@kind("metadata: another place")
def place(case: Case) -> None:
    def change(metadata: Metadata) -> None:
        _, info = _index(case, metadata)
        _, other = _index(case, metadata)
        numbers = (0, 1, -1, info.offset + 1, info.offset - 1, other.offset, 2**31, 2**63, 2**70)
        what = case.chance.choice(("offset", "length", "both", "file"))
        if what in ("offset", "both"):
            info.offset = case.chance.choice(numbers)
        if what in ("length", "both"):
            info.length = case.chance.choice(
                (*numbers, info.length + 1, info.length - 1, other.length)
            )
        if what == "file":
            info.relative_path = other.relative_path

    stored.change(case.victim, change)


@kind("metadata: another file name")
def name(case: Case) -> None:
    names = (
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "x" * 300,
        "a\0b",
        "a\nb",
        "\udc80",
        "common.pt",
        ".metadata",
    )

    def change(metadata: Metadata) -> None:
        _index(case, metadata)[1].relative_path = case.chance.choice(names)

    stored.change(case.victim, change)


@kind("metadata: another key")
def key(case: Case) -> None:
    names = (
        "",
        "x",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "k" * 10**5,
        "optimizer",
        "common_state/shard_0_1",
    )

    def change(metadata: Metadata) -> None:
        old = case.chance.choice(list(metadata.state_dict_metadata))
        new = case.chance.choice(
            (*names, old + ".", case.chance.choice(list(metadata.state_dict_metadata)))
        )
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
        for index in [i for i in metadata.storage_data if i.fqn == old]:
            info = metadata.storage_data.pop(index)
            metadata.storage_data[MetadataIndex(new, index.offset)] = info

    stored.change(case.victim, change)


@kind("metadata: other types")
def types(case: Case) -> None:
    values = (None, 3, "x", [], {}, (), 2.5, b"x", [1, 2], torch.Size([2]), torch.float32, {"a": 1})

    def change(metadata: Metadata) -> None:
        value = case.chance.choice(values)
        _, entry = _tensor(case, metadata)
        _, info = _index(case, metadata)
        chunk = case.chance.choice(entry.chunks)
        one, attribute = case.chance.choice(
            [
                (metadata, "state_dict_metadata"),
                (metadata, "storage_data"),
                (metadata, "mcore_data"),
                (entry, "properties"),
                (entry, "size"),
                (entry, "chunks"),
                (chunk, "offsets"),
                (chunk, "sizes"),
                (info, "relative_path"),
                (info, "offset"),
                (info, "length"),
                (info, "transform_descriptors"),
            ]
        )
        setattr(one, attribute, value)

    stored.change(case.victim, change)


@kind("metadata: bytes for a tensor")
def other_entry(case: Case) -> None:
    def change(metadata: Metadata) -> None:
        key, entry = _tensor(case, metadata)
        if case.chance.random() < 0.5:
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            return
        metadata.state_dict_metadata[case.chance.choice(stored.objects(metadata))] = entry

    stored.change(case.victim, change)
