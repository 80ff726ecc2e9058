"""Every element of a tensor is in exactly one chunk, or the checkpoint is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests import runs
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.tiling import tiling_fault
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED

KEY = "embedding.word_embeddings.weight"
FAULT = r"is not whole: .*; \.metadata is damaged"


@st.composite
def cut_up(draw, shape):
    """Boxes that tile a tensor: cut in two again and again, anywhere."""
    regions = [Region((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, region.sizes[axis]))
        for start, size in ((0, at), (at, region.sizes[axis] - at)):
            offsets, sizes = list(region.offsets), list(region.sizes)
            offsets[axis], sizes[axis] = offsets[axis] + start, size
            regions.append(Region(tuple(offsets), tuple(sizes)))
    return draw(st.permutations(regions))


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@given(st.data(), shapes)
def test_regions_that_tile_are_found_to(data, shape):
    assert tiling_fault(shape, tuple(data.draw(cut_up(shape)))) is None


@given(st.data(), shapes)
def test_the_first_hole_or_overlap_is_named(data, shape):
    """Boxes left out, doubled, moved: compared with counting every element."""
    regions = list(data.draw(cut_up(shape)))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(regions)))
        del regions[at : at + 1]
    for _ in range(data.draw(st.integers(0, 2))):
        offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
        sizes = tuple(data.draw(st.integers(0, n - a)) for n, a in zip(shape, offsets, strict=True))
        regions.append(Region(offsets, sizes))
    held = np.zeros(shape, int)
    for region in regions:
        held[tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))] += 1
    wrong = np.argwhere(held != 1)
    fault = tiling_fault(shape, tuple(regions))
    if not len(wrong):
        assert fault is None
        return
    first = tuple(wrong[0].tolist())
    assert fault == f"{held[first] or 'no'} chunks hold the element at {first}"


@pytest.mark.parametrize("shape, regions, words", [
    ((), [((), ())], None),
    ((), [], "no chunks hold"),
    ((), [((), ())] * 2, "2 chunks hold"),
    ((0, 4), [], None),
    ((0, 4), [((0, 0), (0, 4))] * 2, None),  # as several ranks save it
    ((4,), [((0,), (4,)), ((4,), (0,)), ((4,), (0,))], None),
    ((4,), [((0,), (4,)), ((5,), (0,))], "sticks out"),
    ((4,), [((0,), (2,)), ((1,), (2,))], "2 chunks hold the element at (1,)"),
    ((4,), [((0,), (5,))], "sticks out"),
    ((4,), [((0,), (4,)), ((2,), (-1,))], "sticks out"),
    ((4,), [((0, 0), (4, 1))], "another number of axes"),
    ((2**70,), [((0,), (1,))], "beyond 64 bits"),
    ((2**40, 2**40), [((0, 0), (1, 1))], "more than can be checked"),
    ((2,) * 9, [((0,) * 9, (1,) * 9)], "more than can be checked"),
    # Five regions around each other: no straight cut separates any of them.
    ((3, 3), [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)),
              ((1, 1), (1, 1))], None),
])  # fmt: skip
def test_corner_cases(shape, regions, words):
    fault = tiling_fault(shape, tuple(regions))
    assert fault is None if words is None else words in str(fault)


def test_many_chunks_are_no_trouble():
    """A quadratic check would take hours."""
    regions = tuple(
        Region((i, j, k), (1, 1, 4)) for i in range(100) for j in range(500) for k in (0, 4)
    )
    assert tiling_fault((100, 500, 8), regions) is None
    fault = tiling_fault((100, 500, 8), (*regions[:-4], *regions[-3:]))
    assert fault == "no chunks hold the element at (99, 498, 0)"


def change_metadata(path, change):
    """``change`` the chunks of :data:`KEY` and where everything is stored."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata.state_dict_metadata[KEY].chunks, metadata.storage_data)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def leave_out(chunks, _):
    del chunks[0]


def cover_twice(chunks, storage):
    """A hole, and as many elements twice: the sum of the sizes is right."""
    first, second = sorted(chunks, key=lambda chunk: tuple(chunk.offsets))[:2]
    storage[MetadataIndex(KEY, second.offsets)] = storage[MetadataIndex(KEY, first.offsets)]
    moved = torch.Size([second.offsets[0] - 8, *second.offsets[1:]])
    storage[MetadataIndex(KEY, moved)] = storage.pop(MetadataIndex(KEY, second.offsets))
    second.offsets = moved


def stick_out(chunks, _):
    last = max(chunks, key=lambda chunk: tuple(chunk.offsets))
    last.sizes = torch.Size([last.sizes[0] + 1, *last.sizes[1:]])


def same_bytes(chunks, storage):
    """Both halves of the tensor are the first one's bytes."""
    first, second = (MetadataIndex(KEY, chunk.offsets) for chunk in chunks[:2])
    storage[second] = storage[first]


def bytes_of_another(chunks, storage):
    first = MetadataIndex(KEY, chunks[0].offsets)
    other = next(index for index in storage if index.fqn != KEY)
    storage[first] = replace(storage[other], offset=storage[other].offset + 1)


DAMAGE = {
    leave_out: rf"{KEY} .* no chunks hold the element at \(0, 0\)",
    cover_twice: rf"{KEY} .* 2 chunks hold the element at",
    stick_out: rf"{KEY} .* sticks out",
    same_bytes: rf"{KEY} and {KEY} lie in the same bytes of __",
    bytes_of_another: rf"{KEY}.* lie in the same bytes of __",
}


@pytest.mark.parametrize("iteration", [4, 8])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_source_that_is_not_whole_is_not_merged(damage, iteration, tmp_path):
    run = halved_run(tmp_path)
    change_metadata(runs.checkpoint(run, iteration), damage)
    with pytest.raises(MergeError, match=rf"iter_000000{iteration}: .*{DAMAGE[damage]}"):
        merge(MergeConfig(load=run, save=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def halved_run(tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for iteration in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(run, iteration), grid=runs.split_axis(0, 2))
    return run


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_verify_and_resume_check_name_it(damage, tmp_path, capsys):
    path = runs.checkpoint(halved_run(tmp_path), 8)
    verify(path)
    assert main(["resume-check", str(path)]) == 0
    change_metadata(path, damage)
    for command in ("verify", "resume-check"):
        capsys.readouterr()
        assert main([command, str(path)]) == EXIT_FAILED
        message = capsys.readouterr().err
        assert str(path) in message and KEY in message


@pytest.mark.parametrize("run", runs.ALL)
def test_what_megatron_saves_is_whole_padding_included(run):
    for iteration in runs.ITERATIONS:
        layout = read_layout(runs.checkpoint(run, iteration))
        for entry in layout.tensors.values():
            assert sum(chunk.numel for chunk in entry.chunks) == prod(entry.shape)


def test_a_region_is_read_only_where_each_element_is_in_one_chunk(tmp_path):
    layout = read_layout(runs.checkpoint(halved_run(tmp_path), 8))
    entry = layout.tensors[KEY]
    region = Region((8, 0), (entry.shape[0] - 16, entry.shape[1]))
    whole = CheckpointReader(layout).read(KEY, region)
    assert whole.numel() == region.numel
    first, second = entry.chunks
    moved = second._replace(offsets=(second.offsets[0] - 4, 0))
    shorter = region._replace(sizes=(region.sizes[0] - 4, region.sizes[1]))
    for chunks, asked in (((first,), region), ((first, moved), shorter)):
        broken = replace(layout, tensors={KEY: replace(entry, chunks=chunks)})
        with pytest.raises(MergeError, match=f"iter_0000008: {KEY} at .* is not whole"):
            CheckpointReader(broken).region_reader(KEY, asked)
