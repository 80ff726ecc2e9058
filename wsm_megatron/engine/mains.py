"""Do a checkpoint's main params belong to its model? Rounded to the model's dtype they are equal.

Megatron overwrites the model from the main params in the first step after a load, so a checkpoint
whose main params are of other weights silently becomes those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.roles import PARAM_ALIGNMENT, Role, is_flat_bucket, main_of

_TILE = 2**20
_BEGINNING = 2**12
_PROBE = 32
"""Elements compared before all: enough to tell any two weights, fewer than the padding unit."""

ModelChunk = tuple[str, Box]


@dataclass(frozen=True)
class MainsCheck:
    """What was found.

    Attributes:
        keyed: main params under their model tensor's key.
        buckets: flat buckets of main params (``dp_reshardable``), found again by their content.
        wrong: model tensors whose main param is another tensor's; in flat buckets, tensors that no
            main param rounds to.
        without: model tensors without a main param of their key (frozen, or never saved).
    """

    keyed: int
    buckets: int
    wrong: tuple[str, ...]
    without: tuple[str, ...]

    @property
    def present(self) -> bool:
        return bool(self.keyed or self.buckets)


def check_mains(layout: Layout) -> MainsCheck:
    """Compare every main param of a checkpoint with its model tensor; reads both once.

    Raises:
        MergeError: a tensor cannot be read.
    """
    mains = [key for key, entry in layout.tensors.items() if entry.role is Role.MAIN]
    keyed = {
        model: key
        for key in mains
        if (model := main_of(key)) in layout.tensors
        and layout.tensors[model].shape == layout.tensors[key].shape
    }
    buckets = [key for key in mains if is_flat_bucket(key)]
    models = [key for key, entry in layout.tensors.items() if entry.role is Role.MODEL]
    reader = CheckpointReader(layout)
    try:
        wrong = {key for key in models if key in keyed and not _belongs(reader, key, keyed[key])}
        if buckets:
            wrong |= _not_in(reader, buckets, [key for key in models if key not in keyed])
    finally:
        reader.close()
    without = [] if buckets or not keyed else [key for key in models if key not in keyed]
    return MainsCheck(len(keyed), len(buckets), tuple(sorted(wrong)), tuple(sorted(without)))


def _belongs(reader: CheckpointReader, model: str, main: str) -> bool:
    for chunk in reader.layout.tensors[model].chunks:
        for box in Box(chunk.offsets, chunk.sizes).split(_TILE):
            if not _equal(reader.read(model, box), reader.read(main, box)):
                return False
    return True


def _not_in(reader: CheckpointReader, buckets: list[str], models: list[str]) -> set[str]:
    """Model tensors of which a chunk lies in none of the buckets."""
    chunks = [
        (key, Box(chunk.offsets, chunk.sizes))
        for key in models
        for chunk in reader.layout.tensors[key].chunks
    ]
    found = {chunk for bucket in buckets for _, chunk in find_in_bucket(reader, bucket, chunks)}
    return {key for key, box in chunks if (key, box) not in found}


def find_in_bucket(
    reader: CheckpointReader, bucket: str, chunks: list[ModelChunk], whole: bool = True
) -> Iterator[tuple[int, ModelChunk]]:
    """Places in a flat bucket whose elements, rounded, are those of a model chunk.

    A flat bucket has no keys: params follow each other, each from a multiple of 64, and a param
    may be several chunks of the model (SwiGLU's two halves), which follow each other without a gap.
    Equal chunks are found at each other's places too. Unless ``whole``, only the first elements are
    compared.
    """
    entry = reader.layout.tensors[bucket]
    probes = _probes(reader, chunks)
    starts = sorted({c.offsets[0] for c in entry.chunks if c.offsets[0] % PARAM_ALIGNMENT == 0})
    waiting, seen = starts[::-1], set(starts)
    while waiting:
        start = waiting.pop()
        for chunk in _candidates(reader, bucket, start, probes):
            if _lies_at(reader, bucket, start, chunk, whole):
                yield start, chunk
                end = start + chunk[1].numel
                if end not in seen and end < entry.shape[0]:
                    seen.add(end)
                    waiting.append(end)


Probes = dict[tuple[torch.dtype, int], dict[bytes, list[ModelChunk]]]


def _probes(reader: CheckpointReader, chunks: list[ModelChunk]) -> Probes:
    """The first elements of every model chunk, by dtype and number of elements."""
    probes: Probes = {}
    for key, box in chunks:
        count = min(_PROBE, box.numel)
        first = next(iter(box.split(count)))
        data = reader.read(key, first)
        same_kind = probes.setdefault((data.dtype, data.numel()), {})
        same_kind.setdefault(_bytes(data), []).append((key, box))
    return probes


def _candidates(
    reader: CheckpointReader, bucket: str, start: int, probes: Probes
) -> Iterator[ModelChunk]:
    end = reader.layout.tensors[bucket].shape[0]
    for (dtype, count), by_bytes in probes.items():
        if start + count <= end:
            main = reader.read(bucket, Box((start,), (count,)))
            yield from by_bytes.get(_bytes(main.to(dtype)), ())


def _lies_at(
    reader: CheckpointReader, bucket: str, start: int, chunk: ModelChunk, whole: bool
) -> bool:
    key, box = chunk
    if start + box.numel > reader.layout.tensors[bucket].shape[0]:
        return False
    for part in islice(box.split(_TILE if whole else _BEGINNING), None if whole else 1):
        main = reader.read(bucket, Box((start,), (part.numel,)))
        if not _equal(reader.read(key, part), main):
            return False
        start += part.numel
    return True


def _equal(model: torch.Tensor, main: torch.Tensor) -> bool:
    return torch.equal(model.view(torch.uint8), main.to(model.dtype).view(torch.uint8))


def _bytes(data: torch.Tensor) -> bytes:
    return data.view(torch.uint8).numpy().tobytes()
