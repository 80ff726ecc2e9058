"""Optimizer state is merged or copied by its shape: Muon, SGD, SOAP, 8-bit Adam, Adam on fp32."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.frontier import WEIGHTS, merged, sources_of
from tests.reference import FRONTIER, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import verify
from wsm_megatron.checkpoint.keys import Role, is_flat_bucket, main_of, may_be_padding, state_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.optimizer.main_params import check_main_params

SGD = "mcore0.16-dense-dp2-sgd-replicated"
FP32 = "mcore0.16-dense-dp2-fp32-replicated"
MUON = "main-dense-dp2-muon-distributed"
WEIGHT = "decoder.layers.self_attention.linear_proj.weight"


def copy_of(name: str, to: Path) -> Path:
    shutil.copytree(FRONTIER / name, to)
    return to


def keyed_run(to: Path) -> Path:
    """State by key, of an optimizer whose state Megatron loads; other state can be added."""
    run = copy_of(SGD, to)
    for i in (6, 8):
        runs.restate(
            runs.checkpoint(run, i), lambda state: setattr(state["args"], "optimizer", "soap")
        )
    return run


def summed(key: str, sources: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    return rounded(weighted_sum64(WEIGHTS, [source[key] for source in sources]), dtype)


def without_padding(layout, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A flat bucket with zeros for what is uninitialised in it."""
    tensor = tensor.clone()
    for offsets, sizes, _ in layout.tensors[key].chunks:
        if may_be_padding(key, offsets[0], sizes[0]):
            tensor[offsets[0] : offsets[0] + sizes[0]] = 0
    return tensor


@pytest.mark.parametrize("state", ["last", "merge"])
@pytest.mark.parametrize("name", [SGD, FP32, MUON])
def test_every_tensor_is_merged_by_its_rule_and_the_merge_resumes(name, state, tmp_path, caplog):
    run = FRONTIER / name
    output = merged(run, tmp_path / "out", optimizer_state=state)
    sources, found, layout = sources_of(run), load_tensors(output), read_layout(output)
    mains = {main_of(key): key for key in found if main_of(key)}
    in_buckets = any(map(is_flat_bucket, found))
    for key, tensor in found.items():
        role = layout.tensors[key].role
        if role is Role.MOMENT and state == "last":
            expected = sources[-1][key]
        elif role is Role.MODEL and (key in mains or in_buckets):
            continue  # below
        else:
            expected = summed(key, sources, tensor.dtype)
        tensor, expected = (without_padding(layout, key, t) for t in (tensor, expected))
        assert same_bits(tensor, expected), key
    for model, main in mains.items():
        assert same_bits(found[model], found[main].to(found[model].dtype)), model
    assert check_main_params(layout).wrong == ()
    verify(output, sources="all")
    assert bool(check_resume(output).problems) == (name == SGD)  # which Megatron does not load
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


@pytest.mark.parametrize("name", [SGD, FP32, MUON])
def test_a_run_of_such_an_optimizer_resumes_where_megatron_loads_it(name):
    report = check_resume(runs.checkpoint(FRONTIER / name, 8))
    assert report.resumes == (name != SGD) and report.optimizer is not None
    assert report.moments == {SGD: 9, FP32: 18, MUON: 6}[name]
    assert report.mains.model == (name == FP32)


@pytest.mark.parametrize("name", [SGD, FP32, MUON])
def test_drop_leaves_all_state_out(name, tmp_path):
    found = load_tensors(merged(FRONTIER / name, tmp_path / "out", optimizer_state="drop"))
    sources = sources_of(FRONTIER / name)
    assert set(found) == {key for key in sources[0] if not state_of(key)}
    for key, tensor in found.items():
        assert same_bits(tensor, summed(key, sources, tensor.dtype)), key


@pytest.mark.parametrize("name, main", [
    (SGD, f"optimizer.state.fp32_param.{WEIGHT}"),
    (MUON, f"chained_0.optimizer.state.fp32_param.{WEIGHT}"),
])  # fmt: skip
def test_merged_weights_with_main_params_of_the_last_checkpoint_are_refused(name, main, tmp_path):
    output = merged(FRONTIER / name, tmp_path / "out")
    stale = load_tensors(runs.checkpoint(FRONTIER / name, 8))
    (output / "wsm_merge.json").unlink()  # as another tool would leave it
    runs.rewrite(output, lambda key, tensor: stale[key] if key == main else tensor)
    report = check_resume(output)
    assert not report.resumes and report.mains.wrong == (WEIGHT,)


def test_fp32_weights_that_the_optimizer_steps_on_keep_their_dtype(tmp_path):
    with pytest.raises(ValueError, match="--dtype bf16.*the optimizer steps on.*state drop"):
        merged(FRONTIER / FP32, tmp_path / "out", dtype="bf16")
    found = load_tensors(
        merged(FRONTIER / FP32, tmp_path / "out", dtype="bf16", optimizer_state="drop")
    )
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def soap(iteration: int) -> dict[str, torch.Tensor]:
    """State of a matrix optimizer: two moments, and a preconditioner for each side; that of a
    square matrix has its shape."""
    generator = torch.Generator().manual_seed(iteration)
    shapes = {
        f"exp_avg.{WEIGHT}": (2, 32, 32),
        f"GG.{WEIGHT}": (2, 32, 32),
        "exp_avg.output_layer.weight": (128, 32),
        "GG.output_layer.weight": (32, 32),
    }
    return {
        f"optimizer.state.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def eight_bit(iteration: int) -> dict[str, torch.Tensor]:
    """State of 8-bit Adam: codes, a scale for each block of them, a code book."""
    generator = torch.Generator().manual_seed(iteration)
    state = {
        "state1": torch.randint(0, 256, (128, 32), generator=generator).to(torch.uint8),
        "absmax1": torch.rand(16, generator=generator),
        "qmap1": torch.rand(256, generator=generator),
        "extra": torch.rand(128, 32, generator=generator),  # beside codes
    }
    return {f"optimizer.state.{name}.output_layer.weight": one for name, one in state.items()}


@pytest.mark.parametrize("more, moments", [(soap, "exp_avg"), (eight_bit, None)])
def test_what_is_no_moment_is_copied_and_never_summed(more, moments, tmp_path, caplog):
    run = keyed_run(tmp_path / "run")
    for i in (6, 8):
        runs.rewrite(runs.checkpoint(run, i), more=more(i))
    output = merged(run, tmp_path / "out", optimizer_state="merge")
    found, sources = load_tensors(output), sources_of(run)
    for key in more(8):
        is_moment = moments is not None and state_of(key)[2] == moments
        expected = summed(key, sources, torch.float32) if is_moment else sources[-1][key]
        assert same_bits(found[key], expected), key
    assert "copied from the newest source, not merged" in caplog.text
    verify(output, sources="all")
    assert check_resume(output).resumes


def test_state_of_no_param_is_not_guessed_at(tmp_path):
    run = keyed_run(tmp_path / "run")
    for i in (6, 8):
        more = {"optimizer.state.momentum_buffer.gone.weight": torch.ones(4)}
        runs.rewrite(runs.checkpoint(run, i), more=more)
    with pytest.raises(ValueError, match="no rule for .*momentum_buffer.gone.weight.*--copy"):
        merged(run, tmp_path / "out")


def test_a_main_param_without_the_state_that_others_have(tmp_path):
    run, gone = keyed_run(tmp_path / "run"), f"optimizer.state.momentum_buffer.{WEIGHT}"
    path = runs.checkpoint(run, 8)
    runs.rewrite(path, rename=lambda key: "x.weight" if key == gone else key)
    (problem,) = check_resume(path).problems
    assert WEIGHT in problem and "keys missing" in problem
