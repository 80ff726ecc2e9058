"""``wsm resume-check``: whether Megatron resumes, on real checkpoints and on damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors
from tests.runs import dump_common
from wsm_megatron import MergeConfig, merge
from wsm_megatron.checkpoint.common_state import load_common
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME, EXIT_USAGE
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.optimizer.main_params import check_main_params
from wsm_megatron.planning.launch_flags import as_data
from wsm_megatron.planning.provenance import read_provenance

LAYOUTS = {
    runs.DENSE: None,
    runs.FP32_PARAM: "replicated",
    runs.FLAT: "dp_reshardable",
    runs.FULLY: "fully_reshardable",
    runs.WRONG_MAINS: "fully_reshardable",
    runs.MOE: "dp_reshardable",
    runs.MAIN: "dp_reshardable",
}


@pytest.mark.parametrize("run", runs.ALL)
def test_what_megatron_saved(run):
    found = check_resume(RUNS / run)
    assert found.path == runs.checkpoint(run, 8)
    assert found.optimizer == LAYOUTS[run]
    assert found.resumes == (run in runs.WITH_OPTIMIZER), found.problems
    assert not found.merged
    assert found.any_sizes == (LAYOUTS[run] != "dp_reshardable")
    assert (found.readers == "core 0.19 and later") == (run == runs.MAIN)
    assert found.sizes == {
        "TP": 2 if run == runs.FP32_PARAM else 1,
        "PP": 2 if run == runs.FULLY else 1,
        "EP": 2 if run == runs.MOE else 1,
    }


def test_wrong_mains_are_named():
    found = check_resume(runs.checkpoint(runs.WRONG_MAINS, 4))
    assert len(found.mains.wrong) == 7 and "embedding.word_embeddings.weight" in found.mains.wrong
    assert any("7 model tensors are of other weights" in problem for problem in found.problems)
    assert "--no-load-optim" in found.launches[0].flags


def merged(run, out, **options):
    options.setdefault("optimizer_state", "last")
    config = MergeConfig(load=RUNS / run, save=out, last=3, decay="mean", **options)
    return merge(config)


@pytest.mark.parametrize("run", [runs.FP32_PARAM, runs.FULLY])
def test_a_merge_resumes_and_the_same_with_unmerged_mains_does_not(run, tmp_path, capsys):
    out = tmp_path / "out"
    output = out / "iter_0000008"
    merged(run, out)
    assert main(["resume-check", str(out)]) == 0
    assert "plain --load resumes" in capsys.readouterr().out
    newest, roles = load_tensors(runs.checkpoint(run, 8)), read_layout(output).tensors
    runs.rewrite(output, lambda key, t: newest[key] if roles[key].role is Role.MAIN else t)
    assert main(["resume-check", str(out)]) == EXIT_DOES_NOT_RESUME
    assert "plain --load does not resume" in capsys.readouterr().out


@pytest.mark.parametrize("run", [runs.FLAT, runs.MOE, runs.MAIN])
def test_unmerged_mains_in_flat_buckets_are_found(run, tmp_path):
    copy = runs.copy_run(run, tmp_path / "run")
    path, layout = runs.checkpoint(copy, 8), read_layout(runs.checkpoint(copy, 8))
    assert check_main_params(layout).wrong == ()
    models = {key for key, entry in layout.tensors.items() if entry.role is Role.MODEL}
    older = load_tensors(runs.checkpoint(run, 2))
    runs.rewrite(path, lambda key, t: older[key] if key in models else t)
    # Norms of 32 elements have hardly moved in bf16; every matrix has.
    assert {key for key in models if "norm" not in key} <= set(
        check_main_params(read_layout(path)).wrong
    )


def test_one_wrong_element_in_a_bucket_is_found(tmp_path):
    path = runs.checkpoint(runs.copy_run(runs.FLAT, tmp_path / "run"), 8)
    key = "decoder.layers.mlp.linear_fc2.weight"

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == key:
            tensor[1, -1, -1] += 1
        return tensor

    runs.rewrite(path, change)
    assert check_main_params(read_layout(path)).wrong == (key,)


def test_dropped_optimizer_state(tmp_path, capsys):
    merged(runs.FULLY, tmp_path / "out", optimizer_state="drop")
    status = main(["resume-check", "--json", str(tmp_path / "out")])
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == EXIT_DOES_NOT_RESUME
    assert not data["resumes"] and data["merged"] and data["optimizer"] is None
    assert "KeyError 'optimizer'" in data["problems"][0]
    flags = data["launches"]["continue"]["flags"]
    assert flags == "--no-load-optim --no-load-rng --lr-warmup-iters 0"


@pytest.mark.parametrize("state, moments", [
    ("drop", "dropped"), ("last", "of the newest source"), ("merge", "merged"),
])  # fmt: skip
def test_the_merge_says_how_to_launch(state, moments, tmp_path, capsys):
    """The same flags printed, in the provenance, and from resume-check."""
    out = tmp_path / "out"
    command = ["merge", "--load", str(RUNS / runs.FULLY), "--save", str(out), "--last", "2"]
    assert main([*command, "--optimizer-state", state, "--output-iteration", "100"]) == 0
    printed = capsys.readouterr().out
    resume = read_provenance(out / "iter_0000100")["resume"]
    assert resume["moments"] == moments
    assert resume["launch"] == as_data(check_resume(out).launches)
    for launch in resume["launch"].values():
        assert f"--load {out} {launch['flags']}".rstrip() + "\n" in printed
    steps = "D" if state == "drop" else "8+D"
    words = f"--lr-decay-iters {steps} --train-iters 100+D"
    assert words in resume["launch"]["decay"]["flags"]


def rewrite_common(path: Path, change) -> None:
    state = load_common((path / "common.pt").read_bytes(), "")
    change(state)
    (path / "common.pt").write_bytes(dump_common(state))


@pytest.mark.parametrize("change, words", [
    (lambda state: setattr(state["args"], "no_save_optim", True), "args say no_save_optim"),
    (lambda state: state.pop("optimizer"), "has no 'optimizer'"),
    (lambda state: state.pop("opt_param_scheduler"), "has no 'opt_param_scheduler'"),
])  # fmt: skip
def test_common_state_that_does_not_resume(change, words, tmp_path):
    path = runs.checkpoint(runs.copy_run(runs.FULLY, tmp_path / "run"), 8)
    rewrite_common(path, change)
    assert any(words in problem for problem in check_resume(path).problems)


def test_missing_moments(tmp_path):
    output = merged(runs.FULLY, tmp_path / "out", drop=("*exp_avg_sq*",)).output
    assert any("no moments for" in problem for problem in check_resume(output).problems)


def test_against_the_run_it_comes_from(tmp_path):
    output = merged(runs.FULLY, tmp_path / "out").output
    assert check_resume(output, RUNS / runs.FULLY).resumes


def test_against_another_run(tmp_path):
    output = merged(runs.FULLY, tmp_path / "out").output
    problems = check_resume(output, RUNS / runs.FP32_PARAM).problems
    assert any("optimizer layout fully_reshardable differs" in problem for problem in problems)
    assert any("parallel sizes" in problem for problem in problems)
    problems = check_resume(output, RUNS / runs.MOE).problems
    assert any("not the model of" in problem for problem in problems)


def test_against_another_schedule(tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    rewrite_common(
        runs.checkpoint(run, 8), lambda state: state["opt_param_scheduler"].update(max_lr=1.0)
    )
    output = merged(runs.FULLY, tmp_path / "out").output
    assert any("LR scheduler" in problem for problem in check_resume(output, run).problems)


def test_a_root_without_a_tracker(tmp_path, capsys):
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    (run / "latest_checkpointed_iteration.txt").unlink()
    assert main(["resume-check", str(run)]) == EXIT_USAGE
    assert "no tracker" in capsys.readouterr().err
    for path in run.iterdir():
        shutil.rmtree(path)
    assert main(["resume-check", str(run)]) == EXIT_USAGE
    assert "no iter_XXXXXXX checkpoint" in capsys.readouterr().err
