"""Boxes against numpy slicing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.checkpoint.region import Region, span_of

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def box_in(draw, shape):
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, offsets, strict=True))
    return Region(offsets, sizes)


def cut(array, region):
    return array[tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))]


@given(st.data(), shapes)
def test_intersection_is_the_common_elements(data, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    left, right = data.draw(box_in(shape)), data.draw(box_in(shape))
    common = left.intersect(right)
    expected = set(cut(array, left).ravel()) & set(cut(array, right).ravel())
    assert expected == (set(cut(array, common).ravel()) if common else set())


@given(st.data(), shapes, st.integers(1, 20))
def test_parts_laid_end_to_end_are_the_box_in_row_major_order(data, shape, limit):
    array = np.arange(np.prod(shape)).reshape(shape)
    region = data.draw(box_in(shape))
    parts = list(region.split(limit))
    assert all(part.numel <= limit for part in parts)
    joined = np.concatenate([cut(array, part).ravel() for part in parts])
    assert joined.tolist() == cut(array, region).ravel().tolist()


@given(st.data(), shapes)
def test_span_holds_the_box_and_says_whether_nothing_else(data, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    region = data.draw(box_in(shape))
    elements = cut(array, region).ravel().tolist()
    span = span_of(region, shape)
    assert (span.start, span.start + span.length - 1) == (elements[0], elements[-1])
    assert span.contiguous == (elements == list(range(span.start, span.start + span.length)))


def test_scalar():
    region = Region((), ())
    assert list(region.split(1)) == [region]
    assert span_of(region, ()).length == 1
    assert region.intersect(region) == region
