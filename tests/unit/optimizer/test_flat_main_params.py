"""Main params in flat buckets: found by content, merged, and the model rounded from them."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.cli.main import main as wsm
from wsm_megatron.errors import EXIT_FAILED
from wsm_megatron.optimizer.flat_buckets import FlatMainParam
from wsm_megatron.optimizer.flat_main_params import FlatMainParams, find_flat_main_params
from wsm_megatron.optimizer.main_params import check_main_params

WEIGHTS = (0.07, 0.21, 0.31, 0.41)
BUCKET = (
    "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
    ".bucket_idx_0.param"
)
LAYER = {  # where a layer's params start, from the start of its linear_fc2
    "mlp.linear_fc2.weight": 0,
    "mlp.linear_fc1.weight": 2048,
    "mlp.linear_fc1.layer_norm_weight": 6144,
    "self_attention.linear_qkv.weight": 6208,
    "self_attention.linear_proj.weight": 9280,
    "self_attention.linear_qkv.layer_norm_weight": 10304,
}
WHOLE = {"output_layer.weight": 0, "decoder.final_layernorm.weight": 4096}
WHOLE |= {"embedding.word_embeddings.weight": 24896}
FC2 = {1: 4160, 0: 14528}


def in_bucket(bucket: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors out of the bucket of the dense fixtures, params in reverse order."""
    found = {}
    for key, start in WHOLE.items():
        found[key] = bucket[start : start + like[key].numel()].view(like[key].shape)
    for suffix, offset in LAYER.items():
        key = f"decoder.layers.{suffix}"
        size = like[key][0].numel()
        layers = [bucket[FC2[layer] + offset :][:size] for layer in (0, 1)]
        found[key] = torch.stack(layers).view(like[key].shape)
    return found


def run_merge(run, out, execution=ExecutionOptions(), **options):
    options = {"optimizer_state": "last", "weights": WEIGHTS, **options}
    return merge(MergeConfig(load=run, save=out, **options), execution).output


@pytest.mark.parametrize("run", [runs.FLAT, runs.MAIN])
@pytest.mark.parametrize("state", ["last", "merge"])
def test_the_model_is_rounded_from_the_merged_main_params(run, state, tmp_path):
    output = run_merge(RUNS / run, tmp_path / "out", optimizer_state=state)
    sources = [load_tensors(runs.checkpoint(run, i)) for i in runs.ITERATIONS]
    merged = load_tensors(output)
    mains = rounded(weighted_sum64(WEIGHTS, [source[BUCKET] for source in sources]), torch.float32)
    expected = in_bucket(mains, sources[-1])
    assert len(expected) == 9
    for key, main in expected.items():
        assert same_bits(merged[key], main.to(torch.bfloat16)), key
    assert check_main_params(read_layout(output)).wrong == ()
    verify(output, sources=True, allow_nonfinite=True)


def test_a_moe_with_chained_optimizers(tmp_path):
    output = run_merge(RUNS / runs.MOE, tmp_path / "out")
    assert check_main_params(read_layout(output)).wrong == ()
    verify(output, sources=True, allow_nonfinite=True)


@pytest.mark.parametrize("run", [runs.FLAT, runs.MOE, runs.MAIN])
def test_every_chunk_of_the_model_is_found(run):
    layout = read_layout(runs.checkpoint(run, 8))
    chunks = [
        (key, Region(chunk.offsets, chunk.sizes))
        for key, entry in layout.tensors.items()
        if entry.role is Role.MODEL
        for chunk in entry.chunks
    ]
    assert set(find_flat_main_params(layout).places) == set(chunks)


def test_chunks_are_split(tmp_path, monkeypatch):
    from wsm_megatron.planning import plan

    monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 500)
    output = run_merge(RUNS / runs.FLAT, tmp_path / "out", ExecutionOptions(threads=2))
    monkeypatch.undo()
    straight = load_tensors(run_merge(RUNS / runs.FLAT, tmp_path / "straight"))
    for key, tensor in load_tensors(output).items():
        assert same_bits(tensor, straight[key]), key


def test_equal_weights_have_main_params_too(tmp_path, caplog):
    """Two layers' norms are ones in every source: each is merged with a main param of its own."""
    run, keys = runs.copy_run(runs.FLAT, tmp_path / "run"), list(LAYER)[2::3]

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == BUCKET:
            for start in (FC2[0] + LAYER[key] for key in keys):
                tensor[start : start + 32] = 1.0
        for key in keys:
            if name == f"decoder.layers.{key}":
                tensor[0] = 1.0
        return tensor

    for iteration in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(run, iteration), change)
    output = run_merge(run, tmp_path / "out")
    assert "main params" not in caplog.text
    merged = load_tensors(output)
    for key, tensor in in_bucket(merged[BUCKET], merged).items():
        assert same_bits(merged[key], tensor.to(torch.bfloat16)), key
    assert check_main_params(read_layout(output)).wrong == ()


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", "__1_1.distcp"])
@pytest.mark.parametrize("iteration", [4, 8])
def test_a_file_of_another_save_is_refused(file, iteration, tmp_path, capsys):
    """It holds part of the model and part of the main params, of which few belong together."""
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    shutil.copy(runs.checkpoint(run, 6) / file, runs.checkpoint(run, iteration) / file)
    command = ["merge", "--load", str(run), "--save", str(tmp_path / "out")]
    assert wsm([*command, "--optimizer-state", "last"]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert f"iter_{iteration:07d}: the main param" in error and "of another save?" in error
    assert "--optimizer-state drop" in error and "--rebuild-main-params" not in error
    assert not (tmp_path / "out" / "iter_0000008").exists()
    assert wsm([*command, "--optimizer-state", "drop"]) == 0  # the way out that it names


def test_wrong_mains_in_a_bucket_are_refused(tmp_path):
    run = runs.copy_run(runs.FLAT, tmp_path / "run")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == BUCKET:
            tensor[FC2[1] + 7] += 1
        return tensor

    runs.rewrite(runs.checkpoint(run, 4), change)
    with pytest.raises(MergeError, match="iter_0000004: the main param .* does not belong"):
        run_merge(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_rest_of_a_bucket():
    places = {
        ("a", Region((0, 0), (4, 8))): FlatMainParam("b", 64),
        ("c", Region((0,), (6,))): FlatMainParam("b", 128),
    }
    flat = FlatMainParams(places)
    assert list(flat.rest("b", Region((0,), (192,)))) == [
        Region((0,), (64,)),
        Region((96,), (32,)),
        Region((134,), (58,)),
    ]
    assert list(flat.rest("b", Region((80,), (16,)))) == []
    assert list(flat.rest("b", Region((90,), (40,)))) == [Region((96,), (32,))]
    assert list(flat.rest("other", Region((90,), (40,)))) == [Region((90,), (40,))]
