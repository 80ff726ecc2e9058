"""Parts of a tensor, in whatever pieces they come, end up where the whole would."""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError
from wsm_megatron.export.shard_file import ShardFile
from wsm_megatron.export.spread import runs_of


@st.composite
def regions(draw: st.DrawFn) -> tuple[Region, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Region(offsets, sizes), shape


@given(regions())
def test_runs_are_the_elements_of_a_region_in_order(case: tuple[Region, tuple[int, ...]]) -> None:
    region, shape = case
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    slices = tuple(slice(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))
    starts, length = runs_of(region, shape)
    found = [start + n for start in starts for n in range(length)]
    assert found == whole[slices].reshape(-1).tolist()


@given(st.binary(min_size=1, max_size=200), st.data())
def test_the_ranks_shares_make_the_crc_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, choose: st.DataObject
) -> None:
    """Whoever writes which part, and in which order; runs lie apart, as columns do."""
    path = tmp_path_factory.mktemp("file") / "shard"
    cuts = choose.draw(st.sets(st.integers(1, len(data)), max_size=6))
    edges = [0, *sorted(cuts | {len(data)})]
    parts = choose.draw(st.permutations(list(pairwise(edges))))
    files = [ShardFile(path, len(data)), ShardFile(path, len(data), made=True)]
    for start, end in parts:
        shapes = [(n, width) for n in (1, 2, 3) for width in (1, 2, 5, end - start)]
        fitting = [(n, width) for n, width in shapes if (end - start) % (n * width) == 0]
        count, width = choose.draw(st.sampled_from(fitting))
        table = np.frombuffer(data[start:end], dtype=np.uint8).reshape(-1, count, width)
        for n in range(count):
            file = files[choose.draw(st.integers(0, 1))]
            offsets = list(range(start + n * width, end, count * width))
            column = table[:, n].tobytes()
            file.write_runs(offsets, memoryview(bytes(len(column))), counts=False)
            file.write_runs(offsets, memoryview(column))
    (first, one), (second, other) = (file.close() for file in files)
    assert path.read_bytes() == data
    assert (first + second, one ^ other) == (len(data), zlib.crc32(data))


def test_a_file_of_another_export_is_not_written_over(tmp_path: Path) -> None:
    ShardFile(tmp_path / "shard", 4).abandon()
    with pytest.raises(MergeError, match="cannot create"):
        ShardFile(tmp_path / "shard", 4)
    with pytest.raises(MergeError, match="cannot create"):
        ShardFile(tmp_path / "none", 4, made=True)
