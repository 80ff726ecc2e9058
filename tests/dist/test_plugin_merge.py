"""Merging inside a run on real megatron-core ranks: exact, undone, and training unchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mcore import CONFIGS, GPTConfig, run_ranks
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge
from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.schedule.decay import coefficients

LAYOUTS = CONFIGS | {"pp2-tied": GPTConfig(pipeline_parallel=2, tied_embeddings=True)}
ITERATIONS = (2, 3, 5)
DECAY = "1-sqrt"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Every configuration trained, saved, kept and merged; what each rank reports of it."""
    folder = tmp_path_factory.mktemp("plugin")
    root = folder / "runs"
    return root, run_ranks(_merge_all, 2, folder, root=root, configs=LAYOUTS, timeout=300)


def _merge_all(root: Path, configs: dict[str, GPTConfig]) -> dict[str, Any]:
    return {name: _merge_one(root, name, config) for name, config in configs.items()}


def _merge_one(root: Path, name: str, config: GPTConfig) -> dict[str, Any]:
    from tests.mcore.bed import build, differences, save_checkpoint, snapshot, train
    from wsm_megatron.plugin.config import WSMConfig
    from wsm_megatron.plugin.wsm import WSM

    training = build(config)
    wsm = WSM(training.model, training.optimizer, WSMConfig(num=3, decay=DECAY))
    for iteration in range(1, 6):
        train(training, 1)
        if iteration != 4:  # uneven spacing; iteration 1 leaves the window again
            wsm.snapshot(iteration, training.consumed_samples * config.seq_length)
        if iteration in ITERATIONS:
            save_checkpoint(training, root / name)
    before = snapshot(training)
    with wsm.merged() as merge:
        changed = differences(before, snapshot(training))
        consistent = _weights_follow_mains(training)
        weights = _digest(training)
        save_checkpoint(training, root / f"{name}-merged")
    undone = differences(before, snapshot(training))
    train(training, 1)
    wsm.close()
    plain = build(config)
    train(plain, 6)
    return {
        "changed": changed,
        "consistent": consistent,
        "weights": weights,
        "undone": undone,
        "after": differences(snapshot(training), snapshot(plain)),
        "losses": training.losses == plain.losses,
        "coefficients": merge.coefficients,
        "iterations": merge.iterations,
    }


def _weights_follow_mains(training: Any) -> bool:
    """Whether every model weight is its main param, rounded."""
    from wsm_megatron.plugin.optimizers import parts

    for part in parts(training.optimizer):
        for main in part.main_params():
            value = main.stepped.detach().view(-1)
            own = main.param.detach().view(-1)[main.offset : main.offset + value.numel()]
            if not same_bits(own, value.to(own.dtype)):
                return False
    return True


def _digest(training: Any) -> str:
    digest = hashlib.sha256()
    for param in training.model[0].parameters():
        digest.update(param.detach().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_swap_changes_weights_and_undoes_it(
    merged: tuple[Path, list[dict[str, Any]]],
) -> None:
    for ranks in zip(*(result.items() for result in merged[1]), strict=True):
        for name, report in ranks:
            assert any(".main" in key for key in report["changed"]), name
            assert any(key.startswith("model.") for key in report["changed"]), name
            assert not any("exp_avg" in key for key in report["changed"]), name
            assert report["consistent"], f"{name}: model weights are not the merged mains"
            assert report["undone"] == [], name


def test_training_goes_on_as_without_the_plugin(
    merged: tuple[Path, list[dict[str, Any]]],
) -> None:
    for result in merged[1]:
        for name, report in result.items():
            assert report["after"] == [] and report["losses"], name


def test_data_parallel_replicas_hold_the_same_merge(
    merged: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = merged[1]
    for name in CONFIGS:
        if name.startswith("dp2"):
            assert first[name]["weights"] == second[name]["weights"], name


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_saved_is_the_merge(
    merged: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
) -> None:
    """Against a float64 reference over the run's checkpoints, and against ``wsm merge``."""
    root, reports = merged
    positions = [8.0 * i for i in ITERATIONS]
    for report in reports:
        assert report[name]["iterations"] == ITERATIONS
        assert report[name]["coefficients"] == coefficients(positions, DECAY)
    actual = load_tensors(root / f"{name}-merged" / "iter_0000005")
    _assert_is_merge(root / name, actual, coefficients(positions, DECAY))
    offline = merge(
        MergeConfig(
            load=root / name,
            save=tmp_path,
            iterations=ITERATIONS,
            decay=DECAY,
            optimizer_state="last",
        )
    )
    for key, tensor in load_tensors(offline.output).items():
        if ".bucket_idx_" in key:
            _assert_same_bucket(actual[key], tensor, key)
        else:
            assert same_bits(actual[key], tensor), key


def _assert_is_merge(run: Path, actual: dict[str, torch.Tensor], weights: Any) -> None:
    sources = [load_tensors(run / f"iter_{i:07d}") for i in ITERATIONS]
    entries = read_layout(run / "iter_0000005").tensors
    mains = {main_of(key): key for key in entries if main_of(key)}
    assert set(actual) == set(entries)
    for key, tensor in actual.items():
        role = entries[key].role
        source = mains.get(key, key)
        total = weighted_sum64(weights, [tensors[source] for tensors in sources])
        if role is Role.MOMENT:
            _assert_same_bucket(tensor, sources[-1][key], key)
        elif ".bucket_idx_" in key:
            _assert_same_bucket(tensor, rounded(total, torch.float32), key)
        elif role is Role.MODEL and not mains:
            # Only flat buckets on disk: the reference has but the bf16 weights, rounded already.
            largest = torch.stack([t[key].double().abs() for t in sources]).amax(0)
            assert ((tensor.double() - torch.from_numpy(total)).abs() <= largest * 2**-7).all(), key
        else:
            expected = rounded(total, sources[-1][source].dtype).to(tensor.dtype)
            assert same_bits(tensor, expected), key


def _assert_same_bucket(actual: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    """Equal but for padding after norms of 32 elements, which is uninitialised memory."""
    differing = (actual.view(-1) != expected.view(-1)).nonzero().flatten()
    if ".bucket_idx_" in key:
        assert all(int(i) % 64 >= 32 for i in differing), key
    else:
        assert len(differing) == 0, key
