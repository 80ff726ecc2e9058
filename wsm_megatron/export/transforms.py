"""Where the elements of one Megatron tensor go: pure rules, from shapes to regions.

A rule takes the shape of a tensor, of one layer and one expert, and gives an :class:`Output` for
each tensor that it becomes. No rule computes: every element is moved, none is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import UsageError
from wsm_megatron.export.model_args import ModelArgs

Shape = tuple[int, ...]


class Block(NamedTuple):
    """A region whose elements follow each other in an output.

    ``view`` and ``order``: reshaped to ``view`` and its axes permuted, where they are given;
    otherwise in row-major order.
    """

    region: Region
    view: Shape = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Output:
    """A tensor of ``shape``: the elements of its blocks, end to end."""

    shape: Shape
    blocks: tuple[Block, ...]


Transform = Callable[[Shape, ModelArgs], tuple[Output, ...]]


def plain(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """The tensor as it is."""
    return (Output(shape, (Block(_whole(shape)),)),)


def one_head(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """The norm of every head's queries or keys, one and the same."""
    if shape != (args.head_dim,):
        raise UsageError(
            f"a norm of queries or keys of shape {shape}, where a head has {args.head_dim} "
            "channels: a norm over all heads, as OLMo's models have it, is in no family here"
        )
    return plain(shape, args)


def vocabulary(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """Without the rows that Megatron pads the vocabulary with."""
    if args.vocab_size > shape[0]:
        raise UsageError(
            f"the embedding has {shape[0]} rows, less than the vocabulary's {args.vocab_size}; "
            "give the checkpoint's own --tokenizer, or --arg vocab_size=N"
        )
    return (_rows(shape, (0, args.vocab_size)),)


def halves(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """Gate and up projection of a gated MLP, the gate first (``linear_fc1``)."""
    half = _half(shape)
    return _rows(shape, (0, half)), _rows(shape, (half, half))


def interleaved_halves(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """Gate and up alternate along the last axis of the transposed tensor: (in, 2 · out)."""
    half, inner = _half(shape), shape[1:]
    axes = tuple(reversed(range(len(inner) + 2)))
    block = Block(_whole(shape), (2, half, *inner), axes)
    return (Output((*reversed(inner), shape[0]), (block,)),)


def _half(shape: Shape) -> int:
    if shape[0] % 2:
        raise UsageError(f"linear_fc1 has {shape[0]} rows, which are no gate and up projection")
    return shape[0] // 2


def transposed(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """Axes in reverse order."""
    order = tuple(reversed(range(len(shape))))
    return (Output(tuple(reversed(shape)), (Block(_whole(shape), shape, order),)),)


def split_qkv(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """Q, K and V of all heads, from Megatron's groups: each its queries, its key, its value."""
    parts = _qkv_rows(shape, args)
    return tuple(_rows(shape, *rows) for rows in parts)


def fused_qkv(shape: Shape, args: ModelArgs) -> tuple[Output, ...]:
    """All queries, then all keys, then all values, in one tensor."""
    return (_rows(shape, *(run for rows in _qkv_rows(shape, args) for run in rows)),)


def _qkv_rows(shape: Shape, args: ModelArgs) -> list[list[tuple[int, int]]]:
    groups, dim = args.query_groups, args.head_dim
    queries = args.need("num_attention_heads") // groups * dim
    step = queries + 2 * dim
    if shape[0] != groups * step:
        raise UsageError(
            f"linear_qkv has {shape[0]} rows; {args.need('num_attention_heads')} heads in {groups} "
            f"groups of {dim} channels make {groups * step}: the checkpoint's args are of another "
            "model, or its attention has more than queries, keys and values"
        )
    starts = [group * step for group in range(groups)]
    return [
        [(start, queries) for start in starts],
        [(start + queries, dim) for start in starts],
        [(start + queries + dim, dim) for start in starts],
    ]


def _whole(shape: Shape) -> Region:
    return Region((0,) * len(shape), shape)


def _rows(shape: Shape, *runs: tuple[int, int]) -> Output:
    """Runs of rows, each from a first one and so many."""
    inner = shape[1:]
    zeros = (0,) * len(inner)
    blocks = tuple(Block(Region((start, *zeros), (count, *inner))) for start, count in runs)
    output = Output((sum(count for _, count in runs), *inner), blocks)
    assert prod(output.shape) == sum(block.region.numel for block in blocks)
    return output
