"""What a checkpoint holds and where: its ``.metadata`` as entries made of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from operator import gt
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wsm_megatron.checkpoint.foreign_formats import NO_FORMAT, kind_of, kind_of_format
from wsm_megatron.checkpoint.formats import (
    COMMON_FILE,
    COMMON_KEY,
    MARKER_FILE,
    METADATA_FILE,
    TORCH_DIST_016,
    CheckpointFormat,
    KeyPath,
    finishing_file,
    format_of,
)
from wsm_megatron.checkpoint.keys import Role, model_of, state_roles
from wsm_megatron.checkpoint.tiling import tiling_fault
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.safe_pickle.metadata import key_paths, load_metadata
from wsm_megatron.safe_pickle.metadata_classes import Metadata, TensorStorageMetadata
from wsm_megatron.storage.json_file import read_json

__all__ = ["COMMON_FILE", "COMMON_KEY", "MARKER_FILE", "METADATA_FILE"]  # of formats

PROVENANCE_FILE = "wsm_merge.json"
"""How a merged checkpoint was made, and all of its files."""


class Location(NamedTuple):
    """A byte range of one file of a checkpoint."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A region of a global tensor, stored row-major in one container."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    location: Location

    @property
    def numel(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True)
class TensorEntry:
    """A global tensor; its chunks in the order of their offsets, not in the checkpoint's."""

    key: str
    role: Role
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return sum(chunk.numel for chunk in self.chunks) * self.dtype.itemsize


@dataclass(frozen=True)
class ObjectEntry:
    """Bytes under a key: whatever Megatron pickled there."""

    key: str
    role: Role
    location: Location

    @property
    def nbytes(self) -> int:
        return self.location.length


@dataclass(frozen=True)
class Layout:
    """One checkpoint's entries.

    Attributes:
        path: the ``iter_XXXXXXX`` directory.
        tensors: global tensors by key.
        objects: byte entries by key.
        marker: contents of ``metadata.json``; empty where the format has none.
        mcore_data: what Megatron attached to the metadata (reformulated shapes), passed on as is.
        format: what it is of.
        stored: the keys on disk, of entries that have another one here.
        paths: by key on disk, where in Megatron's nested state dict an entry is, as torch keeps it.
    """

    path: Path
    tensors: dict[str, TensorEntry]
    objects: dict[str, ObjectEntry]
    marker: dict[str, Any]
    mcore_data: dict[str, Any] = field(default_factory=dict)
    format: CheckpointFormat = TORCH_DIST_016
    stored: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, KeyPath] = field(default_factory=dict)

    @property
    def common_entry(self) -> ObjectEntry | None:
        """The common state's entry inside the distcp files (Megatron 0.19 and later), if there."""
        return self.objects.get(COMMON_KEY)

    @property
    def entries(self) -> dict[str, TensorEntry | ObjectEntry]:
        """Tensors and objects together."""
        return {**self.tensors, **self.objects}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> dict[str, int]:
        """The ``.distcp`` files, each with the size that it must have at least."""
        ends: dict[str, int] = {}
        for file, offset, length in self.locations():
            ends[file] = max(ends.get(file, 0), offset + length)
        return ends

    def stored_key(self, key: str) -> str:
        """The key on disk of an entry."""
        return self.stored.get(key, key)

    def path_of(self, key: str) -> KeyPath:
        """Where in Megatron's nested state dict an entry is."""
        stored = self.stored_key(key)
        return self.paths.get(stored) or tuple(stored.split(".", 1))

    def renamed(self, names: Mapping[str, str]) -> Layout:
        """The same layout with other keys for some tensors; those on disk stay."""
        tensors = {}
        for key, entry in self.tensors.items():
            name = names.get(key, key)
            model = self.tensors.get(model_of(name) or "")
            shape = None if model is None else model.shape
            role = self.format.tensor_role(name, entry.dtype, entry.shape, shape)
            tensors[name] = entry if name == key else replace(entry, key=name, role=role)
        stored = {names.get(key, key): on_disk for key, on_disk in self.stored.items()}
        stored |= {name: self.stored_key(key) for key, name in names.items()}
        return replace(self, tensors=tensors, stored=stored)

    def named_like(self, other: Layout) -> Layout:
        """The same layout with the keys that another one has for what both store alike."""
        own = {self.stored_key(key): key for key in self.tensors}
        return self.renamed({own[at]: key for key, at in other.stored.items() if at in own})

    def locations(self) -> list[Location]:
        """Where all entries lie; chunks without elements, which several ranks save, once each."""
        chunks = [chunk for entry in self.tensors.values() for chunk in entry.chunks]
        return [
            *(entry.location for entry in self.objects.values()),
            *(chunk.location for chunk in chunks if 0 not in chunk.sizes),
            *{chunk.location for chunk in chunks if 0 in chunk.sizes},
        ]


def is_complete(path: Path) -> bool:
    """Whether Megatron finished this checkpoint: the file is there that its format writes last."""
    return finishing_file(path) is not None


def read_layout(path: Path, whole: bool = True) -> Layout:
    """Read a checkpoint's layout; no tensor is read.

    Args:
        whole: the files that it names must be there; without, they may be on other nodes.

    Raises:
        UsageError: the directory is not a finished checkpoint of a known format.
        MergeError: ``.metadata`` is damaged or names files that are missing or too short; a
            tensor's chunks do not tile it, or two entries lie in the same bytes.
    """
    marker = _read_marker(path)
    if not (path / METADATA_FILE).is_file():
        raise MergeError(f"{path}: .metadata is missing; the checkpoint is damaged, leave it out")
    metadata = load_metadata(path / METADATA_FILE)
    locations = _locations(path, metadata)
    found = metadata.state_dict_metadata
    form = format_of(found, marker is not None)
    if form is None:
        raise UsageError(f"{path} is {NO_FORMAT.what}: {NO_FORMAT.way_out}")
    keys = {stored: form.key(stored, found) for stored in found}
    if len(set(keys.values())) != len(keys):
        raise MergeError(f"{path}: two entries of .metadata have one meaning; it is damaged")
    tensors, objects = {}, {}
    for stored, value in found.items():
        key = keys[stored]
        if isinstance(value, TensorStorageMetadata):
            model = found.get(model_of(key) or "")
            shape = tuple(model.size) if isinstance(model, TensorStorageMetadata) else None
            tensors[key] = _tensor_entry(path, stored, value, locations)
            role = form.tensor_role(key, tensors[key].dtype, tensors[key].shape, shape)
            tensors[key] = replace(tensors[key], key=key, role=role)
        else:
            location = _location_of(path, stored, locations, None)
            objects[key] = ObjectEntry(key, form.object_role(key), location)
    if marker is not None:  # torch_dist, where any optimizer may have any state
        roles = state_roles({key: (entry.dtype, entry.shape) for key, entry in tensors.items()})
        tensors |= {key: replace(tensors[key], role=role) for key, role in roles.items()}
    layout = Layout(
        path,
        tensors,
        objects,
        marker or {},
        metadata.mcore_data,
        form,
        {key: stored for stored, key in keys.items() if stored != key},
        key_paths(path / METADATA_FILE, metadata) if marker is None else {},
    )
    _check_tiling(layout)
    ends = _ends(layout)
    if whole:
        _check_files(path, ends)
    return layout


def _read_marker(path: Path) -> dict[str, Any] | None:
    """``metadata.json`` of a finished checkpoint; None where its format has none."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such checkpoint directory")
    finished_by = finishing_file(path)
    if finished_by is None:
        what, way_out = kind_of(path)
        raise UsageError(f"{path} is {what}: {way_out}")
    if finished_by != MARKER_FILE:
        return None
    marker = read_json(path / MARKER_FILE)
    kind = kind_of_format(marker.get("sharded_backend") if isinstance(marker, dict) else None)
    if kind is not None:
        raise UsageError(f"{path} is {kind.what}: {kind.way_out}")
    return marker


def _locations(path: Path, metadata: Metadata) -> dict[tuple, Location]:
    locations: dict[tuple, Location] = {}
    assert metadata.storage_data is not None
    for index, info in metadata.storage_data.items():
        if info.transform_descriptors:
            raise UsageError(f"{path}: entry {index.fqn!r} is compressed or transformed on disk")
        if info.relative_path in ("", ".", "..") or "/" in info.relative_path:
            raise MergeError(f"{path}: entry {index.fqn!r} points outside the checkpoint")
        if info.offset < 0 or info.length < 0:
            raise MergeError(f"{path}: entry {index.fqn!r} lies before the beginning of its file")
        location = Location(info.relative_path, info.offset, info.length)
        locations[index.fqn, index.offset] = location
    return locations


def _check_tiling(layout: Layout) -> None:
    """Every element of every tensor is in one chunk."""
    for key, entry in layout.tensors.items():
        fault = tiling_fault(entry.shape, tuple([chunk[:2] for chunk in entry.chunks]))
        if fault is not None:
            raise MergeError(
                f"{layout.path}: {key} {entry.shape} is not whole: {fault}; .metadata is damaged, "
                "restore it or leave the checkpoint out"
            )


def _ends(layout: Layout) -> dict[str, int]:
    """Where the entries of each file end.

    Raises:
        MergeError: two share bytes. Torch stores what is replicated once.
    """
    places: dict[str, tuple[list[int], list[int]]] = {}
    for file, offset, length in layout.locations():
        found = places.get(file)
        if found is None:
            found = places[file] = [], []
        found[0].append(offset)
        found[1].append(offset + length)
    for file, (starts, ends) in places.items():
        starts.sort()
        ends.sort()
        if any(map(gt, ends, starts[1:])):
            raise MergeError(f"{layout.path}: {_shared_bytes(layout, file)}")
    return {file: ends[-1] for file, (_, ends) in places.items()}


def _shared_bytes(layout: Layout, file: str) -> str:
    """What is wrong with a file of which two entries share bytes."""
    keys: dict[Location, list[str]] = {}
    for key, entry in layout.objects.items():
        keys.setdefault(entry.location, []).append(key)
    for key, tensor in layout.tensors.items():
        for chunk in tensor.chunks:
            keys.setdefault(chunk.location, []).append(key)
    for one, other in pairwise(sorted(at for at in layout.locations() if at.file == file)):
        if other.offset < one.offset + one.length:
            break
    return (
        f"{keys[one][0]} and {keys[other][-1]} lie in the same bytes of {file} (from "
        f"{other.offset} on); .metadata is damaged, restore it or leave the checkpoint out"
    )


def _check_files(path: Path, ends: dict[str, int]) -> None:
    for file, end in sorted(ends.items()):
        if not (path / file).is_file():
            raise MergeError(
                f"{path}: file {file} is missing; the checkpoint is damaged, leave it out. Where "
                "each node keeps the files of its own ranks, start a rank on every node with "
                "--node-local"
            )
        check_size(path, file, (path / file).stat().st_size, end)


def check_size(path: Path, file: str, size: int, end: int) -> None:
    """Raise ``MergeError`` where a checkpoint's file is shorter than its ``.metadata`` needs."""
    if size < end:
        raise MergeError(
            f"{path}: file {file} is truncated ({size} bytes where .metadata needs {end}); "
            "restore it or leave the checkpoint out"
        )


def _location_of(
    path: Path, key: str, locations: dict[tuple, Location], offsets: tuple[int, ...] | None
) -> Location:
    try:
        return locations[key, offsets]
    except KeyError:
        raise MergeError(f"{path}: .metadata has no storage for {key!r}; it is damaged") from None


def _tensor_entry(
    path: Path, key: str, value: TensorStorageMetadata, locations: dict
) -> TensorEntry:
    chunks = []
    for chunk in value.chunks:
        offsets, sizes = _one(tuple(chunk.offsets)), _one(tuple(chunk.sizes))
        chunks.append(Chunk(offsets, sizes, _location_of(path, key, locations, offsets)))
    chunks.sort(key=lambda chunk: chunk.offsets)
    dtype = value.properties.dtype
    return TensorEntry(key, Role.UNKNOWN, dtype, tuple(value.size), tuple(chunks))


@lru_cache(maxsize=2**18)
def _one(place: tuple[int, ...]) -> tuple[int, ...]:
    """The same tuple for equal ones: checkpoints of a run have the same chunks, 10^5 of them."""
    return place
