"""Runs of megatron-core 0.14 and 0.15, whose ``.metadata`` holds classes of Megatron's own."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.inspection.inspect import inspect_checkpoint

OLDER = Path(__file__).parents[1] / "data" / "older"
CORE_0_14, CORE_0_15 = "mcore0.14-dense-dp2", "mcore0.15-dense-dp2-fully_reshardable"


@pytest.fixture(autouse=True)
def _classes_of_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """For PyTorch's own loader, which imports what ``.metadata`` names."""
    names = ["megatron", "core", "dist_checkpointing", "strategies", "torch"]
    for n in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:n]), types.ModuleType(names[n - 1]))
    strategies = sys.modules[".".join(names)]
    monkeypatch.setattr(strategies, "MCoreMetadata", Metadata, raising=False)
    monkeypatch.setattr(strategies, "MCoreSavePlan", SavePlan, raising=False)


@pytest.mark.parametrize("run", [CORE_0_14, CORE_0_15])
def test_weights_are_merged(run: str, tmp_path: Path) -> None:
    output = merge(MergeConfig(load=OLDER / run, save=tmp_path, weights=(0.25, 0.75))).output
    sources = [load_tensors(OLDER / run / f"iter_{i:07d}") for i in (6, 8)]
    merged = load_tensors(output)
    assert len(merged) == 9
    for key, tensor in merged.items():
        expected = weighted_sum64([0.25, 0.75], [source[key] for source in sources])
        assert same_bits(tensor, rounded(expected, tensor.dtype)), key
    verify(output, sources=True)
    verify(OLDER / run / "iter_0000008")
    assert inspect_checkpoint(OLDER / run / "iter_0000008").summary.iteration == 8


def test_optimizer_state_of_0_15_is_merged(tmp_path: Path) -> None:
    config = MergeConfig(load=OLDER / CORE_0_15, save=tmp_path, optimizer_state="last")
    output = merge(config).output
    sources = [load_tensors(OLDER / CORE_0_15 / f"iter_{i:07d}") for i in (6, 8)]
    merged = load_tensors(output)
    assert merged.keys() == sources[-1].keys()
    for key, tensor in merged.items():
        if not key.startswith("optimizer.state.param."):
            continue
        main = rounded(weighted_sum64([0.5, 0.5], [s[key] for s in sources]), tensor.dtype)
        assert same_bits(tensor, main), key
        model = key.removeprefix("optimizer.state.param.")
        assert same_bits(merged[model], main.to(merged[model].dtype)), model


def test_flattened_optimizer_state_of_0_14_is_merged(tmp_path: Path) -> None:
    """Main params in fragments, each flat; here a fragment is a layer, so the order is the same."""
    run = OLDER / CORE_0_14
    sources = [load_tensors(path) for path in sorted(run.glob("iter_*"))]
    weights = tuple([1 / len(sources)] * len(sources))
    config = MergeConfig(load=run, save=tmp_path, optimizer_state="last", weights=weights)
    merged = load_tensors(merge(config).output)
    mains = {model: key for key in merged if (model := main_of(key))}
    assert mains and any(merged[key].shape != merged[model].shape for model, key in mains.items())
    for model, key in mains.items():
        expected = rounded(weighted_sum64(weights, [s[key] for s in sources]), torch.float32)
        assert same_bits(merged[key], expected), key
        weight = merged[model]
        assert same_bits(weight.flatten(), expected.to(weight.dtype).flatten()), model


def test_what_megatron_attaches_is_read() -> None:
    data = read_layout(OLDER / CORE_0_14 / "iter_0000008").mcore_data
    key = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    assert data[key] == {"nd_reformulated_orig_global_shape": (2, 128, 32)}
