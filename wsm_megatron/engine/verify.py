"""Checking a checkpoint on disk: complete, readable, checksums, finite, provenance, sources."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.buffer import Buffer
from wsm_megatron.checkpoint.common import load_common
from wsm_megatron.checkpoint.layout import Layout, read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader, size_and_crc
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.damage import is_damaged
from wsm_megatron.engine.flat import find_flat_mains
from wsm_megatron.engine.plan import make_plan
from wsm_megatron.engine.provenance import read_provenance
from wsm_megatron.engine.recipe import Rule, Task
from wsm_megatron.engine.sources import read_common
from wsm_megatron.errors import MergeError
from wsm_megatron.kernels import reference

_TILE_ELEMENTS = 2**20
SAMPLE_ELEMENTS = 4096


@dataclass(frozen=True)
class VerifyReport:
    """What was checked. ``samples`` counts elements recomputed from the sources."""

    path: Path
    tensors: int
    objects: int
    bytes_read: int
    merged: bool
    samples: int = 0


def verify(
    path: Path, *, sources: bool = False, allow_nonfinite: bool = False, seed: int = 0
) -> VerifyReport:
    """Check a checkpoint from end to end.

    Args:
        path: an ``iter_XXXXXXX`` directory.
        sources: also recompute samples of every tensor from the sources that the provenance names,
            by a float64 reference of its own, and compare them bit for bit.
        allow_nonfinite: let NaN and Inf pass.
        seed: of the choice of samples.

    Raises:
        ValueError: unfinished, or ``sources`` without provenance.
        MergeError: what is wrong, where.
    """
    layout = read_layout(path)
    load_common(*read_common(path, layout))
    reader = CheckpointReader(layout)
    try:
        for box, key, data in _tensors(reader):
            if not allow_nonfinite and is_damaged(key, box, data):
                raise MergeError(f"{path}: {key} at {box.offsets} holds NaN or Inf")
        for entry in layout.objects.values():
            _check_object(layout, entry.key, reader.read_object(entry))
        provenance = read_provenance(path)
        if provenance is not None:
            _check_files(path, provenance)
        samples = _check_samples(reader, provenance, seed) if sources else 0
        return VerifyReport(
            path=path,
            tensors=len(layout.tensors),
            objects=len(layout.objects),
            bytes_read=reader.bytes_read,
            merged=provenance is not None,
            samples=samples,
        )
    finally:
        reader.close()


def _tensors(reader: CheckpointReader) -> Iterator[tuple[Box, str, torch.Tensor]]:
    """Every chunk's elements, piece by piece; settles each chunk's CRC-32."""
    for key, entry in reader.layout.tensors.items():
        for chunk in entry.chunks:
            box = Box(chunk.offsets, chunk.sizes)
            cover = reader.cover(key, box)
            for tile in box.split(_TILE_ELEMENTS):
                data = torch.empty(tile.numel, dtype=entry.dtype)
                cover.read(tile, Buffer(data))
                yield box, key, data
            cover.settle()


def _check_object(layout: Layout, key: str, data: bytes) -> None:
    """Objects are zip archives too (``torch.save``), with a CRC-32 for every record."""
    try:
        bad = zipfile.ZipFile(io.BytesIO(data)).testzip()
    except zipfile.BadZipFile as error:
        raise MergeError(f"{layout.path}: {key} is damaged: {error}") from error
    if bad is not None:
        raise MergeError(f"{layout.path}: {key} is damaged: CRC-32 of its record {bad}")


def _check_files(path: Path, provenance: dict[str, Any]) -> None:
    for name, expected in provenance["files"].items():
        size, crc = size_and_crc(path / name)
        if size != expected["bytes"] or f"{crc:08x}" != expected["crc32"]:
            raise MergeError(
                f"{path / name} has {size} bytes with CRC-32 {crc:08x}; the merge wrote "
                f"{expected['bytes']} with {expected['crc32']}"
            )


def _check_samples(reader: CheckpointReader, provenance: dict[str, Any] | None, seed: int) -> int:
    """Recompute a few boxes of every tensor; the number of elements compared."""
    if provenance is None:
        raise ValueError(f"{reader.layout.path}: no wsm_merge.json; not a checkpoint of this tool")
    source_readers = _open_sources(provenance)
    try:
        config = _config_of(provenance)
        layouts = [source.layout for source in source_readers]
        flat = find_flat_mains(layouts[-1], layouts[:-1]) if config.keeps_optimizer else None
        plan = make_plan(layouts, config, flat)
        chance = random.Random(seed)
        by_key: dict[str, list[Task]] = {}
        for task in plan.tasks:
            by_key.setdefault(task.recipe.key, []).append(task)
        return sum(
            _compare(
                reader, source_readers, provenance["coefficients"], chance.choice(tasks), chance
            )
            for tasks in by_key.values()
        )
    finally:
        for source in source_readers:
            source.close()


def _open_sources(provenance: dict[str, Any]) -> list[CheckpointReader]:
    readers = []
    for source in provenance["sources"]:
        path = Path(source["path"])
        if not path.is_dir():
            raise ValueError(f"{path}: the source is gone; verify without --sources")
        readers.append(CheckpointReader(read_layout(path)))
    return readers


def _config_of(provenance: dict[str, Any]) -> MergeConfig:
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in provenance["options"].items()
    }
    return MergeConfig(load=Path("sources"), save=Path("merged"), **options)


def _compare(
    merged: CheckpointReader,
    sources: Sequence[CheckpointReader],
    coefficients: Sequence[float],
    task: Task,
    chance: random.Random,
) -> int:
    box = chance.choice(list(task.box.split(SAMPLE_ELEMENTS)))
    expected = _recompute(task, sources, coefficients, box)
    for output, values in zip(task.recipe.outputs, expected, strict=True):
        stored = merged.read(output.key, task.part(output.key, box))
        if not torch.equal(stored.view(torch.uint8), values.view(torch.uint8)):
            raise MergeError(
                f"{merged.layout.path}: {output.key} at {box.offsets} is not the merge of its "
                "sources"
            )
    return box.numel * len(expected)


def _recompute(
    task: Task, sources: Sequence[CheckpointReader], coefficients: Sequence[float], box: Box
) -> list[torch.Tensor]:
    recipe = task.recipe
    key = recipe.inputs[0]
    box = task.part(key, box)
    if recipe.rule is Rule.COPY:
        return [sources[-1].read(key, box)]
    total = torch.zeros(0, dtype=torch.float64)
    for coefficient, source in zip(coefficients, sources, strict=True):
        product = source.read(key, box).double() * coefficient
        total = product if total.numel() == 0 else total + product
    first = reference.round_once(total, recipe.outputs[0].dtype)
    return [first, *(first.to(output.dtype) for output in recipe.outputs[1:])]
