"""Flat buckets as megatron-core lays them out over TP and PP ranks: every main param is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mcore import GPTConfig, run_ranks
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.optimizer.flat_main_params import find_flat_main_params
from wsm_megatron.optimizer.main_params import check_main_params

ITERATIONS, WEIGHTS = (1, 2, 3), (0.2, 0.3, 0.5)
FLAT = {
    "norms on both TP ranks": GPTConfig(tensor_parallel=2),
    "an embedding on both PP ranks": GPTConfig(pipeline_parallel=2, tied_embeddings=True),
    "several buckets": GPTConfig(overlap_grad_reduce=True, bucket_size=5000),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(_train_all, 2, folder, root=folder / "runs", configs=FLAT, timeout=300)
    return folder / "runs"


def _train_all(root: Path, configs: dict[str, GPTConfig]) -> None:
    from tests.mcore.bed import build, save_checkpoint, train

    for name, config in configs.items():
        training = build(config)
        for _ in ITERATIONS:
            train(training, 1)
            save_checkpoint(training, root / name)


@pytest.mark.parametrize("name", FLAT)
def test_every_model_tensor_is_rounded_from_its_main_param(
    trained: Path, tmp_path: Path, name: str
) -> None:
    config = MergeConfig(
        load=trained / name,
        save=tmp_path / "out",
        weights=WEIGHTS,
        optimizer_state="last",
        allow_lr_decay=True,  # the first checkpoint is of the warm-up
    )
    output = merge(config).output
    paths = [trained / name / f"iter_{i:07d}" for i in ITERATIONS]
    sources, merged = [load_tensors(path) for path in paths], load_tensors(output)
    flat = find_flat_main_params(read_layout(paths[-1]))
    assert flat.missing == {} and flat.unknown == {}
    for (key, region), place in flat.places.items():
        mains = [one[place.bucket][place.start :][: region.numel] for one in sources]
        main = rounded(weighted_sum64(WEIGHTS, mains), mains[0].dtype)
        where = tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))
        assert same_bits(merged[key][where].reshape(-1), main.to(merged[key].dtype)), key
    found = check_main_params(read_layout(output))
    assert (found.wrong, found.without, found.unknown) == ((), (), 0)
    verify(output, sources=True, allow_nonfinite=True)
