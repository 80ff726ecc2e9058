"""A merged value that its dtype cannot hold is refused, wherever it is rounded to it."""

from __future__ import annotations

import pytest
import torch

from tests import runs
from tests.reference import load_tensors, same_bits
from tests.unit.execution.test_gpu_tiles import staged_merge
from tests.unit.optimizer.test_flat_main_params import BUCKET, FC2, LAYER
from wsm_megatron import MergeConfig, MergeError, merge
from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.kernels import reference
from wsm_megatron.optimizer.representation import round_main

KEY = "decoder.final_layernorm.weight"
OVERFLOW = f"{KEY}: the merged values overflow torch.float16 although every source is finite"
OPTIONS = [
    {"optimizer_state": "drop"},
    {"optimizer_state": "last"},
    {"optimizer_state": "last", "rebuild_main_params": True},
    {"optimizer_state": "merge", "decay": "mean,1-sqrt"},
]


def run_with(values, tmp_path, name=runs.FP32_PARAM, key=KEY):
    """A run with one model tensor, and its main param, of the same value in every element."""
    run = runs.copy_run(name, tmp_path / "run")
    for i, value in zip(runs.ITERATIONS, values, strict=True):
        runs.rewrite(
            runs.checkpoint(run, i),
            lambda k, t, v=value: torch.full_like(t, v) if key in (k, main_of(k)) else t,
        )
    return run


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp16(options, tmp_path):
    run = run_with([131072.0] * 4, tmp_path)
    with pytest.raises(MergeError, match=OVERFLOW):
        merge(MergeConfig(load=run, save=tmp_path / "out", dtype="fp16", **options))
    assert not list((tmp_path / "out").glob("iter*"))
    let = {**options, "dtype": "fp16", "allow_nonfinite": True}
    output = merge(MergeConfig(load=run, save=tmp_path / "let", **let)).merged[-1].output
    assert torch.isinf(load_tensors(output)[KEY]).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp16_on_a_device(options, tmp_path, monkeypatch):
    run = run_with([131072.0] * 4, tmp_path)
    options = {"load": run, "save": tmp_path / "out", "dtype": "fp16", **options}
    with pytest.raises(MergeError, match=OVERFLOW):
        staged_merge(monkeypatch, **options)
    staged_merge(monkeypatch, **{**options, "allow_nonfinite": True})


def test_fp16_without_the_compiled_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr("wsm_megatron.kernels._path", lambda _: (reference.bind, "eager"))
    run = run_with([131072.0] * 4, tmp_path)
    with pytest.raises(MergeError, match=OVERFLOW):
        merge(MergeConfig(load=run, save=tmp_path / "out", dtype="fp16", optimizer_state="last"))


def test_largest_values_that_fit(tmp_path):
    """65504 is fp16's largest; what rounds to it is no overflow, what rounds up is."""
    for value, fits in ((65504.0, True), (65519.0, True), (65520.0, False)):
        main, model = torch.full((3,), value), torch.empty(3, dtype=torch.float16)
        main[1] = -value
        assert round_main(main, model) is fits
        assert torch.isfinite(model).all() == fits
    main = torch.tensor([1.0, float("nan")])
    assert not round_main(main, torch.empty(2, dtype=torch.float16))
    assert round_main(main, torch.empty(2))  # the sum has told
    assert round_main(torch.empty(0), torch.empty(0, dtype=torch.float16))


@pytest.mark.parametrize("rebuild_main_params", [False, True])
def test_a_float32_sum_beyond_bfloat16(rebuild_main_params, tmp_path):
    """Finite as float32, infinite as bfloat16, whose largest value is 255 x 2**120."""
    run = run_with([254 * 2.0**120, 1.0, 1.0, 255 * 2.0**120], tmp_path)
    config = MergeConfig(
        load=run,
        save=tmp_path / "out",
        weights=(-0.75, 0.0, 0.0, 1.75),  # 255.75 x 2**120
        optimizer_state="last",
        rebuild_main_params=rebuild_main_params,
    )
    with pytest.raises(MergeError, match=f"{KEY}: the merged values overflow torch.bfloat16"):
        merge(config)


def test_in_flat_buckets_small_main_params_are_not_padding(tmp_path):
    """A main param of 32 elements, off the grid of 64: as padding, it would be let through."""
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    key = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    starts = [FC2[layer] + LAYER["mlp.linear_fc1.layer_norm_weight"] for layer in (0, 1)]

    def change(name, tensor):
        if name == key:
            tensor[:] = torch.tensor([[131072.0], [262144.0]])
        if name == BUCKET:
            for start, value in zip(starts, (131072.0, 262144.0), strict=True):
                tensor[start : start + 32] = value
        return tensor

    for i in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(run, i), change)
    with pytest.raises(MergeError, match=f"{key}: the merged values overflow torch.float16"):
        merge(MergeConfig(load=run, save=tmp_path / "out", dtype="fp16", optimizer_state="last"))
    merged = load_tensors(
        merge(MergeConfig(load=run, save=tmp_path / "same", optimizer_state="last")).output
    )
    expected = torch.tensor([[131072.0], [262144.0]]).expand(2, 32).bfloat16()
    assert same_bits(merged[key], expected)
