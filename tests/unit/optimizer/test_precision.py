"""Main params that are not the rounded model by design: quantised weights, fp16 main params."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from tests.runs import dump_common
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.common_state import load_common
from wsm_megatron.checkpoint.keys import MAINS, Role, is_optimizer, main_of, state_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.run_config import args_in
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME, EXIT_FAILED
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.optimizer.main_params import check_main_params
from wsm_megatron.optimizer.precision import (
    PRECISION_ARGS,
    are_remainders,
    quantised_as,
    quantised_by,
)

WEIGHTS = (0.3, 0.7)


def set_args(path: Path, **values) -> None:
    state = load_common((path / "common.pt").read_bytes(), "")
    for name, value in values.items():
        setattr(state["args"], name, value)
    (path / "common.pt").write_bytes(dump_common(state))


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    """As a checkpoint of FP8 weights holds them: E4M3 of the whole tensor's scale, dequantised."""
    scale = 448 / tensor.float().abs().max()
    return ((tensor.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(tensor.dtype)


def quantised_to_4_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same of NVFP4: E2M1, a scale for every 16 weights."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = tensor.float().reshape(-1, 16)
    scale = (blocks.abs().amax(1, keepdim=True) / 6).clamp(min=1e-20)
    nearest = (blocks.abs() / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale * blocks.sign()).reshape(tensor.shape).to(tensor.dtype)


def _is_quantised(key: str, tensor: torch.Tensor) -> bool:
    return "linear_" in key and tensor.dim() > 2 and not is_optimizer(key)


def quantised_run(name: str, to: Path, option: str) -> Path:
    run = runs.copy_run(name, to)
    coarse = quantised if option.startswith("fp8") else quantised_to_4_bits
    for iteration in runs.ITERATIONS:
        path = runs.checkpoint(run, iteration)
        runs.rewrite(path, lambda key, t: coarse(t) if _is_quantised(key, t) else t)
        set_args(path, **{option: True})
    return run


def merged(run: Path, out: Path, **options) -> Path:
    options = {"optimizer_state": "last", "weights": WEIGHTS, "last": 2, **options}
    return merge(MergeConfig(load=run, save=out, **options)).output


QUANTISED = pytest.mark.parametrize("run", [runs.FLAT, runs.FULLY, runs.FP32_PARAM])
FORMATS = pytest.mark.parametrize("option, flag, dtype", [
    ("fp8_param_gather", "--fp8-param-gather", torch.float8_e4m3fn),
    ("fp4_param", "--fp4-param-gather", None),
])  # fmt: skip


@QUANTISED
@FORMATS
def test_quantised_weights_are_made_of_the_merged_main_params(
    run, option, flag, dtype, tmp_path, caplog
):
    path = quantised_run(run, tmp_path / "run", option)
    kept = merged(path, tmp_path / "last")
    dropped = merged(path, tmp_path / "drop", optimizer_state="drop")
    plain = merged(RUNS / run, tmp_path / "plain")  # the same main params, and weights of these
    found, expected = load_tensors(kept), load_tensors(plain)
    weights = load_tensors(dropped)
    assert any(".state." in key or ".param" in key for key in found)
    for key, tensor in found.items():
        if key.endswith(".param"):  # a flat bucket: padding is of no account
            continue
        assert same_bits(tensor, expected[key]), key
        assert is_optimizer(key) or same_bits(weights[key], tensor), key
    assert not any(map(is_optimizer, weights))
    for output in (kept, dropped):
        verify(output, sources="all")
    assert check_resume(kept).resumes and check_main_params(read_layout(kept)).wrong == ()
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


def as_bridge_saves(path: Path, config: str) -> None:
    """No args, and a run config in their place."""
    state = load_common((path / "common.pt").read_bytes(), "")
    del state["args"]
    (path / "common.pt").write_bytes(dump_common(state))
    (path / "run_config.yaml").write_text(config)


def test_quantised_weights_of_megatron_bridge(tmp_path):
    config = "model: {fp8_recipe: tensorwise}\nddp: {fp8_param_gather: true}\n"
    path = quantised_run(runs.FULLY, tmp_path / "run", "fp8_param_gather")
    expected = load_tensors(merged(path, tmp_path / "megatron"))
    for iteration in runs.ITERATIONS:
        as_bridge_saves(runs.checkpoint(path, iteration), config)
    for state in ("last", "drop"):
        output = merged(path, tmp_path / state, optimizer_state=state)
        for key, tensor in load_tensors(output).items():
            assert same_bits(tensor, expected[key]), key
        verify(output, sources="all")
    unsaid = "model: {fp8_recipe: tensorwise}\nddp: {}\n"
    (runs.checkpoint(path, 8) / "run_config.yaml").write_text(unsaid)
    with pytest.raises(MergeError, match="rounded to torch.bfloat16 it differs"):
        merged(path, tmp_path / "unsaid")


def test_a_dtype_in_a_run_config_is_torchs():
    said = {"optimizer": {"main_params_dtype": {"_call_": False, "_target_": "torch.float16"}}}
    assert args_in(said, PRECISION_ARGS) == {"main_params_dtype": torch.float16}
    assert args_in({"ddp": {"fp8_param_gather": None}}, PRECISION_ARGS) == {}


@QUANTISED
@FORMATS
def test_a_quantised_run_resumes_and_says_so(run, option, flag, dtype, tmp_path, capsys):
    path = quantised_run(run, tmp_path / "run", option)
    assert main(["resume-check", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"saved with {flag}" in printed and "by design, within the error" in printed
    assert "other weights" not in printed and "NOT those of the model" not in printed
    assert "near the quantised model" in printed


@QUANTISED
def test_quantised_weights_with_main_params_of_another_checkpoint(run, tmp_path, capsys):
    path = quantised_run(run, tmp_path / "run", "fp8_param_gather")
    stale = load_tensors(runs.checkpoint(path, 2))
    checkpoint = runs.checkpoint(path, 8)
    runs.rewrite(checkpoint, lambda key, t: stale[key] if _is_main(key) else t)
    with pytest.raises(MergeError, match="--fp8-param-gather.*coarse.*--optimizer-state drop"):
        merged(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("iter_*"))
    assert main(["resume-check", str(checkpoint)]) == EXIT_DOES_NOT_RESUME
    assert "NOT those of the model" in capsys.readouterr().out


def _is_main(key: str) -> bool:
    state = state_of(key)
    return state is not None and state[2] in MAINS


@QUANTISED
def test_quantised_weights_are_merged_themselves_where_main_params_are_dropped(run, tmp_path):
    path = quantised_run(run, tmp_path / "run", "fp8_param_gather")
    stale = load_tensors(runs.checkpoint(path, 2))
    runs.rewrite(runs.checkpoint(path, 8), lambda key, t: stale[key] if _is_main(key) else t)
    output = merged(path, tmp_path / "out", optimizer_state="drop", drop=("*optimizer.*",))
    sources = [load_tensors(runs.checkpoint(path, i)) for i in (6, 8)]
    for key, tensor in load_tensors(output).items():
        total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
        assert same_bits(tensor, rounded(total, tensor.dtype)), key
    verify(output, sources="all")


@pytest.mark.parametrize("aware", [False, True])
def test_optimizer_state_that_was_offloaded_to_the_cpu_is_as_any_other(aware, tmp_path, caplog):
    """HybridDeviceOptimizer: the same keys, float32 main params, also where it is asked for the
    precision-aware optimizer."""
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for i in runs.ITERATIONS:
        path = runs.checkpoint(run, i)
        set_args(path, optimizer_cpu_offload=True, use_precision_aware_optimizer=aware)
    found = load_tensors(merged(run, tmp_path / "out"))
    for key, tensor in load_tensors(merged(RUNS / runs.FULLY, tmp_path / "plain")).items():
        assert same_bits(found[key], tensor), key
    assert check_resume(tmp_path / "out").resumes
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_keyed_main_params_are_rebuilt_from_quantised_weights_where_asked(tmp_path):
    path = quantised_run(runs.FULLY, tmp_path / "run", "fp8_param_gather")
    output = merged(path, tmp_path / "out", rebuild_main_params=True)
    sources = [load_tensors(runs.checkpoint(path, i)) for i in (6, 8)]
    key = "decoder.layers.mlp.linear_fc1.weight"
    total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
    value = rounded(total, torch.float32)
    assert same_bits(load_tensors(output)[f"optimizer.state.param.{key}"], value)


def test_a_format_that_is_not_known_has_no_bound_and_says_so(tmp_path, capsys):
    path = quantised_run(runs.FULLY, tmp_path / "run", "fp8_param_gather")
    checkpoint = runs.checkpoint(path, 8)
    set_args(checkpoint, fp8_recipe="custom")
    assert main(["resume-check", str(checkpoint)]) == 0
    assert "whose error is not known here" in capsys.readouterr().out
    merged(path, tmp_path / "out")


def test_in_flat_buckets_such_a_format_leaves_main_params_unfound(tmp_path, caplog):
    path = quantised_run(runs.FLAT, tmp_path / "run", "fp8_param_gather")
    for i in runs.ITERATIONS:
        set_args(runs.checkpoint(path, i), fp8_recipe="custom")
    with pytest.raises(MergeError, match="nothing there rounds to them"):
        merged(path, tmp_path / "out")
    merged(path, tmp_path / "out", optimizer_state="drop")
    assert "merged from the model tensors, which are less exact" in caplog.text


@pytest.mark.parametrize("args, relative", [
    ({}, 2**-4), ({"fp8_recipe": "blockwise"}, 2**-4), ({"fp8_recipe": "custom"}, math.inf),
])  # fmt: skip
def test_the_bound_of_a_format(args, relative):
    found = quantised_as({"fp8_param_gather": True, **args})
    assert found is not None and found.relative >= relative
    assert found.finer and not found.apart


@given(st.integers(0, 2**32), st.sampled_from([1.0, 1e-3, 300.0]))
def test_what_fp8_makes_of_a_weight_is_within_the_bound(seed, scale):
    weights = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * scale
    bound = quantised_as({"fp8_param_gather": True})
    assert bound is not None and not bound.differ(weights, quantised(weights).bfloat16())
    assert bound.differ(weights * 1.2, quantised(weights).bfloat16())


def test_weights_beyond_the_largest_of_the_format_are_cut_off():
    bound = quantised_as({"fp8_param_gather": True})
    model = torch.tensor([1.0, -2.0, 2.0])
    assert bound is not None and not bound.differ(torch.tensor([1.0, -3.0, 2.5]), model)
    assert bound.differ(torch.tensor([1.0, 3.0, 2.5]), model)  # of the other sign
    assert bound.differ(torch.tensor([1.5, -3.0, 2.5]), model)


def test_fp16_main_params_are_near_the_model(tmp_path):
    """--main-params-dtype fp16: model and main param are each rounded from a float32 value."""
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for i in runs.ITERATIONS:
        path = runs.checkpoint(run, i)
        set_args(path, use_precision_aware_optimizer=True, main_params_dtype=torch.float16)
        runs.rewrite(path, lambda key, t: (t * 512).half().float() / 512 if main_of(key) else t)
    output = merged(run, tmp_path / "out")
    verify(output, sources="all")
    sources, found = [load_tensors(runs.checkpoint(run, i)) for i in (6, 8)], load_tensors(output)
    for key in [key for key in found if main_of(key)]:
        expected = rounded(weighted_sum64(WEIGHTS, [s[key] for s in sources]), torch.float32)
        assert same_bits(found[key], expected)
        assert same_bits(found[main_of(key)], expected.bfloat16())
    assert check_resume(output).resumes


def test_a_defect_is_still_one_without_quantised_weights(tmp_path, capsys):
    run = tmp_path / "out"
    command = ["merge", "--load", str(runs.RUNS / runs.WRONG_MAINS), "--save", str(run)]
    assert main([*command, "--optimizer-state", "last"]) == EXIT_FAILED
    assert "core_r0.19" in capsys.readouterr().err


@pytest.mark.parametrize("args, flag", [
    ({}, None),
    ({"fp8": "e4m3", "fp8_param_gather": False, "fp4_param": False}, None),
    ({"fp8": "hybrid", "fp8_param_gather": True}, "--fp8-param-gather"),
    ({"fp4_param_gather": True}, "--fp4-param-gather"),
])  # fmt: skip
def test_what_the_args_say(args, flag):
    assert quantised_by(args) == flag


def remainder(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (numel,), generator=generator)


def test_remainders_that_the_args_deny_are_not_guessed_at(tmp_path, capsys):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for i in runs.ITERATIONS:
        path = runs.checkpoint(run, i)
        runs.rewrite(path, lambda key, t: remainders(t) if main_of(key) else t)
        set_args(path, use_precision_aware_optimizer=False)
    with pytest.raises(MergeError, match="low 16 bits.*its args say.*--rebuild-main-params"):
        merged(run, tmp_path / "out")
    assert main(["resume-check", str(run)]) == EXIT_DOES_NOT_RESUME
    printed = capsys.readouterr().out
    assert "low 16 bits" in printed and "--no-load-optim" in printed
    assert "other weights" not in printed
    found = check_main_params(read_layout(runs.checkpoint(run, 8)))
    assert found.wrong == () and len(found.remainders) == found.keyed == 9


def remainders(main: torch.Tensor) -> torch.Tensor:
    return remainder(main.numel(), 1).view(main.shape).float()


def test_weights_are_no_remainders():
    assert are_remainders(remainder(32, 0).float())
    assert not are_remainders(torch.ones(32))
    assert not are_remainders(torch.zeros(32))
    assert not are_remainders(torch.randn(32) * 1000)
    assert not are_remainders(torch.full((32,), torch.nan))
    assert not are_remainders(2.0**20 + torch.arange(32.0))
    found = load_tensors(runs.checkpoint(runs.FULLY, 8))
    roles = read_layout(runs.checkpoint(runs.FULLY, 8)).tensors
    mains = [tensor for key, tensor in found.items() if roles[key].role is Role.MAIN]
    assert mains and not any(map(are_remainders, mains))
