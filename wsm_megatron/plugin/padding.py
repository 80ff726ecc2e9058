"""Main params and moments as a ``fully_reshardable`` save should hold them.

There ``DistributedOptimizer`` gathers each buffer without the padding at the end of its buckets,
and, through core_r0.19, cuts the params out of it at offsets that count this padding: with several
padded buckets, params get elements of their neighbours, or zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch

from wsm_megatron.plugin.optimizers import Distributed, parts

_SAVED = "sharded_param_state_fully_reshardable"
_GATHERED = "get_parameter_state_dp_zero"


@contextmanager
def checked_slices(optimizer: Any, *, put_right: bool) -> Iterator[list[str]]:
    """Within it, look at what saves take of the optimizer's gathered buffers.

    Args:
        put_right: let the save have the right slices in place of wrong ones.

    Yields:
        The keys of which this rank's slices were wrong, filled in by the save.
    """
    wrong: list[str] = []
    with ExitStack() as stack:
        for part in parts(optimizer):
            if isinstance(part, Distributed) and _cuts_wrongly(part.megatron):
                stack.enter_context(_checked(part.megatron, wrong, put_right))
        yield wrong


def _cuts_wrongly(part: Any) -> bool:
    padded = (_padding(bucket) > 0 for buffer in part.buffers for bucket in buffer.buckets[:-1])
    return hasattr(part, _SAVED) and any(padded)


def _padding(bucket: Any) -> int:
    return bucket.grad_data.numel() - bucket.numel_unpadded


@contextmanager
def _checked(part: Any, wrong: list[str], put_right: bool) -> Iterator[None]:
    save, gather = getattr(part, _SAVED), getattr(part, _GATHERED)

    def saved(*args: Any, **keywords: Any) -> Any:
        gathered: list[Any] = []

        def noted(*args: Any, **keywords: Any) -> Any:
            gathered.append(gather(*args, **keywords))
            return gathered[-1]

        with _method(part, _GATHERED, noted):
            state = save(*args, **keywords)
        if state is not None:  # this rank saves
            wrong.extend(_compare(part, state, gathered[-1], put_right))
        return state

    with _method(part, _SAVED, saved):
        yield


@contextmanager
def _method(part: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Put a function in place of a method of one object."""
    vars(part)[name] = function
    try:
        yield
    finally:
        del vars(part)[name]


def _compare(part: Any, state: Any, gathered: Any, put_right: bool) -> Iterator[str]:
    """The keys in a save's state (by param, then ``param``, ``exp_avg`` …) that are wrong."""
    for tensors, (index, dtype, span) in zip(state.values(), _spans(part), strict=True):
        for name, sharded in tensors.items():
            right = gathered[index][dtype][name][span].view(sharded.data.shape)
            if not torch.equal(sharded.data.view(torch.uint8), right.view(torch.uint8)):
                yield sharded.key
                if put_right:
                    sharded.data = right


def _spans(part: Any) -> Iterator[tuple[int, Any, slice]]:
    """Buffer, dtype, and place in the gathered buffer of every param, in the order of a save."""
    for index, ranges in enumerate(part.gbuf_ranges):
        buffer = part.buffers[index]
        stripped = [0, *accumulate(_padding(bucket) for bucket in buffer.buckets)]
        for dtype in ranges:
            for start, stop, bucket in buffer.param_index_map.values():
                yield index, dtype, slice(start - stripped[bucket], stop - stripped[bucket])
