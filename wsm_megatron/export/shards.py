"""Which file each exported tensor goes into, and where: known before a byte is written. Pure."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from wsm_megatron.export.table import Tensor

INDEX_FILE = "model.safetensors.index.json"
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class Shard:
    """A safetensors file: a length, a header of JSON, and tensors end to end.

    Attributes:
        offsets: of each tensor's first byte, in the file.
        header: all that is before the first.
    """

    name: str
    tensors: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    header: bytes

    @property
    def size(self) -> int:
        return self.offsets[-1] + self.tensors[-1].nbytes


def make_shards(tensors: Sequence[Tensor], limit: int) -> list[Shard]:
    """Cut tensors into files of at most ``limit`` bytes, layers in order. At least one tensor."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: natural(tensor.name)):
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    count = len(groups)
    return [
        _shard(f"model-{n:05d}-of-{count:05d}.safetensors", group)
        for n, group in enumerate(groups, 1)
    ]


def index_of(shards: Sequence[Shard]) -> bytes:
    """``model.safetensors.index.json``."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def shares(shards: Sequence[Shard], ranks: int) -> list[list[Shard]]:
    """Every rank's files, the largest first to who has least."""
    mine: list[list[Shard]] = [[] for _ in range(ranks)]
    for shard in sorted(shards, key=lambda shard: -shard.size):
        min(mine, key=lambda own: sum(one.size for one in own)).append(shard)
    return mine


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """For sorting by numbers in names as numbers."""
    return tuple(_natural(name))


def _natural(name: str) -> Iterator[tuple[bool, int, str]]:
    for part in re.split(r"(\d+)", name):
        yield part.isdigit(), int(part) if part.isdigit() else 0, part


def _shard(name: str, tensors: Sequence[Tensor]) -> Shard:
    # Wide elements first: then each tensor begins at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = [], 0
    for tensor in ordered:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        offsets.append(position)
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Shard(name, tuple(ordered), tuple(len(header) + one for one in offsets), header)
