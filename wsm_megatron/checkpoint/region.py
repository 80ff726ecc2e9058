"""Regions of a global tensor: the geometry of chunks. Pure; offsets and sizes in elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class Region(NamedTuple):
    """An axis-aligned region of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def intersect(self, other: Region) -> Region | None:
        """The common region; None where there is none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Region(starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: Region) -> Region:
        """The same region, with offsets counted from ``outer``'s corner."""
        offsets = tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return Region(offsets, self.sizes)

    def split(self, limit: int) -> Iterator[Region]:
        """Cut into regions of at most ``limit`` elements, in row-major order.

        Laid end to end, the parts' elements are this region's elements in row-major order.
        """
        if self.numel <= limit or not self.sizes:
            yield self
            return
        axis = next(i for i, size in enumerate(self.sizes) if size > 1)
        step = max(1, limit // prod(self.sizes[axis + 1 :]))
        for start in range(0, self.sizes[axis], step):
            size = min(step, self.sizes[axis] - start)
            part = Region(
                _with(self.offsets, axis, self.offsets[axis] + start), self._resized(axis, size)
            )
            yield from part.split(limit)

    def _resized(self, axis: int, size: int) -> tuple[int, ...]:
        return _with(self.sizes, axis, size)


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


@dataclass(frozen=True, slots=True)
class Span:
    """Where a region lies in a row-major array: elements ``start .. start + length``.

    ``contiguous``: the region fills the span; otherwise other elements lie in between.
    """

    start: int
    length: int
    contiguous: bool


def span_of(region: Region, shape: tuple[int, ...]) -> Span:
    """Smallest element range of an array of ``shape`` that holds ``region`` (offsets within it)."""
    stride, start, last = 1, 0, 0
    for offset, size, extent in zip(
        reversed(region.offsets), reversed(region.sizes), reversed(shape), strict=True
    ):
        start += offset * stride
        last += (offset + size - 1) * stride
        stride *= extent
    length = last - start + 1
    return Span(start, length, length == region.numel)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next along each axis of a row-major array."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides[: len(shape)]))
