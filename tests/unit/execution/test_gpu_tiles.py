"""The path over a device, with a CPU in its place, and the choice between CPU and GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, merge
from wsm_megatron.execution import device, gpu_tiles, rank
from wsm_megatron.execution.device import Device, Rates, choose_device, measure

STAND_IN = Device(torch.device("cpu"), "a CPU in place of a device", staged=True)


def staged_merge(monkeypatch, **options):
    """A merge whose tiles are all staged, small ones so that there are many."""
    with monkeypatch.context() as patch:
        patch.setattr(rank, "choose_device", lambda *_: STAND_IN)
        patch.setattr(device, "STAGED_BYTES", 2**14)
        patch.setattr("wsm_megatron.execution.memory_budget.LEAST_ELEMENTS", 64)
        return merge(MergeConfig(**options), ExecutionOptions(threads=2))


@pytest.mark.parametrize("run", [runs.FULLY, runs.FLAT, runs.MOE])
@pytest.mark.parametrize("options", [{}, {"optimizer_state": "merge", "decay": "mean,ema"}])
def test_staged_merges_have_the_same_bits(tmp_path, monkeypatch, run, options):
    options = {"load": RUNS / run, **options}
    started = []
    start = gpu_tiles.StagedTile.start
    monkeypatch.setattr(
        gpu_tiles.StagedTile, "start", lambda tile: (started.append(1), start(tile))
    )
    staged = staged_merge(monkeypatch, save=tmp_path / "staged", **options)
    assert started
    expected = merge(MergeConfig(save=tmp_path / "expected", **options))
    assert len(staged.merged) == len(expected.merged)
    for left, right in zip(staged.merged, expected.merged, strict=True):
        ours, theirs = load_tensors(left.output), load_tensors(right.output)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert same_bits(ours[key], tensor), key


def test_staged_merges_name_what_is_wrong(tmp_path, monkeypatch):
    options = {"load": RUNS / runs.WRONG_MAINS, "optimizer_state": "last"}
    with pytest.raises(MergeError, match="does not belong to the model tensor"):
        staged_merge(monkeypatch, save=tmp_path / "mains", **options)
    run = runs.copy_run(runs.DENSE, tmp_path / "run")

    def spoil(key, tensor):
        if "linear_fc1" in key:
            tensor.view(-1)[-1] = float("nan")
        return tensor

    runs.rewrite(run / "iter_0000004", change=spoil)
    with pytest.raises(MergeError, match="iter_0000004.*linear_fc1.* holds NaN or Inf"):
        staged_merge(monkeypatch, load=run, save=tmp_path / "nan")
    staged_merge(monkeypatch, load=run, save=tmp_path / "let", allow_nonfinite=True)


@pytest.mark.filterwarnings("ignore")
def test_staged_merge_through_the_triton_kernel(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.unit.execution.test_gpu_tiles", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same bits\n"


def interpreted(folder: str) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    from pathlib import Path

    from wsm_megatron import kernels
    from wsm_megatron.kernels import triton_kernel

    options, alone = {"load": RUNS / runs.FULLY, "iterations": (4, 8)}, ExecutionOptions(threads=1)
    expected = load_tensors(merge(MergeConfig(save=Path(folder) / "cpu", **options), alone).output)
    kernels._native = kernels._triton
    kernels._path.cache_clear()
    calls = []
    launch = triton_kernel.launch
    triton_kernel.launch = lambda *arguments: (calls.append(1), launch(*arguments))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "choose_device", lambda *_: STAND_IN)
        config = MergeConfig(save=Path(folder) / "triton", **options)
        found = load_tensors(merge(config, alone).output)
    assert calls
    assert all(same_bits(found[key], tensor) for key, tensor in expected.items())
    print("same bits")


RATE = st.floats(1e6, 1e13)


@given(RATE, RATE, RATE, RATE, st.integers(1, 64))
def test_the_device_is_taken_only_where_it_is_faster(host, cpu, copy, summed, threads):
    rates = Rates(host, cpu, copy, summed)
    worth, reason = rates.choose(threads)
    assert worth == (rates.on_device(threads) > 1.1 * rates.on_cpu(threads))
    assert rates.on_device(threads) <= min(copy, summed)
    assert f"{threads} CPU threads" in reason and "GB/s" in reason


def test_choice_without_a_measurement(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not choose_device("cpu", 8, 1, 10**12, 4).staged
    assert "too little" in choose_device("auto", 8, 1, 10**9, 4).reason
    assert choose_device("auto", 8, 1, 10**12, 4).reason == "no CUDA device"
    with pytest.raises(ValueError, match="no CUDA device"):
        choose_device("cuda", 8, 1, 10**12, 4)


def test_choice_by_measurement(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for copy, staged in ((1e9, False), (1e11, True)):
        monkeypatch.setattr(device, "measure", lambda *_, copy=copy: Rates(6e9, 1e10, copy, 1e12))
        chosen = choose_device("auto", 8, 1, 10**12, threads=8, local_rank=3)
        assert chosen.staged is staged
        assert chosen.torch_device == torch.device("cuda", 1) if staged else torch.device("cpu")
        assert "measured" in chosen.reason


def test_rates_are_measured():
    rates = measure(torch.device("cpu"), sources=3, merges=2)
    assert min(rates.host, rates.cpu, rates.copy, rates.device) > 0


if __name__ == "__main__":
    interpreted(sys.argv[1])
