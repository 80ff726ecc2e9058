"""Whether values are finite."""

from __future__ import annotations

import math

import pytest
import torch

from wsm_megatron.kernels.finite import all_finite

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 64, 1001])
def test_one_value_anywhere_is_seen(dtype: torch.dtype, size: int) -> None:
    values = torch.linspace(-3, 3, size).to(dtype)
    assert bool(all_finite(values))
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, size // 2, size - 1}:
            changed = values.clone()
            changed[place] = value
            assert not bool(all_finite(changed)), (value, place)
            assert not bool(all_finite(changed.view(1, -1))), "whatever the shape"


def test_extremes_and_nothing_at_all_are_finite() -> None:
    for dtype in DTYPES:
        most = torch.finfo(dtype).max
        assert bool(all_finite(torch.tensor([most, -most, torch.finfo(dtype).tiny], dtype=dtype)))
        assert bool(all_finite(torch.empty(0, dtype=dtype)))
