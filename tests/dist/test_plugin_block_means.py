"""Block means on real megatron-core ranks: the merge, what a restart makes of it, and training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist.test_plugin_driver import Run
from tests.dist.test_plugin_refill import _warnings
from tests.mcore import CONFIGS, GPTConfig, run_ranks
from tests.reference import rounded, same_bits, weighted_sum64
from wsm_megatron import UsageError, verify
from wsm_megatron.cli.main import main
from wsm_megatron.schedule.decay import coefficients

EVERY, INTERVAL, NUM = 2, 4, 3
DECAY = "1-sqrt"
DP2 = CONFIGS["dp2-fully_reshardable"]
TP2 = GPTConfig(tensor_parallel=2, sharding_type="fully_reshardable")


def _wsm(training: Any, kept: Path | None = None, num: int = NUM, **options: Any) -> Any:
    from wsm_megatron.plugin.config import WSMConfig
    from wsm_megatron.plugin.wsm import WSM

    options = {"decay": DECAY, "average_every": EVERY, **options}
    config = WSMConfig(num=num, store="memory" if kept is None else "disk", **options)
    return WSM(training.model, training.optimizer, config, kept)


def _tokens(training: Any) -> int:
    return training.consumed_samples * training.config.seq_length


def _owned(wsm: Any) -> dict[str, torch.Tensor]:
    """What this rank owns of main params, buffers and moments, copied."""
    return {shard.name: shard.owned().float().clone() for shard in wsm._shards}


def _merge_all(configs: dict[str, GPTConfig]) -> dict[str, Any]:
    return {name: _merge_one(config) for name, config in configs.items()}


def _merge_one(config: GPTConfig) -> dict[str, Any]:
    """Points and snapshots of a run, its merge, and whether it trained as without the plugin."""
    from tests.mcore.bed import build, differences, snapshot, train

    training = build(config)
    wsm = _wsm(training, optimizer_state="merge")
    points: dict[int, dict[str, torch.Tensor]] = {}
    for iteration in range(1, 15):
        train(training, 1)
        if iteration % INTERVAL == 0 or iteration == 14:
            wsm.snapshot(iteration, _tokens(training))
        wsm.add_step(iteration)
        if iteration % EVERY == 0:
            points[iteration] = _owned(wsm)
    before = snapshot(training)
    with wsm.merged() as merge:
        merged = _owned(wsm)
    undone = differences(before, snapshot(training))
    averaged = [wsm.averaged(i) for i in merge.iterations]
    train(training, 1)
    wsm.close()
    plain = build(config)
    train(plain, 15)
    return {
        "points": points,
        "merged": merged,
        "iterations": merge.iterations,
        "positions": merge.positions,
        "averaged": averaged,
        "undone": undone,
        "after": differences(snapshot(training), snapshot(plain)),
        "losses": training.losses == plain.losses,
    }


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("blocks")
    return run_ranks(_merge_all, 2, folder, configs=CONFIGS, timeout=300)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_merge_is_that_of_all_points(merged: list[dict[str, Any]], name: str) -> None:
    """Bit for bit with each mean rounded to float32, and within that rounding of the one sum of
    all points in float64."""
    for report in (result[name] for result in merged):
        assert report["iterations"] == (8, 12, 14)
        blocks = ((6, 8), (10, 12), (14,))
        weights = coefficients(report["positions"], DECAY)
        for key, actual in report["merged"].items():
            values = {i: point[key] for i, point in report["points"].items()}
            if key.startswith(("main.", "buffer.")):
                sources = [_mean([values[i] for i in block]) for block in blocks]
                shares = [c / len(b) for c, b in zip(weights, blocks, strict=True) for _ in b]
                explicit = weighted_sum64(shares, [values[i] for block in blocks for i in block])
                largest = np.maximum.reduce([v.abs().numpy() for v in values.values()], initial=0)
                assert (np.abs(actual.double().numpy() - explicit) <= largest * 2.0**-23).all()
            else:  # moments are of the snapshots
                sources = [values[block[-1]] for block in blocks]
            expected = rounded(weighted_sum64(weights, sources), torch.float32)
            assert same_bits(actual, expected), (name, key)
        ends = [report["points"][block[-1]] for block in blocks]
        some = next(key for key in report["merged"] if key.startswith("main."))
        plain = rounded(weighted_sum64(weights, [end[some] for end in ends]), torch.float32)
        assert not same_bits(report["merged"][some], plain), "the points make a difference"


def _mean(points: list[torch.Tensor]) -> torch.Tensor:
    total = np.zeros(points[0].shape)
    for point in points:
        total = total + point.numpy().astype(np.float64)
    return rounded(total / len(points), torch.float32)


def test_what_was_averaged_is_said(merged: list[dict[str, Any]]) -> None:
    for report in (one for result in merged for one in result.values()):
        assert report["averaged"] == [
            {"mean": {"every": 2, "first": 6, "last": 8, "points": 2}},
            {"mean": {"every": 2, "first": 10, "last": 12, "points": 2}},
            {},
        ]


def test_training_is_as_without_it(merged: list[dict[str, Any]]) -> None:
    for result in merged:
        for name, report in result.items():
            assert report["undone"] == [] and report["after"] == [] and report["losses"], name


def test_buffers_are_averaged_with_the_main_params(merged: list[dict[str, Any]]) -> None:
    for result in merged:
        keys = result["moe-ep2"]["merged"]
        assert any(key.startswith("buffer.") and key.endswith("expert_bias") for key in keys)
        assert any(key.startswith("exp_avg.") for key in keys)


def _first_run(run: Path) -> dict[str, torch.Tensor]:
    """Saved every 4 iterations up to 16, and at 14 as a job that ends; merged at 16."""
    from tests.mcore.bed import build, save_checkpoint, train

    training = build(DP2)
    wsm = _wsm(training, run / "kept")
    for iteration in range(1, 17):
        train(training, 1)
        if iteration % INTERVAL == 0:
            wsm.snapshot(iteration, _tokens(training))
        wsm.add_step(iteration)
        if iteration % INTERVAL == 0 or iteration == 14:
            save_checkpoint(training, run / "run")
        if iteration == 12:
            wsm.settle()
            _copy_once(run / "kept", run / "kept12")
    with wsm.merged():
        merged = _owned(wsm)
    wsm.close()
    return merged


def _copy_once(source: Path, target: Path) -> None:
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()


def _restart(
    run: Path, kept: Path | None, at: int, available: tuple[int, ...] = (), **changes: Any
) -> dict[str, Any]:
    """Go on from an iteration to 16, and merge."""
    from tests.mcore.bed import build, load_checkpoint, train

    training = build(changes.pop("config", DP2))
    load_checkpoint(training, run / "run", at)

    def load(iteration: int) -> int:
        steps = training.scheduler.num_steps
        load_checkpoint(training, run / "run", iteration)
        training.scheduler.num_steps = steps
        return _tokens(training)

    wsm = _wsm(training, kept, **changes)
    with _warnings() as warned:
        wsm.refill(at, _tokens(training), available, load if available else None)
    while training.iteration < 16:
        train(training, 1)
        if training.iteration % INTERVAL == 0:
            wsm.snapshot(training.iteration, _tokens(training))
        wsm.add_step(training.iteration)
    with wsm.merged() as merge:
        merged = _owned(wsm)
    averaged = [wsm.averaged(i).get("mean", {}).get("points", 1) for i in merge.iterations]
    wsm.close()
    kept_iterations = merge.iterations
    return {
        "merged": merged,
        "warned": warned,
        "points": dict(zip(kept_iterations, averaged, strict=True)),
    }


def _scenarios(run: Path, kept: dict[str, Path]) -> dict[str, dict[str, Any]]:
    every = (4, 8, 12)
    return {
        "disk": _restart(run, kept["disk"], 12),
        "memory": _restart(run, None, 12, every),
        "inside": _restart(run, kept["inside"], 14),
        "layout": _restart(run, kept["layout"], 12, every, config=TP2),
        "gap": _restart(run, kept["gap"], 12, every),
        "differ": _restart(run, kept["differ"], 12, every),
        "given up": _restart(run, kept["given up"], 12, average_every=None),
    }


@pytest.fixture(scope="module")
def restarts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = tmp_path_factory.mktemp("restarts")
    first = run_ranks(_first_run, 2, run, run=run, timeout=200)
    names = ("disk", "inside", "layout", "gap", "differ", "given up")
    kept = {name: Path(shutil.copytree(run / "kept12", run / name)) for name in names}
    (kept["gap"] / "iter_0000008" / "rank_00001.safetensors").unlink()
    _say_another_block(kept["differ"] / "iter_0000008" / "rank_00001.safetensors")
    reports = run_ranks(_scenarios, 2, run, run=run, kept=kept, timeout=300)
    for one, other in zip(reports[0].values(), reports[1].values(), strict=True):
        assert one["points"] == other["points"] and other["warned"] == []
    return [{"whole": whole, **report} for whole, report in zip(first, reports, strict=True)]


def _say_another_block(file: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, framework="pt") as opened:
        header = dict(opened.metadata())
    header["block"] = header["block"].replace('"points": 2', '"points": 3')
    save_file(load_file(file), file, metadata=header)


def _same(report: dict[str, Any], other: dict[str, torch.Tensor]) -> bool:
    return all(same_bits(tensor, other[key]) for key, tensor in report["merged"].items())


def test_a_restart_from_disk_is_the_uninterrupted_run(restarts: list[dict[str, Any]]) -> None:
    for rank in restarts:
        assert rank["disk"]["points"] == {8: 2, 12: 2, 16: 2} and rank["disk"]["warned"] == []
        assert _same(rank["disk"], rank["whole"])


@pytest.mark.parametrize("name", ["memory", "layout"])
def test_refilled_snapshots_count_as_they_are(restarts: list[dict[str, Any]], name: str) -> None:
    """Their means ended with the job; the first rank says so."""
    for rank in restarts:
        assert rank[name]["points"] == {8: 1, 12: 1, 16: 2}
    assert not _same(restarts[0]["memory"], restarts[0]["whole"])
    (warning,) = restarts[0][name]["warned"]
    assert "of iterations [4, 8, 12] the snapshots are merged" in warning


@pytest.mark.parametrize("name", ["gap", "differ"])
def test_a_mean_that_some_rank_lacks_counts_on_none(
    restarts: list[dict[str, Any]], name: str
) -> None:
    for rank in restarts:
        assert rank[name]["points"] == {8: 1, 12: 2, 16: 2}
    assert "of iterations [8] the snapshots" in restarts[0][name]["warned"][0]


def test_half_a_block_is_over_what_is_left_of_it(restarts: list[dict[str, Any]]) -> None:
    for rank in restarts:
        assert rank["inside"]["points"] == {8: 2, 12: 2, 16: 1}
    assert "started from iteration 14, of which the window" in restarts[0]["inside"]["warned"][0]


def test_a_run_that_wants_no_means_any_more_merges_snapshots(
    restarts: list[dict[str, Any]],
) -> None:
    for rank in restarts:
        assert rank["given up"]["points"] == {8: 1, 12: 1, 16: 1}
        assert rank["given up"]["warned"] == []


def _driven(root: Path) -> dict[str, Any]:
    """Megatron-LM's loop; then one that has a NaN in the middle of a block on one rank."""
    from tests.mcore.bed import build, differences, snapshot, train

    options = {"num": 3, "interval": 4, "average_every": 2, "decay": DECAY, "eval": True}
    run = Run(root / "a", train_iters=14, save_interval=8, **options)
    run.attach()
    run.train()
    plain = build(run.training.config)
    train(plain, 14)
    report: dict[str, Any] = {"after": differences(snapshot(run.training), snapshot(plain))}
    report["log"] = run.log
    with _warnings() as report["warned"]:
        report["kept"] = _with_nan()
    return report


def _with_nan() -> list[int]:
    import torch.distributed as dist

    from tests.mcore.bed import build, main_params, train

    training = build(DP2)
    wsm = _wsm(training)
    for iteration in range(1, 17):
        train(training, 1)
        if iteration % INTERVAL == 0:
            wsm.snapshot(iteration, _tokens(training))
        element = main_params(training)[0].data.view(-1)[:1]
        before = element.clone()
        if iteration == 6 and dist.get_rank() == 1:
            element.fill_(float("nan"))
        wsm.add_step(iteration)
        element.copy_(before)
    wsm.settle()
    kept = [c.iteration for c in wsm.kept]
    with wsm.merged():
        assert all(bool(tensor.isfinite().all()) for tensor in _owned(wsm).values())
    wsm.close()
    return kept


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("driven")
    first, second = run_ranks(_driven, 2, root / "logs", root=root, timeout=200)
    assert first["after"] == second["after"] == [] and first["kept"] == second["kept"]
    return root, first


def test_a_nan_within_a_block_is_a_bad_snapshot(driven: tuple[Path, dict[str, Any]]) -> None:
    assert driven[1]["kept"] == [4, 12, 16]
    (warning,) = driven[1]["warned"]
    assert "window without iteration 8: rank 1" in warning and "NaN or Inf in mean.main." in warning


def test_a_merged_checkpoint_says_what_was_averaged(
    driven: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = driven[0] / "a" / "wsm" / "iter_0000014"
    sources = json.loads((merged / "wsm_merge.json").read_text())["sources"]
    assert [s["iteration"] for s in sources] == [8, 12, 14]
    assert [s.get("mean") for s in sources] == [
        {"every": 2, "first": 6, "last": 8, "points": 2},
        {"every": 2, "first": 10, "last": 12, "points": 2},
        None,
    ]
    assert ["path" in s for s in sources] == [False, False, True], "14 itself was saved"
    verify(merged)
    with pytest.raises(UsageError, match="iterations 8, 12 stand for means over many steps"):
        verify(merged, sources=True)
    main(["inspect", str(merged)])
    assert "iterations 8 (mean of 2 steps), 12 (mean of 2 steps), 14\n" in capsys.readouterr().out
    assert any(line.startswith("wsm 12 False") for line in driven[1]["log"]), "evaluated"
