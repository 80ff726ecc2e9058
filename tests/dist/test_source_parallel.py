"""Merges of checkpoints that only some ranks can see, against the reference and ordinary merges."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.mcore import run_ranks
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, MergeReport, merge

WEIGHTS = (0.07, 0.21, 0.31, 0.41)

Sees = Callable[[int, int, str], bool]
"""Whether a rank sees a file of a checkpoint: rank, iteration, name."""


def spread(run: str | Path, to: Path, ranks: int, sees: Sees) -> list[Path]:
    """A directory for every rank with the files that it sees, as node-local disks would have."""
    roots = [to / f"node{rank}" / "run" for rank in range(ranks)]
    source = RUNS / run
    for rank, root in enumerate(roots):
        for iteration in runs.ITERATIONS:
            folder = runs.checkpoint(source, iteration)
            for file in sorted(folder.iterdir()):
                if sees(rank, iteration, file.name):
                    copy = root / folder.name / file.name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
    return roots


def whole_checkpoints(*nodes: int) -> Sees:
    """Every checkpoint whole on one node: ``nodes`` by source."""
    return lambda rank, iteration, name: nodes[runs.ITERATIONS.index(iteration)] == rank


def own_files(ranks: int) -> Sees:
    """Files on the node of the rank that wrote them, metadata on the first, as Megatron saves."""

    def sees(rank: int, iteration: int, name: str) -> bool:
        return rank == (int(name[2]) % ranks if name.endswith(".distcp") else 0)

    return sees


def shuffled(ranks: int, first: int = 0) -> Sees:
    """The same, but every file of every checkpoint on another node; metadata too."""

    def sees(rank: int, iteration: int, name: str) -> bool:
        shift = first + iteration // 2
        if not name.endswith(".distcp"):
            return rank == shift % ranks
        return rank == (2 * int(name[2]) + int(name[4]) + shift) % ranks

    return sees


def merge_spread(
    roots: list[Path], save: Path, folder: Path, **options: Any
) -> list[list[MergeReport]]:
    """A merge of as many gloo ranks as there are roots."""
    options.setdefault("threads", 2)
    configs = [
        [MergeConfig(load=root, save=save, source_parallel=True, **options)] for root in roots
    ]
    return run_ranks(
        _merge_own, len(roots), folder, configs=configs, cuda_standin=False, timeout=120
    )


def _merge_own(configs: list[list[MergeConfig]]) -> list[MergeReport]:
    import torch.distributed as dist

    return [merge(config) for config in configs[dist.get_rank()]]


def assert_equal(output: Path, expected: Path) -> None:
    merged, tensors = load_tensors(output), load_tensors(expected)
    assert set(merged) == set(tensors)
    for key, tensor in tensors.items():
        assert same_bits(merged[key], tensor), key


@pytest.mark.parametrize("sees, ranks", [
    (whole_checkpoints(0, 0, 1, 1), 2),
    (whole_checkpoints(1, 0, 1, 0), 2),
    (whole_checkpoints(2, 0, 0, 1), 3),
    (shuffled(2), 2),
    (shuffled(3, first=2), 3),
    (own_files(2), 2),
])  # fmt: skip
def test_weights_have_the_bits_of_one_process(tmp_path: Path, sees: Sees, ranks: int) -> None:
    roots = spread(runs.DENSE, tmp_path, ranks, sees)
    ((report,), *_) = merge_spread(roots, tmp_path / "out", tmp_path, weights=WEIGHTS)
    sources = [load_tensors(runs.checkpoint(runs.DENSE, i)) for i in runs.ITERATIONS]
    merged = load_tensors(report.output)
    assert set(merged) == set(sources[0])
    for key, tensor in merged.items():
        total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
        assert same_bits(tensor, rounded(total, tensor.dtype)), key
