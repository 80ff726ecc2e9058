"""Real megatron-core ranks resume from merged checkpoints: nothing moves in a step with LR 0.

One step is what tells: main params overwrite the model in it. The same check fails for a checkpoint
with merged weights and unmerged main params, which is what merging the weights alone leaves behind.
"""

from __future__ import annotations

import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.mcore import CONFIGS, GPTConfig, run_ranks
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, merge
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.optimizer.main_params import check_main_params

ITERATIONS = (2, 3, 4)
NEWEST = f"iter_{ITERATIONS[-1]:07d}"
AFTER = f"iter_{ITERATIONS[-1] + 1:07d}"
WEIGHTS = (0.2, 0.3, 0.5)
RESHARDED = {
    "tp2": GPTConfig(optimizer="replicated"),
    "pp2": GPTConfig(tensor_parallel=2, sharding_type="fully_reshardable"),
}
FIXTURES = {
    runs.MAIN: GPTConfig(),  # saved by Megatron main, written as core 0.16 does
    runs.FLAT: GPTConfig(),
    runs.MOE: CONFIGS["moe-ep2"],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout trained, merged, and loaded into ranks that take one step with LR 0.

    ``run/NAME`` is the run, ``merged/NAME`` its merge, ``undone/NAME`` the same with the newest
    main params; ``before/NAME``, ``after/NAME``, ... are saved before and after the step.
    """
    folder = tmp_path_factory.mktemp("resumed")
    run_ranks(_train_all, 2, folder, root=folder / "run", timeout=500)
    for name in CONFIGS:
        save = folder / "merged" / name
        merge(
            MergeConfig(
                load=folder / "run" / name, save=save, weights=WEIGHTS, optimizer_state="last"
            )
        )
        shutil.copytree(save, folder / "undone" / name)
        undo_mains(folder / "undone" / name / NEWEST, folder / "run" / name / NEWEST)
    for name in FIXTURES:
        config = MergeConfig(
            load=RUNS / name,
            save=folder / "fixtures" / name,
            decay="mean",
            to=4,
            optimizer_state="merge",
            format="0.16",
        )
        merge(config)
    jobs = [(folder / "merged" / name, name, config) for name, config in CONFIGS.items()]
    jobs += [(folder / "undone" / name, f"undone-{name}", c) for name, c in CONFIGS.items()]
    jobs += [(folder / "merged" / n, f"resharded-{n}", c) for n, c in RESHARDED.items()]
    jobs += [(folder / "fixtures" / name, name, config) for name, config in FIXTURES.items()]
    run_ranks(_step_all, 2, folder, jobs=jobs, out=folder, timeout=500)
    return folder


def _train_all(root: Path) -> None:
    from tests.mcore.bed import build, save_checkpoint, train

    for name, config in CONFIGS.items():
        training = build(config)
        train(training, 1)
        for _ in ITERATIONS:
            train(training, 1)
            save_checkpoint(training, root / name)


def _step_all(jobs: list[tuple[Path, str, GPTConfig]], out: Path) -> None:
    from tests.mcore.bed import build, load_checkpoint, save_checkpoint, sub_optimizers, train

    for load, name, config in jobs:
        training = build(replace(config, seed=config.seed + 1))
        load_checkpoint(training, load, load_rng=False)
        save_checkpoint(training, out / "before" / name)
        for optimizer in sub_optimizers(training):
            for group in optimizer.optimizer.param_groups:
                group["lr"] = group["weight_decay"] = 0.0
        train(training, 1)
        save_checkpoint(training, out / "after" / name)


def undo_mains(path: Path, newest: Path) -> None:
    """Put the newest source's main params into a merged checkpoint."""
    unmerged, entries = load_tensors(newest), read_layout(path).tensors
    runs.rewrite(path, lambda key, t: unmerged[key] if entries[key].role is Role.MAIN else t)


def same_weights(one: Path, other: Path) -> list[str]:
    """Model tensors and main params that differ; buckets by what they hold of the model.

    Main params that ``other`` has in flat buckets only (core 0.15 saves what 0.14 saved by key)
    are looked for in there.
    """
    left, right, entries = load_tensors(one), load_tensors(other), read_layout(one).tensors
    buckets = [right[key].numpy().tobytes() for key in right if ".bucket_idx_" in key]
    keyed = [
        key
        for key, entry in entries.items()
        if entry.role in (Role.MODEL, Role.MAIN) and ".bucket_idx_" not in key
    ]
    differing = [
        key
        for key in keyed
        if not (
            same_bits(left[key], right[key])
            if key in right or entries[key].role is Role.MODEL
            else _is_held(left[key], buckets)
        )
    ]
    for key, entry in entries.items():
        if entry.role is Role.MAIN and ".bucket_idx_" in key:
            where = (left[key] != right[key]).nonzero().flatten().tolist()
            # Norms of 32 elements are padded to 64 with uninitialised memory.
            differing += [f"{key}[{i}]" for i in where if i % 64 < 32]
    return differing


def _is_held(main: torch.Tensor, buckets: list[bytes]) -> bool:
    """Whether a bucket holds a main param, or buckets its layers where they are stacked."""
    held = any(main.numpy().tobytes() in bucket for bucket in buckets)
    return held or (main.dim() > 1 and all(_is_held(layer, buckets) for layer in main))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_merge_is_what_is_loaded(resumed: Path, name: str) -> None:
    merged = resumed / "merged" / name / NEWEST
    assert same_weights(merged, resumed / "before" / name / NEWEST) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_moves_in_a_step_with_lr_0(resumed: Path, name: str) -> None:
    merged = resumed / "merged" / name / NEWEST
    assert check_resume(merged).resumes
    assert same_weights(merged, resumed / "after" / name / AFTER) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_unmerged_main_params_undo_the_merge(resumed: Path, name: str) -> None:
    """The negative: loaded right, and after one step the weights are the newest source's again."""
    undone, newest = resumed / "undone" / name / NEWEST, resumed / "run" / name / NEWEST
    assert check_main_params(read_layout(undone)).wrong
    assert not check_resume(undone).resumes
    before, after = (resumed / when / f"undone-{name}" for when in ("before", "after"))
    assert same_weights(undone, before / NEWEST) == []
    moved = same_weights(undone, after / AFTER)
    assert moved
    assert same_weights(newest, after / AFTER) == []


@pytest.mark.parametrize("name", RESHARDED)
def test_other_parallel_sizes(resumed: Path, name: str) -> None:
    """TP2 -> DP2, PP2 -> TP2: where Megatron itself reshards optimizer state."""
    merged = resumed / "merged" / name / NEWEST
    assert check_resume(merged).any_sizes
    for when, folder in (("before", NEWEST), ("after", AFTER)):
        assert same_weights(merged, resumed / when / f"resharded-{name}" / folder) == [], when


@pytest.mark.parametrize("name", FIXTURES)
def test_checkpoints_of_other_versions(resumed: Path, name: str) -> None:
    """What Megatron-LM saved, main of 2026-08 included, loads in this megatron-core."""
    merged = resumed / "fixtures" / name / NEWEST
    for when, folder in (("before", NEWEST), ("after", AFTER)):
        assert same_weights(merged, resumed / when / name / folder) == [], when


def test_core_before_0_19_cannot_read_the_new_format(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.FLAT, save=tmp_path / "out", format="0.19")
    merge(config)
    messages: list[Any] = run_ranks(_try_to_load, 1, tmp_path, root=tmp_path / "out")
    assert "common.pt" in messages[0]
    assert check_resume(tmp_path / "out").readers == "core 0.19 and later"


def _try_to_load(root: Path) -> str:
    from tests.mcore.bed import build, load_checkpoint

    try:
        load_checkpoint(build(GPTConfig()), root, load_optim=False, load_rng=False)
    except Exception:  # core 0.16.1 stumbles over its own message
        return traceback.format_exc()
    return "loaded"
