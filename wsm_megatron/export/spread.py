"""Where in exported files the elements of a stored tensor go, whatever part of it one has. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import product
from math import prod
from operator import mul
from typing import NamedTuple

import torch

from wsm_megatron.checkpoint.region import Region, strides_of
from wsm_megatron.export.shards import Shard
from wsm_megatron.export.table import Piece


class Place(NamedTuple):
    """A piece of a stored tensor, and the byte of a file that its first element begins at."""

    piece: Piece
    file: str
    offset: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.piece.region.numel * self.dtype.itemsize


def spreads_of(shards: Iterable[Shard]) -> dict[str, Spread]:
    """By key of a stored tensor, all places that its elements go to."""
    places: dict[str, list[Place]] = {}
    for shard in shards:
        for tensor, offset in zip(shard.tensors, shard.offsets, strict=True):
            for piece in tensor.pieces:
                place = Place(piece, shard.name, offset, tensor.dtype)
                places.setdefault(piece.key, []).append(place)
                offset += place.nbytes
    return {key: Spread(found) for key, found in places.items()}


def turned_places(spreads: Iterable[Spread]) -> dict[str, list[Place]]:
    """By file, the places whose elements do not lie in the order of the stored tensor."""
    found: dict[str, list[Place]] = {}
    for place in (place for spread in spreads for place in spread.places):
        if place.piece.order:
            found.setdefault(place.file, []).append(place)
    return found


class Spread:
    """The places of one stored tensor, found by region: a model of experts has thousands.

    Attributes:
        files: that they are in.
    """

    def __init__(self, places: Iterable[Place]):
        self.places = sorted(places, key=lambda place: place.piece.region.offsets)
        self.files = frozenset(place.file for place in self.places)
        self._starts = [_first(place.piece.region.offsets) for place in self.places]
        self._longest = max(_first(place.piece.region.sizes) for place in self.places)

    def overlapping(self, region: Region) -> Iterator[tuple[Place, Region]]:
        """Places that part of a region goes to, and the part."""
        start, size = _first(region.offsets), _first(region.sizes)
        begin = bisect_left(self._starts, start - self._longest + 1)
        end = bisect_left(self._starts, start + size)
        for place in self.places[begin:end]:
            common = region.intersect(place.piece.region)
            if common is not None:
                yield place, common


def _first(values: tuple[int, ...]) -> int:
    """Along the first axis; a tensor without axes has one element."""
    return values[0] if values else 1


def runs_of(region: Region, shape: tuple[int, ...]) -> tuple[list[int], int]:
    """A region of a row-major array of ``shape`` as runs of consecutive elements: where each
    begins, in order, and how many elements every one has."""
    inner = len(shape)
    while inner > 0 and region.sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)  # the first axis that is not whole still runs
    strides = strides_of(shape)
    first = sum(map(mul, region.offsets[outer:], strides[outer:]))
    axes = zip(region.offsets[:outer], region.sizes[:outer], strict=True)
    indices = product(*(range(offset, offset + size) for offset, size in axes))
    starts = [first + sum(map(mul, index, strides)) for index in indices]
    return starts, prod(region.sizes[outer:])
