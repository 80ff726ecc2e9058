"""Main params of core 0.14 (``fully_sharded_model_space``): a model tensor's fragments, each flat.

A tensor that is cut into a grid of fragments (layers, TP shards, the halves of SwiGLU) has state of
shape ``(*grid, elements of a fragment)``: ``(2, 1, 1, 1024)`` for two layers of ``(32, 32)``.
Read in ``sharded_param_state_fs_model_space`` and in ``flattened_range`` of core_v0.14.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import Layout, TensorEntry
from wsm_megatron.checkpoint.region import Region, span_of
from wsm_megatron.optimizer.flat_buckets import FlatMainParam, ModelChunk


def is_fragmented(main: TensorEntry, model: TensorEntry) -> bool:
    """Whether state of this shape is a model tensor's, fragment by fragment."""
    *grid, numel = main.shape or (0,)
    return (
        len(grid) == len(model.shape)
        and all(n and not size % n for n, size in zip(grid, model.shape, strict=True))
        and numel == prod(model.shape) // prod(grid)
    )


def fragmented_mains(layout: Layout) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    """Main params that are kept so, each with its model tensor."""
    for key, entry in layout.tensors.items():
        model = layout.tensors.get(main_of(key) or "")
        if entry.role is Role.MAIN and model is not None and is_fragmented(entry, model):
            yield entry, model


def find_fragments(layout: Layout) -> dict[ModelChunk, FlatMainParam]:
    """Where the main param of each model chunk lies, if it lies within one fragment, in a row.

    Megatron saves the model in these very fragments.
    """
    found = {}
    for main, model in fragmented_mains(layout):
        grid = main.shape[:-1]
        sizes = tuple(size // n for size, n in zip(model.shape, grid, strict=True))
        for chunk in model.chunks:
            region = Region(chunk.offsets, chunk.sizes)
            lead = tuple(a // size for a, size in zip(chunk.offsets, sizes, strict=True))
            fragment = Region(tuple(n * size for n, size in zip(lead, sizes, strict=True)), sizes)
            span = span_of(region.within(fragment), sizes)
            if region.intersect(fragment) == region and span.contiguous:
                found[model.key, region] = FlatMainParam(main.key, span.start, lead)
    return found
