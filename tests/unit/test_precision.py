"""Main params that are not the rounded model by design: quantised weights, remainders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import runs
from tests.flat_run import bucket_key, write_checkpoint
from tests.reference import load_tensors
from wsm_megatron.checkpoint.common_state import dump_common, load_common
from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME, EXIT_FAILED, EXIT_USAGE
from wsm_megatron.optimizer.main_params import check_mains
from wsm_megatron.optimizer.precision import are_remainders, quantised_by


def set_args(path: Path, **values) -> None:
    state = load_common((path / "common.pt").read_bytes(), "")
    for name, value in values.items():
        setattr(state["args"], name, value)
    (path / "common.pt").write_bytes(dump_common(state))


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    """As a checkpoint of FP8 weights holds them: dequantised."""
    scale = 448 / tensor.float().abs().max()
    return ((tensor.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(tensor.dtype)


def quantised_run(name: str, to: Path, option: str) -> Path:
    run = runs.copy_run(name, to)
    for iteration in runs.ITERATIONS:
        path = runs.checkpoint(run, iteration)
        runs.rewrite(path, lambda key, t: quantised(t) if "linear_" in key and t.dim() > 2 else t)
        set_args(path, **{option: True})
    return run


def merge_fails(run: Path, out: Path, capsys, status: int) -> str:
    command = ["merge", "--load", str(run), "--save", str(out), "--last", "2"]
    assert main([*command, "--optimizer-state", "last"]) == status
    error = capsys.readouterr().err
    assert not list(out.glob("iter_*"))
    assert main([*command, "--optimizer-state", "drop"]) == 0  # the way out that it names
    capsys.readouterr()
    return error


@pytest.mark.parametrize("run", [runs.FLAT, runs.FULLY, runs.FP32_PARAM])
@pytest.mark.parametrize("option, flag", [
    ("fp8_param_gather", "--fp8-param-gather"), ("fp4_param", "--fp4-param-gather"),
])  # fmt: skip
def test_quantised_weights_are_no_defect(run, option, flag, tmp_path, capsys):
    path = quantised_run(run, tmp_path / "run", option)
    error = merge_fails(path, tmp_path / "out", capsys, EXIT_FAILED)
    assert flag in error and "more precise by design" in error
    assert "--optimizer-state drop" in error and "loses the main params' precision" in error
    assert "core_r0.19" not in error and "--rebuild-main-params" not in error
    assert main(["resume-check", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"saved with {flag}" in printed and "by design" in printed
    assert "other weights" not in printed and "NOT those of the model" not in printed


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


def test_remainders_saved_as_floats(tmp_path, capsys):
    """As fully_reshardable saves them for the precision-aware optimizer."""
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for iteration in runs.ITERATIONS:
        runs.rewrite(
            runs.checkpoint(run, iteration),
            lambda key, t: remainder(t.numel(), 1).view(t.shape).float() if main_of(key) else t,
        )
        set_args(runs.checkpoint(run, iteration), use_precision_aware_optimizer=True)
    error = merge_fails(run, tmp_path / "out", capsys, EXIT_FAILED)
    assert "low 16 bits" in error and "--use-precision-aware-optimizer" in error
    assert "core_r0.19" not in error and "--rebuild-main-params" not in error
    assert main(["resume-check", str(run)]) == EXIT_DOES_NOT_RESUME
    printed = capsys.readouterr().out
    assert "low 16 bits" in printed and "--no-load-optim" in printed
    assert "other weights" not in printed and "--rebuild-main-params" not in printed
    found = check_mains(read_layout(runs.checkpoint(run, 8)))
    assert found.wrong == () and len(found.remainders) == found.keyed == 9


def test_remainders_in_flat_buckets(tmp_path, capsys):
    """As dp_reshardable saves them: int16."""
    run, key = tmp_path / "run", bucket_key()
    for iteration in (2, 4):
        model = {"a": torch.randn(300).bfloat16()}
        buckets = {key: [remainder(300, iteration).to(torch.int16)]}
        write_checkpoint(run, iteration, model, buckets)
    error = merge_fails(run, tmp_path / "out", capsys, EXIT_USAGE)
    assert f"{key} is int16" in error and "--use-precision-aware-optimizer" in error
    assert "--copy" not in error
    assert main(["resume-check", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "dp_reshardable" in printed and "low 16 bits" in printed
    assert "no optimizer state" not in printed


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
