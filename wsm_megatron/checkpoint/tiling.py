"""Do regions tile a tensor: is every element in exactly one of them? Pure; in elements."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

import numpy as np

_MOST_AXES = 8
"""Axes that chunks may be cut along: corners double with each. Megatron cuts four at most."""
_MOST_PLACES = 2**62

Shape = tuple[int, ...]


@lru_cache(maxsize=256)
def tiling_fault(shape: Shape, regions: tuple[tuple[Shape, Shape], ...]) -> str | None:
    """What keeps regions from tiling a tensor: a hole, an overlap, or one that sticks out.

    Counts the regions' corners, each with its sign in the difference of the region's indicator
    along every axis. The sum of all signs up to an element is the number of regions that hold it,
    so regions tile the tensor exactly where their corners cancel to those of the tensor. The first
    corner that does not is the first element that no region holds, or several do.

    Takes the time of sorting the corners: 2^k for each region, k the number of axes that are cut.
    Most tensors of a run are cut alike: what was found is kept.

    Args:
        regions: offsets and sizes of each.

    Returns:
        the first fault in row-major order, in words; None where each element is in one region.
    """
    if len(regions) == 1 and regions[0] == ((0,) * len(shape), shape):
        return None
    for offsets, sizes in regions:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"the chunk at {offsets} of {sizes} has another number of axes"
    try:
        starts, lengths = (_array([region[i] for region in regions], len(shape)) for i in (0, 1))
        extents = np.array(shape, np.int64)
    except OverflowError:
        return "its sizes are beyond 64 bits"
    outside = ((starts < 0) | (lengths < 0) | (lengths > extents - starts)).any(axis=1)
    if outside.any():
        offsets, sizes = regions[int(outside.argmax())]
        return f"the chunk at {offsets} of {sizes} sticks out of {shape}"
    if 0 in shape:
        return None
    cut = ((starts != 0) | (lengths != extents)).any(axis=0).nonzero()[0]
    if not cut.size:  # each region is the whole tensor, and there is not one of them
        return _in_words(len(regions), (0,) * len(shape))
    if len(cut) > _MOST_AXES or np.prod(extents[cut] + 1.0) > _MOST_PLACES:
        return f"its chunks are cut along {len(cut)} axes of {shape}, more than can be checked"
    return _first_fault(shape, starts, lengths, [int(axis) for axis in cut])


def _array(rows: list[Shape], columns: int) -> np.ndarray:
    values = np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * columns)
    return values.reshape(len(rows), columns)


def _first_fault(
    shape: Shape, starts: np.ndarray, lengths: np.ndarray, cut: list[int]
) -> str | None:
    extents = np.array([shape], np.int64)
    up, down = _corners(extents[0], starts, lengths, cut)
    whole_up, whole_down = _corners(extents[0], np.zeros_like(extents), extents, cut)
    found = np.sort(np.concatenate([up, whole_down]))
    expected = np.sort(np.concatenate([down, whole_up]))
    if np.array_equal(found, expected):
        return None
    # As many go up as down: the first place where the sorted ones differ has the first such corner.
    at = int((found != expected).argmax())
    corner = min(found[at], expected[at])
    held = 1 + int((found == corner).sum()) - int((expected == corner).sum())
    where, place = [0] * len(shape), int(corner)
    for axis in reversed(cut):
        place, where[axis] = divmod(place, shape[axis] + 1)
    return _in_words(held, tuple(where))


def _in_words(held: int, where: Shape) -> str:
    return f"{held or 'no'} chunks hold the element at {where}"


def _corners(
    extents: np.ndarray, starts: np.ndarray, lengths: np.ndarray, cut: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of regions where the count goes up, and where it goes down: ``[corner, region]``.

    Flat: a corner is a row-major index over the axes that are cut, each one longer than the tensor,
    as a region ends behind its last element.
    """
    up = np.zeros((1, len(starts)), np.int64)
    down = np.zeros((0, len(starts)), np.int64)
    step = 1
    for axis in reversed(cut):
        low = starts[:, axis] * step
        high = low + lengths[:, axis] * step
        up, down = (
            np.concatenate([up + low, down + high]),
            np.concatenate([up + high, down + low]),
        )
        step *= int(extents[axis]) + 1
    return up.ravel(), down.ravel()
