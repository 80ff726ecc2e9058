"""Merges of two checkpoints of the runs in ``tests/data/frontier``."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import runs
from tests.reference import load_tensors
from wsm_megatron import MergeConfig, merge

WEIGHTS = (0.3, 0.7)


def merged(run: Path, out: Path, **options) -> Path:
    options = {"optimizer_state": "last", "weights": WEIGHTS, **options}
    return merge(MergeConfig(load=run, save=out, **options)).output


def sources_of(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_tensors(runs.checkpoint(run, i)) for i in (6, 8)]
