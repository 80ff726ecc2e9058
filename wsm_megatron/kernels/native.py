"""The compiled CPU path: hands the tensors' addresses to the C extension ``_weighted_sum``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from wsm_megatron.kernels._weighted_sum import run

_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def bind(
    sources: Sequence[Tensor], coefficients: Sequence[Sequence[float]], outputs: Sequence[Tensor]
) -> Callable[[], bool]:
    """See :func:`wsm_megatron.kernels.bind`; arguments are taken as checked."""
    kept = (*sources, *outputs)  # as long as their addresses are used
    arguments = (
        outputs[0].numel(),
        *_addresses(sources),
        tuple(chain.from_iterable(coefficients)),
        *_addresses(outputs),
    )

    def weighted_sum() -> bool:
        assert kept
        return run(*arguments)

    return weighted_sum


def _addresses(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], bytes]:
    return tuple(t.data_ptr() for t in tensors), bytes(_CODES[t.dtype] for t in tensors)
