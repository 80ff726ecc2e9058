"""Small real runs for tests, and ways to change or damage copies of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.reference import RUNS, load_tensors
from wsm_megatron.checkpoint.common_state import load_common
from wsm_megatron.checkpoint.formats import COMMON_KEY, TORCH_DIST_016, TORCH_DIST_019
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.metadata_writer import write_metadata
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.writer import CheckpointFile, Item, file_name, place
from wsm_megatron.storage.buffer import Buffer

DENSE = "mcore0.16-dense-dp2-noopt"
FP32_PARAM = "mcore0.16-dense-tp2-fp32param"
FLAT = "mcore0.16-dense-dp2-dp_reshardable"
FULLY = "mcore0.16-dense-pp2-fully_reshardable"
WRONG_MAINS = "mcore0.16-dense-dp2-fully_reshardable-wrongmains"
MOE = "mcore0.16-moe-ep2-dp_reshardable"
MAIN = "main-dense-dp2-dp_reshardable"
ALL = (DENSE, FP32_PARAM, FLAT, FULLY, WRONG_MAINS, MOE, MAIN)
WITH_OPTIMIZER = (FP32_PARAM, FLAT, FULLY, MOE, MAIN)
ITERATIONS = (2, 4, 6, 8)


def checkpoint(run: Path | str, iteration: int) -> Path:
    return RUNS / run / f"iter_{iteration:07d}" if isinstance(run, str) else _path(run, iteration)


def _path(run: Path, iteration: int) -> Path:
    return run / f"iter_{iteration:07d}"


def copy_run(name: str, to: Path) -> Path:
    """A copy of a run that a test may change."""
    shutil.copytree(RUNS / name, to)
    return to


def restate(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let ``change`` edit a checkpoint's common state, which must be in ``common.pt``."""
    state = load_common((path / "common.pt").read_bytes(), str(path))
    change(state)
    (path / "common.pt").write_bytes(dump_common(state))


def dump_common(state: Mapping[str, Any], *, in_distcp: bool = False) -> bytes:
    """A common state as ``common.pt`` or, ``in_distcp``, as Megatron 0.19's entry."""
    if in_distcp:
        return TORCH_DIST_019.store(state).entries[COMMON_KEY]
    stored = TORCH_DIST_016.store(state).file
    assert stored is not None
    return stored


def rewrite(
    path: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    grid: Callable[[str, tuple[int, ...]], list[Region]] | None = None,
    reverse: bool = False,
    rename: Callable[[str], str] = str,
    more: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint's tensors anew: other values, another grid, order, keys, more of them."""
    layout, tensors = read_layout(path), load_tensors(path)
    reader = CheckpointReader(layout)
    blobs = {key: reader.read_object(entry) for key, entry in layout.objects.items()}
    reader.close()
    if change:
        tensors = {key: change(key, tensor) for key, tensor in tensors.items()}
    tensors |= more or {}
    items = [Item(key, nbytes=len(blob)) for key, blob in blobs.items()]
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        entry = layout.tensors.get(key)
        regions = [Region(c.offsets, c.sizes) for c in entry.chunks] if entry else whole(key, shape)
        regions = grid(key, shape) if grid else regions
        items += [Item(rename(key), region, tensor.dtype, shape) for region in regions]
    tensors = {rename(key): tensor for key, tensor in tensors.items()}
    if reverse:
        items.reverse()
    for old in path.glob("*.distcp"):
        old.unlink()
    (path / ".metadata").unlink()
    placed = place(items, 0)
    file = CheckpointFile(path / file_name(0))
    for one in placed:
        if one.item.region is None:
            file.write_bytes(one, blobs[one.item.key])
            continue
        region = one.item.region
        where = tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))
        chunk = file.chunk(one)
        chunk.append(Buffer(tensors[one.item.key][where].contiguous().view(-1)))
        chunk.finish()
    file.close()
    write_metadata(path, placed, {})


def whole(key: str, shape: tuple[int, ...]) -> list[Region]:
    """A grid of one chunk."""
    return [Region((0,) * len(shape), shape)]


def split_axis(axis: int, parts: int) -> Callable[[str, tuple[int, ...]], list[Region]]:
    """A grid that cuts every tensor into ``parts`` along one axis, as TP or PP would."""

    def grid(key: str, shape: tuple[int, ...]) -> list[Region]:
        along = min(axis, len(shape) - 1)
        step = -(-shape[along] // parts)
        regions = []
        for start in range(0, shape[along], step):
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[along], sizes[along] = start, min(step, shape[along] - start)
            regions.append(Region(tuple(offsets), tuple(sizes)))
        return regions

    return grid


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
