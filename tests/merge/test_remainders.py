"""Main params kept as remainders (--use-precision-aware-optimizer) are rebuilt, merged, split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.frontier import WEIGHTS, merged, sources_of
from tests.reference import (
    FRONTIER,
    load_tensors,
    rebuilt,
    rounded,
    same_bits,
    split,
    weighted_sum64,
)
from tests.unit.execution.test_gpu_tiles import staged_merge
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.keys import Role, main_of, state_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.kernels import reference
from wsm_megatron.optimizer.precision import kinds_of
from wsm_megatron.optimizer.representation import REMAINDER, ROUNDED

KEYED = "mcore0.16-dense-dp2-precision_aware-remainders-fully_reshardable"
FLAT = "mcore0.16-dense-dp2-precision_aware-bf16moments-dp_reshardable"
WEIGHT = "decoder.layers.self_attention.linear_proj.weight"

BITS = [  # float32, bfloat16 rounded half up in magnitude, signed low half
    (0x00000000, 0x0000, 0),
    (0x80000000, 0x8000, 0),
    (0x3F800001, 0x3F80, 1),
    (0x3F807FFF, 0x3F80, 0x7FFF),
    (0x3F808000, 0x3F81, -0x8000),  # a tie: torch rounds it to even, down
    (0xBF808000, 0xBF81, -0x8000),
    (0x3F818000, 0x3F82, -0x8000),  # to even is up here
    (0x3FFFFFFF, 0x4000, -1),  # the exponent grows
    (0x0000FFFF, 0x0001, -1),
    (0x7F7FFFFF, 0x7F80, -1),  # infinite as bfloat16, and still whole
    (0x7F800000, 0x7F80, 0),
]


def floats(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def halves(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_the_documented_bits(dtype):
    value, model = floats([b for b, _, _ in BITS]), halves([m for _, m, _ in BITS])
    remainder = torch.tensor([r for _, _, r in BITS]).to(dtype)
    made = torch.empty_like(value)
    REMAINDER.rebuild(remainder, model, made)
    assert same_bits(made, value) and same_bits(rebuilt(model, remainder), value)
    kept, weights = torch.empty_like(remainder), torch.empty_like(model)
    REMAINDER.write(value, kept, weights)
    assert same_bits(kept, remainder) and same_bits(weights, model)
    assert same_bits(split(value)[0], model)
    assert torch.equal(split(value)[1], remainder.to(torch.int16))
    assert not same_bits(value.bfloat16(), model)  # ties


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_splitting_and_rebuilding_loses_no_bit(bits):
    value = floats(bits)
    weights, low = split(value)
    assert same_bits(rebuilt(weights, low), value)
    kept, model, made = low.clone(), weights.clone(), value.clone()
    REMAINDER.write(value, kept.zero_(), model.zero_())
    assert same_bits(kept, low) and same_bits(model, weights)
    REMAINDER.rebuild(low, weights, made.zero_())
    assert same_bits(made, value)
    assert same_bits(reference.rebuild_main(weights, low), value)
    assert same_bits(reference.split_main(value)[0], weights)
    assert torch.equal(reference.split_main(value)[1], low.long())


def test_what_is_no_remainder():
    model = torch.ones(3).bfloat16()
    for values in ([0.5, 1, 2], [32768.0, 0, 0], [-32769.0, 0, 0], [torch.nan, 0, 0]):
        assert REMAINDER.differ(torch.tensor(values), model)
    assert not REMAINDER.differ(torch.tensor([-32768.0, 32767, 0]), model)


def run_of(name: str, to: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A run, with keyed remainders of this dtype."""
    shutil.copytree(FRONTIER / name, to)
    if dtype is not torch.float32:
        for i in (6, 8):
            runs.rewrite(runs.checkpoint(to, i), lambda key, t: t.to(dtype) if main_of(key) else t)
    return to


def merged_value(sources: list[dict[str, torch.Tensor]], model: str) -> torch.Tensor:
    """float32 main params: rebuilt, summed in float64, rounded once."""
    values = [rebuilt(one[model], one[f"optimizer.state.param.{model}"]) for one in sources]
    return rounded(weighted_sum64(WEIGHTS, values), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("state", ["last", "merge"])
def test_remainders_merge_as_the_float32_values_that_they_are_of(dtype, state, tmp_path):
    run = run_of(KEYED, tmp_path / "run", dtype)
    output = merged(run, tmp_path / "out", optimizer_state=state)
    sources, found = sources_of(run), load_tensors(output)
    models = [key for key in found if state_of(key) is None]
    assert len(models) == 9
    for model in models:
        weights, low = split(merged_value(sources, model))
        assert same_bits(found[model], weights), model
        assert same_bits(found[f"optimizer.state.param.{model}"], low.to(dtype)), model
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{model}"
            total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
            expected = sources[-1][key] if state == "last" else rounded(total, torch.float32)
            assert same_bits(found[key], expected), key
    verify(output, sources="all")


def test_staged_tiles_make_the_same_bits(tmp_path, monkeypatch):
    options = {"optimizer_state": "merge", "weights": WEIGHTS, "load": FRONTIER / KEYED}
    staged = staged_merge(monkeypatch, save=tmp_path / "staged", **options)
    verify(staged.output, sources="all")
    plain = load_tensors(merge(MergeConfig(save=tmp_path / "out", **options)).output)
    for key, tensor in load_tensors(staged.output).items():
        assert same_bits(tensor, plain[key]), key


@pytest.mark.parametrize("dtype", ["same", "fp32", "fp16"])
def test_drop_merges_the_exact_values_too(dtype, tmp_path):
    run = FRONTIER / KEYED
    output = merged(run, tmp_path / "out", optimizer_state="drop", dtype=dtype)
    sources, found = sources_of(run), load_tensors(output)
    assert [key for key in found if state_of(key)] == []
    for model, tensor in found.items():
        value = merged_value(sources, model)
        kinds = {"same": split(value)[0], "fp32": value, "fp16": value.to(torch.float16)}
        assert same_bits(tensor, kinds[dtype]), model
    verify(output, sources="all")


def test_drop_makes_do_with_the_weights_where_a_source_has_no_remainders(tmp_path, caplog):
    run = run_of(KEYED, tmp_path / "run")
    gone = f"optimizer.state.param.{WEIGHT}"
    older = runs.checkpoint(run, 6)
    runs.rewrite(older, rename=lambda key: f"optimizer.state.x.{WEIGHT}" if key == gone else key)
    output = merged(run, tmp_path / "out", optimizer_state="drop")
    total = weighted_sum64(WEIGHTS, [source[WEIGHT] for source in sources_of(run)])
    assert same_bits(load_tensors(output)[WEIGHT], rounded(total, torch.bfloat16))
    assert f"not all sources have main params for {WEIGHT}" in caplog.text
    verify(output, sources="all")


def test_main_params_rebuilt_from_the_model_are_split_likewise(tmp_path):
    output = merged(FRONTIER / KEYED, tmp_path / "out", rebuild_main_params=True)
    sources, found = sources_of(FRONTIER / KEYED), load_tensors(output)
    total = weighted_sum64(WEIGHTS, [source[WEIGHT] for source in sources])
    weights, low = split(rounded(total, torch.float32))
    assert same_bits(found[WEIGHT], weights)
    assert same_bits(found[f"optimizer.state.param.{WEIGHT}"], low.float())
    verify(output, sources="all")


@pytest.mark.parametrize("rebuilt_too", [False, True])
def test_copied_tensors_keep_their_remainders(rebuilt_too, tmp_path):
    output = merged(
        FRONTIER / KEYED, tmp_path / "out", copy=(WEIGHT,), rebuild_main_params=rebuilt_too
    )
    newest, found = sources_of(FRONTIER / KEYED)[-1], load_tensors(output)
    key = f"optimizer.state.param.{WEIGHT}"
    assert same_bits(found[WEIGHT], newest[WEIGHT])
    expected = torch.zeros_like(newest[key]) if rebuilt_too else newest[key]
    assert same_bits(found[key], expected)
    verify(output, sources="all")


def test_another_dtype_would_leave_remainders_without_their_weights(tmp_path):
    with pytest.raises(ValueError, match="--dtype fp32 would leave them.*--optimizer-state drop"):
        merged(FRONTIER / KEYED, tmp_path / "out", dtype="fp32")


def test_a_source_that_keeps_main_params_instead_is_named(tmp_path):
    run = run_of(KEYED, tmp_path / "run")
    older = runs.checkpoint(run, 6)
    models = load_tensors(older)
    runs.rewrite(older, lambda key, t: models[main_of(key)].float() if main_of(key) else t)
    with pytest.raises(MergeError, match="iter_0000006: .* are no remainders, as the newest"):
        merged(run, tmp_path / "out")
    merged(run, tmp_path / "out", rebuild_main_params=True)


def test_what_the_args_say_is_compared_with_what_is_there(tmp_path):
    layout = read_layout(runs.checkpoint(FRONTIER / KEYED, 8))
    for args in ({"use_precision_aware_optimizer": True}, {}):
        kinds = kinds_of(layout, args)
        mains = [e for e in layout.tensors.values() if e.role is Role.MAIN]
        assert kinds.usual is ROUNDED and {kinds.of(entry) for entry in mains} == {REMAINDER}
    plain = read_layout(runs.checkpoint(runs.FULLY, 8))
    for args in ({"use_precision_aware_optimizer": True}, {}):
        assert not kinds_of(plain, args).keyed


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_merged_weights_with_remainders_of_the_last_checkpoint_are_refused(dtype, tmp_path, capsys):
    run = run_of(KEYED, tmp_path / "run", dtype)
    output = merged(run, tmp_path / "out")
    assert check_resume(output).resumes == (dtype is torch.int16)
    stale, key = sources_of(run)[-1], f"optimizer.state.param.{WEIGHT}"
    runs.rewrite(output, lambda name, tensor: stale[key] if name == key else tensor)
    with pytest.raises(MergeError, match="is not what the merge wrote"):
        verify(output, sources="all")
    assert main(["resume-check", str(output)]) == EXIT_DOES_NOT_RESUME
    assert "remainders may be of other weights" in capsys.readouterr().out


def test_recomputing_finds_remainders_of_other_weights(tmp_path, monkeypatch):
    run = run_of(KEYED, tmp_path / "run")
    output = merged(run, tmp_path / "out")
    stale, key = sources_of(run)[-1], f"optimizer.state.param.{WEIGHT}"
    runs.rewrite(output, lambda name, tensor: stale[key] if name == key else tensor)
    monkeypatch.setattr("wsm_megatron.inspection.verify._check_files", lambda *_: None)
    with pytest.raises(MergeError, match=f"{key} at .* is not the merge"):
        verify(output, sources="all")


def test_remainders_in_flat_buckets_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="any remainder fits any weights: nothing proves whose"):
        merged(FRONTIER / FLAT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["last", "merge"])
def test_flat_buckets_of_remainders_go_on_from_the_merged_weights(state, tmp_path, caplog):
    output = merged(
        FRONTIER / FLAT, tmp_path / "out", optimizer_state=state, rebuild_main_params=True
    )
    sources, found = sources_of(FRONTIER / FLAT), load_tensors(output)
    for key, tensor in found.items():
        if key.endswith(".param"):
            assert tensor.dtype is torch.int16 and not tensor.any()
        elif state_of(key) is None:
            total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
            assert same_bits(tensor, rounded(total, torch.bfloat16)), key
    assert "whose each is cannot be told" in caplog.text
    verify(output, sources="all")
    report = check_resume(output)
    assert report.resumes and len(report.mains.remainders) == 1
    assert any("cannot be told by them" in note for note in report.notes)


def test_drop_of_flat_remainders_merges_the_weights_and_says_what_is_lost(tmp_path, caplog):
    output = merged(FRONTIER / FLAT, tmp_path / "out", optimizer_state="drop")
    total = weighted_sum64(WEIGHTS, [source[WEIGHT] for source in sources_of(FRONTIER / FLAT)])
    assert same_bits(load_tensors(output)[WEIGHT], rounded(total, torch.bfloat16))
    assert "those bits are lost" in caplog.text
    verify(output, sources="all")
