"""Merges of checkpoints that real megatron-core ranks saved, loaded back by megatron-core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mcore import CONFIGS, WRONG_MAINS, GPTConfig, run_ranks
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, MergeError, MergeReport, merge
from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.optimizer.main_params import check_main_params

ITERATIONS = (2, 3, 4)
WEIGHTS = (0.2, 0.3, 0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every configuration, three checkpoints each."""
    folder = tmp_path_factory.mktemp("trained")
    configs = {**CONFIGS, "wrong-mains": WRONG_MAINS}
    run_ranks(_train_all, 2, folder, root=folder / "runs", configs=configs, timeout=300)
    return folder / "runs"


def _train_all(root: Path, configs: dict[str, GPTConfig]) -> None:
    from tests.mcore.bed import build, save_checkpoint, train

    for name, config in configs.items():
        training = build(config)
        train(training, 1)
        for _ in ITERATIONS:
            train(training, 1)
            save_checkpoint(training, root / name)


def merged_by_reference(run: Path, optimizer_state: str) -> dict[str, Any]:
    """What the merged checkpoint must hold, tensor by tensor."""
    sources = [load_tensors(run / f"iter_{i:07d}") for i in ITERATIONS]
    entries = read_layout(run / f"iter_{ITERATIONS[-1]:07d}").tensors
    mains = {main_of(key): key for key in entries if main_of(key)}
    expected = {}
    for key, newest in sources[-1].items():
        role = entries[key].role
        if optimizer_state == "drop" and role not in (Role.MODEL, Role.BUFFER):
            continue
        if role is Role.MOMENT and optimizer_state == "last":
            expected[key] = newest
            continue
        source = mains[key] if key in mains and optimizer_state != "drop" else key
        total = weighted_sum64(WEIGHTS, [tensors[source] for tensors in sources])
        expected[key] = rounded(total, sources[-1][source].dtype).to(newest.dtype)
    return expected


def model_in_buckets(path: Path) -> list[str]:
    """Model tensors whose main params lie in flat buckets, from which they are rounded."""
    entries = read_layout(path).tensors
    if not any(".bucket_idx_" in key for key in entries):
        return []
    return [key for key, entry in entries.items() if entry.role is Role.MODEL]


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(actual[key], tensor), key


@pytest.mark.parametrize("optimizer_state", ["drop", "last"])
def test_megatron_core_loads_what_was_merged(
    trained: Path, tmp_path: Path, optimizer_state: str
) -> None:
    """Loaded by megatron-core and saved again by it, every tensor is still the merge."""
    for name in CONFIGS:
        config = MergeConfig(
            load=trained / name,
            save=tmp_path / "merged" / name,
            weights=WEIGHTS,
            optimizer_state=optimizer_state,
        )
        report = merge(config)
        assert report.iterations == ITERATIONS
        expected = merged_by_reference(trained / name, optimizer_state)
        actual = load_tensors(report.output)
        assert set(actual) == set(expected)
        for key in model_in_buckets(report.output):
            del actual[key], expected[key]
        assert_same(actual, expected)
        assert check_main_params(read_layout(report.output)).wrong == ()
    run_ranks(
        _load_and_save,
        2,
        tmp_path,
        merged=tmp_path / "merged",
        again=tmp_path / "again",
        load_optim=optimizer_state != "drop",
        timeout=300,
    )
    for name in CONFIGS:
        merged = load_tensors(tmp_path / "merged" / name / "iter_0000004")
        again = load_tensors(tmp_path / "again" / name / "iter_0000004")
        unpadded = {key: tensor for key, tensor in again.items() if ".bucket_idx_" not in key}
        assert_same(unpadded, {key: merged[key] for key in unpadded})
        assert_same_buckets(merged, again)


def assert_same_buckets(merged: dict[str, Any], again: dict[str, Any]) -> None:
    """Flat buckets are equal but for padding, which is saved from uninitialised memory."""
    for key in again:
        if ".bucket_idx_" in key:
            differing = (merged[key] != again[key]).nonzero().flatten()
            assert len(differing) < 64 * 40
            assert all(int(i) % 64 >= 32 for i in differing), key  # norms of 32 elements


def _load_and_save(merged: Path, again: Path, load_optim: bool) -> None:
    from tests.mcore.bed import build, load_checkpoint, save_checkpoint

    for name, config in CONFIGS.items():
        training = build(replace(config, seed=config.seed + 1))
        load_checkpoint(training, merged / name, load_optim=load_optim, load_rng=load_optim)
        assert training.iteration == ITERATIONS[-1]
        save_checkpoint(training, again / name, save_optim=load_optim, save_rng=load_optim)


def test_a_merge_loads_into_other_parallel_sizes(trained: Path, tmp_path: Path) -> None:
    """TP2 -> DP2, PP2 -> TP2, DP2 -> PP2, EP2 -> DP2, with the optimizer."""
    changes = {
        "tp2": GPTConfig(optimizer="replicated"),
        "pp2": GPTConfig(tensor_parallel=2, sharding_type="fully_reshardable"),
        "dp2-fully_reshardable": GPTConfig(pipeline_parallel=2, sharding_type="fully_reshardable"),
        "moe-ep2-fully_reshardable": replace(
            CONFIGS["moe-ep2-fully_reshardable"], expert_parallel=1
        ),
    }
    for name in changes:
        save = tmp_path / "merged" / name
        merge(MergeConfig(load=trained / name, save=save, weights=WEIGHTS, optimizer_state="last"))
    run_ranks(
        _load_elsewhere,
        2,
        tmp_path,
        merged=tmp_path / "merged",
        again=tmp_path / "again",
        changes=changes,
        timeout=300,
    )
    for name in changes:
        merged = load_tensors(tmp_path / "merged" / name / "iter_0000004")
        again = load_tensors(tmp_path / "again" / name / "iter_0000004")
        assert len(again) > 10
        assert_same(again, {key: merged[key] for key in again})


def _load_elsewhere(merged: Path, again: Path, changes: dict[str, GPTConfig]) -> None:
    from tests.mcore.bed import build, load_checkpoint, save_checkpoint

    for name, config in changes.items():
        training = build(replace(config, seed=config.seed + 1))
        # megatron-core does not turn EP2's two chained optimizers into EP1's one: weights only.
        with_optim = config.num_experts is None
        load_checkpoint(training, merged / name, load_optim=with_optim, load_rng=False)
        save_checkpoint(training, again / name, save_optim=with_optim, save_rng=False)


def test_sources_of_different_parallel_sizes(trained: Path, tmp_path: Path) -> None:
    """A run that was resumed with another layout: TP2, then PP2, then DP2, merged by weights."""
    run = tmp_path / "run"
    run.mkdir()
    for iteration, name in zip(ITERATIONS, ("tp2", "pp2", "dp2"), strict=True):
        folder = f"iter_{iteration:07d}"
        (run / folder).symlink_to(trained / name / folder)
    shapes = {len(read_layout(path).tensors[KEY].chunks) for path in run.iterdir()}
    assert len(shapes) > 1, "the layouts are the same"
    report = merge(MergeConfig(load=run, save=tmp_path / "out", weights=WEIGHTS))
    assert_same(load_tensors(report.output), merged_by_reference(run, "drop"))


KEY = "decoder.layers.mlp.linear_fc1.weight"


def test_wrong_mains_of_megatron_core_are_refused_and_rebuilt(
    trained: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"load": trained / "wrong-mains", "weights": WEIGHTS}
    with pytest.raises(MergeError, match="does not belong to the model tensor"):
        merge(MergeConfig(save=tmp_path / "no", optimizer_state="last", **options))
    config = MergeConfig(
        save=tmp_path / "yes", optimizer_state="last", rebuild_main_params=True, **options
    )
    merged = load_tensors(merge(config).output)
    for key, tensor in merged.items():
        if (model := main_of(key)) is not None:
            assert same_bits(tensor.to(merged[model].dtype), merged[model]), key


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_bits_of_one_process(trained: Path, tmp_path: Path, ranks: int) -> None:
    options: dict[str, Any] = {"weights": WEIGHTS, "optimizer_state": "merge"}
    names = ("moe-ep2", "pp2")
    configs = [
        MergeConfig(load=trained / name, save=tmp_path / "ranks" / name, **options)
        for name in names
    ]
    results = run_ranks(_merge_all, ranks, tmp_path, configs=configs, cuda_standin=False)
    for k, name in enumerate(names):
        alone = merge(MergeConfig(load=trained / name, save=tmp_path / "alone" / name, **options))
        for reports in results:
            assert reports[k].output == results[0][k].output
            assert reports[k].coefficients == alone.coefficients
            assert reports[k].bytes_read == alone.bytes_read
        output = results[0][k].output
        assert_same(load_tensors(output), load_tensors(alone.output))
        assert len(list(output.glob("*.distcp"))) == ranks


def _merge_all(configs: list[MergeConfig]) -> list[MergeReport]:
    return [merge(config) for config in configs]


FAILURES = [
    ("planning", 0),
    ("reading", 0),
    ("reading", 1),
    ("writing", 0),
    ("writing", 1),
    ("publishing", 0),
]
"""Stage and failing rank; only rank 0 plans and publishes."""


def test_a_failure_on_one_rank_is_raised_on_all(trained: Path, tmp_path: Path) -> None:
    config = MergeConfig(load=trained / "pp2", save=tmp_path / "out", weights=WEIGHTS)
    results = run_ranks(_fail_in_turn, 2, tmp_path, config=config, cuda_standin=False)
    for (stage, failing), *messages in zip(FAILURES, *results, strict=True):
        assert messages[failing] == "injected", stage
        assert messages[1 - failing].startswith(f"rank {failing} failed in"), stage
        assert messages[1 - failing].endswith("injected"), stage


def _fail_in_turn(config: MergeConfig) -> list[str]:
    return [_fail_in(config, stage, failing) for stage, failing in FAILURES]


def _fail_in(config: MergeConfig, stage: str, failing: int) -> str:
    """The message with which this rank's merge fails, having left nothing behind."""
    import torch.distributed as dist

    from wsm_megatron.access import shared
    from wsm_megatron.checkpoint import staging_dir, writer
    from wsm_megatron.storage import files

    def fail(*arguments: Any, **options: Any) -> Any:
        raise MergeError("injected")

    owner, name = {
        "planning": (shared, "prepare_job"),
        "reading": (files.SourceFiles, "read_some"),
        "writing": (writer.CheckpointFile, "_write"),
        "publishing": (staging_dir.StagingDirectory, "commit"),
    }[stage]
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == failing:
            patch.setattr(owner, name, fail)
        with pytest.raises(MergeError) as caught:
            merge(config)
    dist.barrier()
    assert list(config.save.glob("*")) == []
    return str(caught.value)
