"""A merge summed on a GPU has the bits of one summed on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, merge
from wsm_megatron.execution.device import choose_device, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("run", [runs.DENSE, runs.FULLY, runs.FLAT, runs.MOE])
@pytest.mark.parametrize("decay", ["linear", "mean,1-sqrt,ema"])
def test_same_bits(tmp_path, run, decay):
    options = {"load": RUNS / run, "decay": decay}
    options["optimizer_state"] = "drop" if run == runs.DENSE else "merge"
    on_cpu = merge(MergeConfig(save=tmp_path / "cpu", **options), ExecutionOptions(device="cpu"))
    on_gpu = ExecutionOptions(device="cuda", threads=4)
    on_cuda = merge(MergeConfig(save=tmp_path / "cuda", **options), on_gpu)
    for left, right in zip(on_cpu.merged, on_cuda.merged, strict=True):
        expected, found = load_tensors(left.output), load_tensors(right.output)
        for key, tensor in expected.items():
            assert same_bits(found[key], tensor), key


def test_wrong_mains_are_refused(tmp_path):
    options = {"load": RUNS / runs.WRONG_MAINS, "optimizer_state": "last"}
    with pytest.raises(MergeError, match="does not belong to the model tensor"):
        merge(MergeConfig(save=tmp_path / "out", **options), ExecutionOptions(device="cuda"))


def test_the_measured_choice():
    rates = measure(torch.device("cuda", 0), sources=8, merges=1)
    assert min(rates.host, rates.cpu, rates.copy, rates.device) > 0
    chosen = choose_device("auto", 8, 1, 10**12, threads=4)
    assert chosen.staged is rates.choose(4)[0] or "measured" in chosen.reason
