"""What a plan refuses before a byte is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig, UsageError
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.planning.plan import make_plan


@pytest.mark.parametrize("dtype", [torch.uint16, torch.qint8, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_written_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    layout = read_layout(runs.checkpoint(RUNS / runs.DENSE, 8))
    key = min(key for key, one in layout.tensors.items() if one.role is Role.MODEL)
    odd = replace(layout.tensors[key], dtype=dtype, role=Role.COPY)
    layouts = [replace(layout, tensors={**layout.tensors, key: odd})] * 2
    options = {"load": tmp_path, "save": tmp_path / "out"}
    with pytest.raises(UsageError, match=rf"{key} is {dtype}, .*--drop '{key}'"):
        make_plan(layouts, MergeConfig(**options))
    assert make_plan(layouts, MergeConfig(drop=(key,), **options)).tasks
