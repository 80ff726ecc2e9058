"""Optimizer state as core 0.14 keeps it (``fully_sharded_model_space``): each fragment flat.

Made of runs whose state has the model's shapes, which merge by another way, to the same bits.
"""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.keys import Role, model_of
from wsm_megatron.checkpoint.layout import Layout, read_layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.inspection.megatron_resume import check_resume

WEIGHTS = (0.2, 0.3, 0.5)
Grid = tuple[int, ...]


def grid_of(layout: Layout, key: str) -> Grid:
    """How many chunks the model tensor has along each axis."""
    chunks = layout.tensors[key].chunks
    return tuple(len(set(axis)) for axis in zip(*(c.offsets for c in chunks), strict=True))


def fragmented(tensor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Of shape ``(*grid, elements of a fragment)``."""
    sizes = [part for n, size in zip(grid, tensor.shape, strict=True) for part in (n, size // n)]
    order = [*range(0, len(sizes), 2), *range(1, len(sizes), 2)]
    return tensor.reshape(sizes).permute(order).reshape(*grid, -1)


def whole(tensor: torch.Tensor, grid: Grid, shape: tuple[int, ...]) -> torch.Tensor:
    """The other way round."""
    parts = [size // n for n, size in zip(grid, shape, strict=True)]
    order = [axis for i in range(len(grid)) for axis in (i, i + len(grid))]
    return tensor.reshape(*grid, *parts).permute(order).reshape(shape)


def run_of_fragments(name: str, to: Path, finer: int = 1) -> tuple[Path, dict[str, Grid]]:
    """A run's copy with its state in fragments, along the last axis ``finer`` than the model's;
    and the grids by model key."""
    run, grids = runs.copy_run(name, to), {}
    for path in sorted(run.glob("iter_*")):
        grids = _to_fragments(path, finer)
    return run, grids


def _to_fragments(path: Path, finer: int) -> dict[str, Grid]:
    layout = read_layout(path)
    of = {key: model for key in layout.tensors if (model := model_of(key))}
    grids: dict[str, Grid] = {}
    for model in of.values():
        *others, last = grid_of(layout, model)
        grids[model] = (*others, last * finer)

    def pieces(key: str, shape: tuple[int, ...]) -> list[Region]:
        if key not in of:
            return [Region(c.offsets, c.sizes) for c in layout.tensors[key].chunks]
        leads = itertools.product(*map(range, shape[:-1]))
        return [Region((*lead, 0), (*[1] * len(lead), shape[-1])) for lead in leads]

    runs.rewrite(
        path,
        change=lambda key, t: fragmented(t, grids[of[key]]) if key in of else t,
        grid=pieces,
    )
    return grids


def with_mains_of(path: Path, other: Path) -> None:
    """Put another checkpoint's main params in place of a checkpoint's."""
    theirs, entries = load_tensors(other), read_layout(path).tensors
    runs.rewrite(path, lambda key, t: theirs[key] if entries[key].role is Role.MAIN else t)


def merged(run: Path, out: Path, state: str) -> Path:
    config = MergeConfig(load=run, save=out, last=3, weights=WEIGHTS, optimizer_state=state)
    return merge(config).output


@pytest.mark.parametrize("state", ["last", "merge", "drop"])
@pytest.mark.parametrize("name", [runs.FULLY, runs.FP32_PARAM])
def test_fragments_merge_as_what_they_are_of(name: str, state: str, tmp_path: Path) -> None:
    run, grids = run_of_fragments(name, tmp_path / "run")
    output = merged(run, tmp_path / "out", state)
    expected = load_tensors(merged(RUNS / name, tmp_path / "expected", state))
    found = load_tensors(output)
    assert set(found) == set(expected)
    for key, tensor in found.items():
        model = model_of(key)
        if model is not None:
            grid, shape = grids[model], tuple(found[model].shape)
            assert tuple(tensor.shape) == (*grid, prod(shape) // prod(grid))
            tensor = whole(tensor, grid, shape)
        assert same_bits(tensor, expected[key]), key
    verify(output, sources=True)
    assert check_resume(output).resumes == (state != "drop")


def test_stale_main_params_in_fragments_are_found(tmp_path: Path) -> None:
    run, _ = run_of_fragments(runs.FULLY, tmp_path / "run")
    output = merged(run, tmp_path / "out", "last")
    with_mains_of(output, run / "iter_0000008")
    assert check_resume(output).mains.wrong


@pytest.mark.parametrize("iteration", [4, 8])
def test_every_source_is_checked(iteration: int, tmp_path: Path) -> None:
    run, _ = run_of_fragments(runs.FULLY, tmp_path / "run")
    with_mains_of(run / f"iter_{iteration:07d}", run / "iter_0000006")
    with pytest.raises(MergeError, match=f"iter_{iteration:07d}.*main param"):
        merged(run, tmp_path / "out", "last")


def test_fragments_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    run, _ = run_of_fragments(runs.FULLY, tmp_path / "run", finer=2)
    with pytest.raises(ValueError, match=r"in other pieces than the model; use .*drop"):
        merged(run, tmp_path / "out", "last")
    config = MergeConfig(load=run, save=tmp_path / "out", last=3, optimizer_state="drop")
    assert check_resume(merge(config).output).optimizer is None
