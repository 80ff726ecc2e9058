"""Each rule against its statement in numpy: the same elements in the same order, each once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.checkpoint.tiling import tiling_fault
from wsm_megatron.errors import UsageError
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.transforms import (
    Output,
    Transform,
    fused_qkv,
    halves,
    interleaved_halves,
    plain,
    split_qkv,
    transposed,
    vocabulary,
)

small = st.integers(1, 5)
inner = st.lists(small, max_size=2).map(tuple)


def applied(how: Transform, array: np.ndarray, **args: Any) -> list[np.ndarray]:
    """What a rule makes of an array, by copying one block after another."""
    outputs = how(array.shape, ModelArgs(args))
    regions = tuple((b.region.offsets, b.region.sizes) for o in outputs for b in o.blocks)
    if how is not vocabulary:
        assert tiling_fault(array.shape, regions) is None
    return [_filled(output, array) for output in outputs]


def _filled(output: Output, array: np.ndarray) -> np.ndarray:
    runs = []
    for region, view, order in output.blocks:
        where = tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))
        block = array[where]
        runs.append((block.reshape(view).transpose(order) if order else block).ravel())
    return np.concatenate(runs).reshape(output.shape)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


@given(groups=small, per_group=small, dim=small, rest=inner)
def test_queries_keys_and_values(
    groups: int, per_group: int, dim: int, rest: tuple[int, ...]
) -> None:
    w = numbered(groups * (per_group + 2) * dim, *rest)
    grouped = w.reshape(groups, per_group + 2, dim, *rest)
    q = grouped[:, :per_group].reshape(-1, *rest)
    k, v = (grouped[:, per_group + n].reshape(-1, *rest) for n in (0, 1))
    args = {
        "num_attention_heads": groups * per_group,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": dim,
    }
    same(applied(split_qkv, w, **args), [q, k, v])
    same(applied(fused_qkv, w, **args), [np.concatenate([q, k, v])])


@given(half=small, rest=inner)
def test_halves(half: int, rest: tuple[int, ...]) -> None:
    w = numbered(2 * half, *rest)
    same(applied(halves, w), [w[:half], w[half:]])
    gate, up = w[:half].T, w[half:].T
    alternating = np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], 2 * half)
    same(applied(interleaved_halves, w), [alternating])


@given(shape=st.lists(small, max_size=3).map(tuple))
def test_as_it_is_and_transposed(shape: tuple[int, ...]) -> None:
    w = numbered(*shape)
    same(applied(plain, w), [w])
    same(applied(transposed, w), [w.T])


@given(tokens=small, padding=st.integers(0, 3), width=small)
def test_padding_of_the_vocabulary_is_cut(tokens: int, padding: int, width: int) -> None:
    w = numbered(tokens + padding, width)
    same(applied(vocabulary, w, vocab_size=tokens), [w[:tokens]])


def test_shapes_that_the_args_do_not_fit_are_refused() -> None:
    heads = {"num_attention_heads": 4, "kv_channels": 2}
    with pytest.raises(UsageError, match="has 23 rows; 4 heads in 4 groups of 2 channels make 24"):
        split_qkv((23, 3), ModelArgs(heads))
    with pytest.raises(UsageError, match="5 rows, less than the vocabulary's 6"):
        vocabulary((5, 3), ModelArgs({"vocab_size": 6}))


@pytest.mark.parametrize("how", [halves, interleaved_halves])
def test_an_odd_number_of_rows_has_no_halves(how: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="5 rows"):
        how((5, 3), ModelArgs({}))
