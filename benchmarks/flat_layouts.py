"""Checkpoints of very large models with flat buckets (``dp_reshardable``), without their bytes.

Layouts are what Megatron would save: params of each model-parallel rank in buckets, from multiples
of 64 elements, cut for the data-parallel ranks. Files are sparse: of each model chunk and main
param there are the container and the first elements; the rest is a hole and reads as zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.writer import Item, Placed, file_name, frame, place

REAL = 64
"""Elements of a chunk that are written."""


@dataclass(frozen=True)
class Param:
    """A param of one rank: model chunks that follow each other in it, and its number."""

    number: int
    chunks: tuple[Item, ...]

    @property
    def numel(self) -> int:
        return sum(item.region.numel for item in self.chunks if item.region)


@dataclass(frozen=True)
class Group:
    """The params of one model-parallel rank that one optimizer shards over ``dp`` ranks."""

    prefix: str
    params: list[Param]
    dp: int
    bucket_elements: int


def dense_70b() -> list[Group]:
    """80 layers of 8192, TP8, PP4, DP8: 5,120 chunks of weights and biases, 61 buckets a rank."""
    tp, pp, layers, hidden, inner, qkv = 8, 4, 80, 8192, 28672, 10240
    tensors = {  # rows of a TP rank, columns, chunks a param
        "mlp.linear_fc2.weight": (hidden, inner // tp, 1),
        "mlp.linear_fc1.weight": (2 * inner // tp, hidden, 2),
        "mlp.linear_fc1.bias": (2 * inner // tp, 1, 2),
        "self_attention.linear_qkv.weight": (qkv // tp, hidden, 1),
        "self_attention.linear_qkv.bias": (qkv // tp, 1, 1),
        "self_attention.linear_proj.weight": (hidden, hidden // tp, 1),
    }
    norms = ("mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight")
    groups, number = [], iter(range(10**9))
    shared = {(name, layer): next(number) for name in norms for layer in range(layers)}
    for stage in range(pp):
        for rank in range(tp):
            params = []
            for layer in reversed(range(stage * layers // pp, (stage + 1) * layers // pp)):
                for name, (rows, columns, parts) in tensors.items():
                    shape = (layers, tp * parts, rows // parts, columns)
                    chunks = _chunks(name, shape, [(layer, rank * parts + i) for i in range(parts)])
                    params.append(Param(next(number), chunks))
                for name in norms:
                    chunks = _chunks(name, (layers, 1, hidden, 1), [(layer, 0)])
                    params.append(Param(shared[name, layer], chunks))
            name = f"optimizer.distributed.dp_group_idx_{stage * tp + rank}"
            groups.append(Group(name, params, 8, 10_000_000))
    return groups


def moe_256() -> list[Group]:
    """58 layers of 256 experts, EP64, PP16, expert DP2: 44,544 chunks of experts."""
    ep, pp, layers, experts, hidden, inner = 64, 16, 58, 256, 7168, 2048
    groups, number = [], iter(range(10**9))
    for stage in range(pp):
        own = range(stage * layers // pp, (stage + 1) * layers // pp)
        for rank in range(ep):
            params = []
            for layer in reversed(own):
                for expert in range(rank * experts // ep, (rank + 1) * experts // ep):
                    for name, rows, parts in (("fc2", hidden, 1), ("fc1", 2 * inner, 2)):
                        columns = inner if name == "fc2" else hidden
                        shape = (layers, experts * parts, rows // parts, columns)
                        places = [(layer, expert * parts + i) for i in range(parts)]
                        chunks = _chunks(f"mlp.experts.experts.linear_{name}.weight", shape, places)
                        params.append(Param(next(number), chunks))
            name = f"chained_1.optimizer.distributed.dp_group_idx_{stage * ep + rank}"
            groups.append(Group(name, params, 2, 40_000_000))
    return groups


def write_flat(path: Path, groups: list[Group], files: int) -> str:
    """Write a checkpoint; what it has, in words."""
    path.mkdir(parents=True)
    items: dict[tuple[str, Region | None], tuple[Item, int | None]] = {}
    buckets = 0
    for group in groups:
        for param in group.params:
            for i, item in enumerate(param.chunks):
                items[item.key, item.region] = item, 8 * param.number + i
        for n, bucket in enumerate(_buckets(group)):
            buckets += 1
            prefix = (
                f"{group.prefix}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_{n}"
            )
            for item, seed in _bucket_items(prefix, bucket, group.dp):
                items[item.key, item.region] = item, seed
    everything = list(items.values())
    placed, per_file = [], -(-len(everything) // files)
    for rank in range(files):
        mine = everything[rank * per_file : (rank + 1) * per_file]
        placed += _write_file(path, rank, mine)
    write_metadata(path, placed, {})
    write_marker(path, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    models = sum(item.dtype is torch.bfloat16 for item, _ in everything)
    return f"{models} model chunks, {buckets} buckets, {len(everything)} chunks in all"


def _chunks(name: str, shape: tuple[int, ...], places: list[tuple[int, int]]) -> tuple[Item, ...]:
    key = f"decoder.layers.{name}"
    return tuple(
        Item(key, Region((layer, part, 0, 0), (1, 1, *shape[2:])), torch.bfloat16, shape)
        for layer, part in places
    )


def _buckets(group: Group) -> Iterator[list[Param]]:
    """As ``_ParamAndGradBuffer`` fills them."""
    bucket: list[Param] = []
    for param in group.params:
        bucket.append(param)
        if sum(one.numel for one in bucket) >= group.bucket_elements:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _bucket_items(prefix: str, params: list[Param], dp: int) -> Iterator[tuple[Item, int | None]]:
    """Chunks of a bucket's main params and moments; with what number those begin that do."""
    pieces: list[tuple[int, int, int | None]] = []
    position = 0
    for param in params:
        start = -(-position // 64) * 64
        if start > position:
            pieces.append((position, start, None))
        position = start
        for i, chunk in enumerate(param.chunks):
            assert chunk.region is not None
            pieces.append((position, position + chunk.region.numel, 8 * param.number + i))
            position += chunk.region.numel
    part = -(-position // 128 // dp) * 128
    for start, stop, seed in pieces:
        edges = [start, *(c for c in range(part, stop, part) if start < c < stop), stop]
        for a, b in pairwise(edges):
            for name in ("param", "exp_avg", "exp_avg_sq"):
                key, region = f"{prefix}.{name}", Region((a,), (b - a,))
                begins = seed if name == "param" and a == start else None
                yield Item(key, region, torch.float32, (position,)), begins


def _write_file(path: Path, rank: int, items: list[tuple[Item, int | None]]) -> list[Placed]:
    placed = place((item for item, _ in items), rank)
    with (path / file_name(rank)).open("wb") as stream:
        for one, (item, seed) in zip(placed, items, strict=True):
            end = one.offset + item.stored_bytes
            if seed is None and item.key.endswith(("exp_avg", "exp_avg_sq")):
                stream.truncate(end)  # never read in planning
                continue
            assert item.dtype is not None and item.region is not None
            before, after = frame(item.dtype, item.region.sizes).around(0)
            os.pwrite(stream.fileno(), before + _beginning(item, seed), one.offset)
            os.pwrite(stream.fileno(), after, end - len(after))
    return placed


def _beginning(item: Item, seed: int | None) -> bytes:
    """The first elements, the same for a model chunk and its main param."""
    if seed is None or item.region is None:
        return b""
    digits = torch.tensor([(seed >> (4 * n)) % 16 for n in range(8)])
    first = (1 + digits.repeat(REAL // 8) / 16)[: item.region.numel].to(item.dtype)
    return first.view(torch.uint8).numpy().tobytes()
