"""A moving average on real megatron-core ranks: kept, evaluated, emitted, gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.dist.test_plugin_driver import Run
from tests.dist.test_plugin_refill import _warnings
from tests.mcore import CONFIGS, GPTConfig, run_ranks
from tests.reference import load_tensors, rounded, same_bits
from wsm_megatron import UsageError, verify
from wsm_megatron.inspection.megatron_resume import check_resume

HALF_LIFE, EVERY = 5, 2
DP2 = CONFIGS["dp2-fully_reshardable"]
TP2 = GPTConfig(tensor_parallel=2, sharding_type="fully_reshardable")


def _wsm(training: Any) -> Any:
    from wsm_megatron.plugin.config import WSMConfig
    from wsm_megatron.plugin.wsm import WSM

    return WSM(training.model, training.optimizer, WSMConfig(half_life=HALF_LIFE))


def _owned(wsm: Any) -> dict[str, torch.Tensor]:
    return {shard.name: shard.owned().float().clone() for shard in wsm._shards}


def _average_all(configs: dict[str, GPTConfig]) -> dict[str, Any]:
    return {name: _average_one(config) for name, config in configs.items()}


def _average_one(config: GPTConfig) -> dict[str, Any]:
    from tests.mcore.bed import build, differences, snapshot, train

    training = build(config)
    wsm = _wsm(training)
    samples: dict[int, dict[str, torch.Tensor]] = {}
    for iteration in range(1, 9):
        train(training, 1)
        if iteration in (2, 3, 6, 8):
            wsm.snapshot(iteration, iteration)
            samples[iteration] = _owned(wsm)
    before = snapshot(training)
    with wsm.merged() as merge:
        merged = _owned(wsm)
        changed = differences(before, snapshot(training))
    undone = differences(before, snapshot(training))
    train(training, 1)
    wsm.close()
    plain = build(config)
    train(plain, 9)
    return {
        "samples": samples,
        "merged": merged,
        "merge": (merge.iterations, merge.coefficients),
        "weights change": any(key.startswith("model.") for key in changed),
        "undone": undone,
        "after": differences(snapshot(training), snapshot(plain)),
        "losses": training.losses == plain.losses,
    }


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("averages")
    return run_ranks(_average_all, 2, folder, configs=CONFIGS, timeout=300)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_average_is_the_float64_reference(averages: list[dict[str, Any]], name: str) -> None:
    for report in (result[name] for result in averages):
        assert report["merge"] == ((8,), (1.0,)) and report["weights change"]
        assert any(key.startswith("main.") for key in report["merged"])
        for key, actual in report["merged"].items():
            values = {i: sample[key] for i, sample in report["samples"].items()}
            assert same_bits(actual, rounded(_reference(values), torch.float32)), (name, key)


def _reference(samples: dict[int, torch.Tensor]) -> np.ndarray:
    average, weight, last = np.zeros(0), np.float64(0), 0
    for iteration, sample in samples.items():
        value = sample.numpy().astype(np.float64)
        weight = np.float64(2.0) ** np.float64((last - iteration) / HALF_LIFE) * weight + 1
        average = value if last == 0 else average + (value - average) / weight
        last = iteration
    return average


def test_training_is_as_without_it(averages: list[dict[str, Any]]) -> None:
    for result in averages:
        for name, report in result.items():
            assert report["undone"] == [] and report["after"] == [] and report["losses"], name


OPTIONS = {"half_life": HALF_LIFE, "average_every": EVERY, "save_interval": 4}


def _train(run: Run) -> None:
    """To the end, where Megatron saves what was not saved in its turn."""
    run.train()
    if run.training.iteration % 2:
        with run.driver.saving(run._progress()):
            run._save()


def _driven(root: Path) -> dict[str, Any]:
    from tests.mcore.bed import build, differences, snapshot, train

    run = Run(root / "a", train_iters=13, eval=True, **OPTIONS)
    run.attach()
    _train(run)
    plain = build(run.training.config)
    train(plain, 13)
    report: dict[str, Any] = {"after": differences(snapshot(run.training), snapshot(plain))}
    report["log"] = run.log
    with _warnings() as report["nan warned"]:
        report["nan"] = _with_nan()
    return report


def _with_nan() -> bool:
    """Whether the average is as if the sample were not there, which has a NaN on one rank."""
    from tests.mcore.bed import build, main_params, train

    training = build(DP2)
    wsm, expected = _wsm(training), _wsm(training)
    for iteration in range(1, 5):
        train(training, 1)
        if iteration != 3:
            expected.snapshot(iteration, iteration)
        element = main_params(training)[0].data.view(-1)[:1]
        before = element.clone()
        if iteration == 3 and dist.get_rank() == 1:
            element.fill_(float("nan"))
        wsm.snapshot(iteration, iteration)
        element.copy_(before)
    with wsm.merged():
        merged = _owned(wsm)
    with expected.merged():
        same = all(same_bits(merged[name], one) for name, one in _owned(expected).items())
    wsm.close()
    expected.close()
    return same


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("driven")
    first, second = run_ranks(_driven, 2, root / "logs", root=root, timeout=200)
    assert first["after"] == second["after"] == [] and first["nan"] and second["nan"]
    return root, first


def test_it_is_evaluated_as_a_merge_is(driven: tuple[Path, dict[str, Any]]) -> None:
    lines = [line.split() for line in driven[1]["log"] if "timer" not in line]
    assert [line[:-1] for line in lines if line[0] == "wsm"] == [
        ["wsm", str(i), "False"] for i in (4, 8, 12)
    ]
    assert len({line[-1] for line in lines}) == 6


def test_a_merged_checkpoint_is_the_average(driven: tuple[Path, dict[str, Any]]) -> None:
    """Every second step, and the last of training, which is 13."""
    root = driven[0] / "a" / "wsm"
    assert sorted(p.name for p in root.glob("iter_*")) == [f"iter_{i:07d}" for i in (4, 8, 12, 13)]
    for iteration, samples in ((4, 2), (8, 4), (12, 6), (13, 7)):
        merged = root / f"iter_{iteration:07d}"
        verify(merged)
        assert check_resume(merged).launches
        (source,) = json.loads((merged / "wsm_merge.json").read_text())["sources"]
        said = source["moving_average"]
        assert (said["half_life"], said["unit"], said["samples"]) == (5, "iterations", samples)
        assert (
            source["iteration"] == said["last"]["iteration"] == iteration and "path" not in source
        )
        with pytest.raises(UsageError, match=f"iterations {iteration} stand for means over many"):
            verify(merged, sources=True)


def test_a_nan_on_one_rank_is_left_out_on_all(driven: tuple[Path, dict[str, Any]]) -> None:
    (warning,) = driven[1]["nan warned"]
    assert "moving average without iteration 3: rank 1: MergeError: NaN or Inf in main." in warning


def _restart(root: Path, at: int, until: int, **changes: Any) -> dict[str, Any]:
    """Go on from an iteration; what was warned of, loaded, and how far the average had come."""
    began = changes.pop("began", {})
    run = Run(root, train_iters=until, config=changes.pop("config", DP2), **{**OPTIONS, **changes})
    run.began = began
    with _warnings() as warned:
        run.restart(at)
    state = run.driver._wsm._moving._state
    with run.driver._wsm.merged():
        from tests.mcore.bed import save_checkpoint

        save_checkpoint(run.training, root / f"taken-up-{at}")
    loads = list(run.log)
    _train(run)
    return {
        "warned": warned,
        "loads": loads,
        "samples": state and (state.samples, state.last.iteration),
    }


def _scenarios(roots: dict[str, Path]) -> dict[str, Any]:
    return {
        "at": _restart(roots["at"], 8, 13),
        "after": _restart(roots["after"], 6, 8),
        "layout": _restart(roots["layout"], 8, 8, config=TP2),
        "length": _restart(roots["length"], 8, 8, half_life=HALF_LIFE + 1),
        "dropped": _restart(roots["dropped"], 8, 8),
        "branch": _restart(roots["branch"], 10, 10, began={10: 6}),
    }


@pytest.fixture(scope="module")
def restarts(
    driven: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("restarts")
    starts = {"at": 8, "after": 6, "layout": 8, "length": 8, "dropped": 8, "branch": 10}
    roots = {}
    for name, start in starts.items():
        roots[name] = Path(shutil.copytree(driven[0] / "a", folder / name))
        _forget_later(roots[name], start)
        _forget_later(roots[name] / "wsm", start)
    for iteration in (4, 8):
        _say_dropped(roots["dropped"] / "wsm" / f"iter_{iteration:07d}" / "wsm_merge.json")
    first, second = run_ranks(_scenarios, 2, folder / "logs", roots=roots, timeout=300)
    for name, report in first.items():
        assert report["samples"] == second[name]["samples"] and second[name]["warned"] == [], name
    return roots, first


def _forget_later(root: Path, start: int) -> None:
    for path in root.glob("iter_*"):
        if int(path.name.removeprefix("iter_")) > start:
            shutil.rmtree(path)
    left = max(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))
    (root / "latest_checkpointed_iteration.txt").write_text(str(left))


def _say_dropped(file: Path) -> None:
    from wsm_megatron.planning.provenance import seal

    contents = json.loads(file.read_text())
    del contents["crc32"]
    contents["options"]["optimizer_state"] = "drop"
    file.write_bytes(seal(contents))


def _same_tensors(one: Path, other: Path) -> bool:
    left, right = load_tensors(one), load_tensors(other)
    names = [key for key in left if "exp_avg" not in key]
    assert left.keys() == right.keys() and any(".fp32_param." in n or ".param." in n for n in names)
    return all(same_bits(left[name], right[name]) for name in names)


def test_a_restart_goes_on_bit_for_bit(
    driven: tuple[Path, dict[str, Any]], restarts: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    """From the merged checkpoint of its iteration: the later ones are the uninterrupted run's."""
    roots, reports = restarts
    assert reports["at"]["samples"] == (4, 8) and reports["at"]["warned"] == []
    assert reports["at"]["loads"] == ["load 8", "load 8"]
    for iteration in (12, 13):
        name = Path("wsm") / f"iter_{iteration:07d}"
        assert _same_tensors(driven[0] / "a" / name, roots["at"] / name)
        one, other = (
            json.loads((root / name / "wsm_merge.json").read_text())["sources"]
            for root in (driven[0] / "a", roots["at"])
        )
        one[0]["moving_average"]["last"].pop("began")
        assert other[0]["moving_average"]["last"].pop("began") == 8
        assert one == other


def test_samples_that_a_job_took_with_it_are_said(
    restarts: tuple[dict[str, Path], dict[str, Any]],
) -> None:
    """Started from 6, of which there is no merge: 2 and 4 are in the merge, then come 6 and 8."""
    report = restarts[1]["after"]
    assert report["samples"] == (2, 4)
    (warning,) = report["warned"]
    assert "goes on from merged checkpoint 4 at iteration 6: samples between" in warning
    file = restarts[0]["after"] / "wsm" / "iter_0000008" / "wsm_merge.json"
    assert json.loads(file.read_text())["sources"][0]["moving_average"]["samples"] == 4


def test_another_layout_goes_on_from_the_same_average(
    restarts: tuple[dict[str, Path], dict[str, Any]],
) -> None:
    roots, reports = restarts
    assert reports["layout"]["samples"] == (4, 8) and reports["layout"]["warned"] == []
    name = "iter_0000008"
    taken_up = roots["layout"] / "taken-up-8" / name
    assert _same_tensors(taken_up, roots["layout"] / "wsm" / name)


@pytest.mark.parametrize("name", ["length", "dropped"])
def test_what_is_not_the_average_is_not_gone_on_from(
    restarts: tuple[dict[str, Path], dict[str, Any]], name: str
) -> None:
    report = restarts[1][name]
    (warning,) = report["warned"]
    assert report["loads"] == [] and "begins anew at iteration 8: no merged checkpoint" in warning


def test_a_branch_that_was_given_up_is_not_gone_on_from(
    restarts: tuple[dict[str, Path], dict[str, Any]],
) -> None:
    """Merge 8 is of a job that started from 0, and the run at 10 came by way of one from 6."""
    report = restarts[1]["branch"]
    assert "window without iteration 8" in report["warned"][0]
    assert "goes on from merged checkpoint 4" in report["warned"][1]
