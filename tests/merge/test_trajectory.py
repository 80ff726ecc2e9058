"""The path of a run from its checkpoints: what is told is what the tensors say, of one read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, UsageError, merge
from wsm_megatron.api import trajectory
from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.inspection.trajectory import read_trajectory
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.run import SweepOptions, sweep
from wsm_megatron.trajectory.record import Trajectory

WATCHING = ExecutionOptions(trajectory=True)


def read(run: Path, **options) -> Trajectory:
    found = trajectory(MergeSet.of(MergeConfig(load=run, save=run / "none", **options)))
    assert found is not None
    return found


def model(run: Path, iteration: int) -> np.ndarray:
    """All model weights of a checkpoint in one row of float64, in the order of their keys."""
    tensors = load_tensors(runs.checkpoint(run, iteration))
    chosen = [
        tensors[key].double().reshape(-1).numpy()
        for key in sorted(tensors)
        if tensors[key].is_floating_point() and "optimizer" not in key and "expert_bias" not in key
    ]
    return np.concatenate(chosen)


@pytest.mark.parametrize("name", [runs.DENSE, runs.MOE, runs.MAIN])
def test_norms_distances_and_angles_are_those_of_the_tensors(name: str) -> None:
    found = read(RUNS / name).weights
    points = np.stack([model(RUNS / name, i) for i in runs.ITERATIONS])
    updates = np.diff(points, axis=0)
    np.testing.assert_allclose(found.norms, np.linalg.norm(points, axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.updates, updates @ updates.T, rtol=1e-9, atol=1e-12)
    assert found.gram.elements == points.shape[1]


def test_layers_are_told_apart_where_they_are_stacked() -> None:
    found = read(RUNS / runs.MOE)
    assert list(found.by_part) == [
        "decoder.final_layernorm",
        "decoder.layers.0",
        "decoder.layers.1",
        "embedding.word_embeddings",
        "output_layer.weight",
    ]
    assert set(found.by_role) == {"model", "buffer"}
    layers = [
        np.concatenate(
            [
                tensor[1].double().reshape(-1).numpy()
                for key, tensor in load_tensors(runs.checkpoint(RUNS / runs.MOE, i)).items()
                if key.startswith("decoder.layers.") and "expert_bias" not in key
                and tensor.is_floating_point()
            ]
        )
        for i in runs.ITERATIONS
    ]  # fmt: skip
    steps = np.linalg.norm(np.diff(np.stack(layers), axis=0), axis=1)
    np.testing.assert_allclose(found.by_part["decoder.layers.1"].steps, steps, rtol=1e-9)


def test_main_params_are_the_weights_where_they_are_merged() -> None:
    run = RUNS / runs.FP32_PARAM
    found = read(run, optimizer_state="last")
    points = []
    for iteration in runs.ITERATIONS:
        tensors = load_tensors(runs.checkpoint(run, iteration))
        mains = sorted(key for key in tensors if main_of(key))
        points.append(np.concatenate([tensors[k].double().reshape(-1).numpy() for k in mains]))
    np.testing.assert_allclose(found.weights.norms, np.linalg.norm(points, axis=1), rtol=1e-12)
    assert set(found.by_role) == {"main param"}


@pytest.mark.parametrize("name", runs.ALL)
def test_real_runs_raise_no_alarm(name: str) -> None:
    assert read(RUNS / name).warnings() == []


def plant(run: Path, tmp_path: Path, change) -> Path:
    """A copy in which the weights of iteration 6 are others."""
    copy = runs.copy_run(run.name, tmp_path / "run")
    runs.rewrite(runs.checkpoint(copy, 6), change)
    return copy


def spiked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return (tensor + 0.02 * noise).to(tensor.dtype)


def test_a_planted_spike_is_named_by_inspect_and_plan(tmp_path: Path, capsys) -> None:
    run = plant(RUNS / runs.DENSE, tmp_path, spiked)
    assert main(["inspect", str(run), "--trajectory"]) == 0
    shown = capsys.readouterr().out
    assert f"warning: {run / 'iter_0000006'} is off the run's path" in shown
    command = ["plan", "--load", str(run), "--save", str(tmp_path / "out"), "--trajectory"]
    assert main([*command, "--json"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    (warning,) = json.loads(last)["trajectory"]["warnings"]
    assert "iter_0000006" in warning and not (tmp_path / "out").exists()


def test_a_merge_names_a_planted_source_before_it_publishes(tmp_path: Path, caplog) -> None:
    run = plant(RUNS / runs.DENSE, tmp_path, spiked)
    merge(MergeConfig(load=run, save=tmp_path / "out"), WATCHING)
    named = [one for one in caplog.messages if "off the run's path" in one]
    assert len(named) == 1 and "iter_0000006" in named[0]


def test_another_run_s_checkpoint_under_an_iteration_s_name_is_named(tmp_path: Path) -> None:
    other = load_tensors(runs.checkpoint(RUNS / runs.MAIN, 6))
    shuffled = {key: t.flatten().flip(0).reshape(t.shape) for key, t in other.items()}
    run = plant(
        RUNS / runs.DENSE,
        tmp_path,
        lambda key, t: shuffled[key].to(t.dtype) if t.is_floating_point() else t,
    )
    (stray,) = read(run).strays
    assert (stray.place, stray.rule) == (2, "detour")


def test_nan_is_named_by_its_checkpoint(tmp_path: Path) -> None:
    def poison(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key == "output_layer.weight":
            tensor[0, 0] = torch.nan
        return tensor

    found = read(plant(RUNS / runs.DENSE, tmp_path, poison))
    (warning,) = found.warnings()
    assert "iter_0000006: 1 weights are NaN or Inf" in warning
    assert np.isfinite(found.weights.steps).all()


def test_a_merge_has_it_of_the_same_read(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.MOE, save=tmp_path / "one", optimizer_state="merge")
    plain = merge(config)
    watched = merge(MergeConfig(**{**vars(config), "save": tmp_path / "two"}), WATCHING)
    assert watched.bytes_read == plain.bytes_read and plain.trajectory is None
    assert watched.trajectory is not None and watched.trajectory.missing == 0
    alone = read(RUNS / runs.MOE, optimizer_state="merge")
    np.testing.assert_allclose(watched.trajectory.weights.norms, alone.weights.norms, rtol=1e-13)
    assert "moment" in watched.trajectory.by_role
    for file in (tmp_path / "one/iter_0000008").glob("*.distcp"):
        same = tmp_path / "two/iter_0000008" / file.name
        assert same.read_bytes() == file.read_bytes()


def test_a_sweep_has_it_of_all_sources_and_writes_it(tmp_path: Path) -> None:
    base = MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out")
    done = sweep(Sweep(base, SweepGrid(last=(2, 3, 4))), WATCHING)
    assert done is not None and done.trajectory is not None
    written = read_trajectory(tmp_path / "out" / "trajectory.json")
    assert [one.iteration for one in written.points] == list(runs.ITERATIONS)
    assert written.as_data() == done.trajectory.as_data()
    again = sweep(Sweep(base, SweepGrid(last=(2, 3, 4))), WATCHING)
    assert again is not None and again.trajectory is None and again.bytes_read == 0
    with pytest.raises(UsageError, match="--batch"):
        sweep(Sweep(base, SweepGrid()), WATCHING, SweepOptions(batch=2, eval="echo 1"))


def test_what_cannot_be_is_refused(tmp_path: Path, capsys) -> None:
    run = str(RUNS / runs.DENSE)
    assert main(["inspect", f"{run}/iter_0000002", "--trajectory"]) == EXIT_USAGE
    assert main(["inspect", run, "--last", "2"]) == EXIT_USAGE
    assert main(["inspect", run, "--trajectory", "--window-tokens", "1k,2k"]) == EXIT_USAGE
    assert "one window at a time" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--node-local"):
        ExecutionOptions(trajectory=True, node_local=True)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    assert main(["inspect", str(RUNS / runs.DENSE), "--trajectory", "--out", str(tmp_path)]) == 0
    good = tmp_path / "trajectory.json"
    data = json.loads(good.read_text())
    for name, value in (("groups", []), ("positions", [1]), ("format", 9), ("sources", 3)):
        good.write_text(json.dumps(data | {name: value}))
        with pytest.raises(MergeError, match=r"trajectory\.json"):
            read_trajectory(good)


def test_a_source_that_is_damaged_on_disk_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(RUNS / runs.DENSE, copy)
    file = next(iter(sorted(runs.checkpoint(copy, 4).glob("*.distcp"))))
    runs.flip_byte(file, file.stat().st_size // 2)
    with pytest.raises(MergeError):
        read(copy)
