"""What cannot be averaged: quantised weights, factors of adapters, variances below zero."""

from __future__ import annotations

import pytest
import torch

from tests import runs
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, MergeError, merge
from wsm_megatron.planning.adapters import adapter_pairs
from wsm_megatron.planning.integers import _by_parent, _partners

INTEGERS = "embedding.word_embeddings.weight"
SCALES = "output_layer.weight"
WEIGHTS = (0.25, 0.25, 0.25, 0.25)


def quantised_run(tmp_path, scale, *, seeds=runs.ITERATIONS, dtype=torch.int8, grid=None):
    """A run with an integer tensor, made from a seed a checkpoint, and floats by any name."""
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for i, seed in zip(runs.ITERATIONS, seeds, strict=True):
        drawn = torch.Generator().manual_seed(seed)

        def change(key, tensor, drawn=drawn):
            if key != INTEGERS:
                return tensor
            return torch.randint(0, 100, tensor.shape, generator=drawn, dtype=dtype)

        runs.rewrite(
            runs.checkpoint(run, i),
            change,
            grid=grid if i == 4 else None,
            rename=lambda key: scale if key == SCALES else key,
        )
    return run


def run_merge(run, out, **options):
    options = {"weights": WEIGHTS, **options}
    return load_tensors(merge(MergeConfig(load=run, save=out, **options)).output)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("name", ["weight_scale", "weight.absmax", "scales", "qzeros", "SCB",
                                  "weight_quantizer._scale", "weight_scale_inv"])  # fmt: skip
def test_scales_are_not_merged_beside_other_integers(name, dtype, tmp_path):
    scale = INTEGERS.replace("weight", name)
    run = quantised_run(tmp_path, scale, dtype=dtype)
    with pytest.raises(ValueError) as caught:
        run_merge(run, tmp_path / "out")
    message = str(caught.value)
    assert "iter_0000008" in message and INTEGERS in message and scale in message
    assert not (tmp_path / "out").exists()
    assert message.endswith("take both from the newest: --copy 'embedding.*'")
    merged = run_merge(run, tmp_path / "out", copy=("embedding.*",))  # the way out
    newest = load_tensors(runs.checkpoint(run, 8))
    assert all(same_bits(merged[key], newest[key]) for key in (INTEGERS, scale))


@pytest.mark.parametrize("grid", [None, runs.split_axis(0, 3)])
def test_equal_integers_are_fine_however_they_are_cut(grid, tmp_path, caplog):
    scale = f"{INTEGERS}_scale"
    run = quantised_run(tmp_path, scale, seeds=(1, 1, 1, 1), grid=grid)
    merged = run_merge(run, tmp_path / "out")
    sources = [load_tensors(runs.checkpoint(run, i)) for i in runs.ITERATIONS]
    total = weighted_sum64(WEIGHTS, [source[scale] for source in sources])
    assert same_bits(merged[scale], rounded(total, torch.bfloat16))
    assert same_bits(merged[INTEGERS], sources[0][INTEGERS])
    assert "integer tensors differ" not in caplog.text


@pytest.mark.parametrize("grid", [None, runs.split_axis(0, 3)])
def test_one_source_of_other_integers_is_enough(grid, tmp_path):
    run = quantised_run(tmp_path, f"{INTEGERS}_scale", seeds=(1, 2, 1, 1), grid=grid)
    with pytest.raises(ValueError, match=f"{INTEGERS} is torch.int8 and differs"):
        run_merge(run, tmp_path / "out")


def test_other_integers_that_differ_are_named(tmp_path, caplog):
    run = quantised_run(tmp_path, "output_layer.weight")
    merged = run_merge(run, tmp_path / "out")
    assert f"are copied from the newest: {INTEGERS}" in caplog.text
    assert same_bits(merged[INTEGERS], load_tensors(runs.checkpoint(run, 8))[INTEGERS])
    caplog.clear()
    run_merge(run, tmp_path / "said", copy=(INTEGERS,))
    assert "integer tensors differ" not in caplog.text


def test_partners_are_told_by_their_names():
    beside = _by_parent(
        ["a.x.weight_scale", "a.x.bias", "a.x.layer_norm_weight", "a.y.scale", "a.x.weight.absmax",
         "b.weight_scale", "scale", "a.x.qzeros"]
    )  # fmt: skip
    assert _partners("a.x.weight", beside) == [
        "a.x.weight_scale",
        "a.x.weight.absmax",
        "a.x.qzeros",
    ]
    assert _partners("a.y.weight", beside) == ["a.y.scale"]
    assert _partners("a.z.weight", beside) == [] and _partners("ids", beside) == ["scale"]


@pytest.mark.parametrize("first, second", [
    ("x.linear_qkv.lora_A.weight", "x.linear_qkv.lora_B.weight"),
    ("x.q_proj.lora_A.default.weight", "x.q_proj.lora_B.default.weight"),
    ("x.linear_fc1.adapter.linear_in.weight", "x.linear_fc1.adapter.linear_out.weight"),
    ("x.lora_adapter.linear_in.weight", "x.lora_adapter.linear_out.weight"),
    ("x.lora_down.weight", "x.lora_up.weight"),
    ("x.lora_embedding_A", "x.lora_embedding_B"),
])  # fmt: skip
def test_factors_of_adapters_are_named(first, second, tmp_path, caplog):
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    names = {INTEGERS: first, SCALES: second}
    for i in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(run, i), rename=lambda key: names.get(key, key))
    run_merge(run, tmp_path / "out")
    assert f"{first} and {second} are factors of adapters (LoRA)" in caplog.text
    caplog.clear()
    run_merge(run, tmp_path / "copied", copy=(first,))
    assert "factors of adapters" not in caplog.text


def test_what_is_no_adapter():
    assert adapter_pairs(["x.lora_A.weight", "y.lora_B.weight"]) == []
    assert adapter_pairs(["x.linear_in.weight", "x.linear_out.weight"]) == []
    assert adapter_pairs(["decoder.linear_fc1.weight", "decoder.linear_fc2.weight"]) == []


VARIANCE = "decoder.norm.running_var"


def run_with_variance(tmp_path):
    """Variances that shrink: what lies beyond the newest is below zero."""
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for n, i in enumerate(runs.ITERATIONS):
        runs.rewrite(
            runs.checkpoint(run, i),
            lambda key, t, n=n: t.float().abs() / 4**n if key == INTEGERS else t,
            rename=lambda key: VARIANCE if key == INTEGERS else key,
        )
    return run


def test_extrapolation_makes_no_negative_variance(tmp_path):
    run, weights = run_with_variance(tmp_path), (-0.5, 0.0, 0.0, 1.5)
    with pytest.raises(MergeError, match=f"{VARIANCE}: .*negative.*--buffers last"):
        run_merge(run, tmp_path / "out", weights=weights)
    merged = run_merge(run, tmp_path / "last", weights=weights, buffers="last")
    newest = load_tensors(runs.checkpoint(run, 8))
    assert same_bits(merged[VARIANCE], newest[VARIANCE])
    assert (run_merge(run, tmp_path / "mean")[VARIANCE] >= 0).all()
