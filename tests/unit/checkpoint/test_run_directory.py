"""What lies in a run directory beside finished checkpoints: named, with a way out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron.checkpoint import run_directory
from wsm_megatron.checkpoint.run_directory import (
    TRACKER_FILE,
    read_tracker,
    scan_run,
    tracked_iteration,
)
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE


@pytest.fixture
def wsm(capsys, caplog):
    """Run a command; its status and all that it said."""

    def run(*arguments: Any) -> tuple[int, str]:
        caplog.clear()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out + captured.err + caplog.text

    return run


@pytest.fixture
def run(tmp_path):
    return runs.copy_run(runs.DENSE, tmp_path / "run")


def plan(wsm: Any, run: Path, *options: str) -> tuple[int, str]:
    return wsm("plan", "--load", run, "--save", run.parent / "out", *options)


def planned(output: str) -> list[str]:
    return [line for line in output.splitlines() if "would write" in line]


def set_args(path: Path, **values: Any) -> None:
    runs.restate(path, lambda state: vars(state["args"]).update(values))


@pytest.mark.parametrize("folder", ["iter_100", "iter_00000100", "iter_000000000100"])
def test_names_of_other_widths_are_told(tmp_path, wsm, folder):
    run = tmp_path / "run"
    shutil.copytree(runs.checkpoint(runs.DENSE, 2), run / folder)
    for arguments in (["inspect", run], ["plan", "--load", run, "--save", tmp_path / "out"]):
        status, output = wsm(*arguments)
        assert status == (EXIT_USAGE if arguments[0] == "plan" else 0)
        assert f"{folder} is not named as Megatron names checkpoints" in output
        assert "iter_0000100" in output
    status, output = plan(wsm, run, "--iterations", "100,200")
    assert status == EXIT_USAGE and folder in output


def test_two_folders_of_one_iteration_are_told(run, wsm):
    shutil.copytree(run / "iter_0000004", run / "iter_00000004")
    status, output = plan(wsm, run)
    assert status == 0 and "iter_00000004 is a second folder of iteration 4" in output
    assert scan_run(run).finished == (2, 4, 6, 8)
    assert "iter_00000004 is a second folder" in wsm("inspect", run)[1]


def test_iterations_of_eight_digits_are_megatrons_own(tmp_path):
    for iteration in (9_999_999, 10_000_000, 12_345_678):
        shutil.copytree(runs.checkpoint(runs.DENSE, 2), tmp_path / f"iter_{iteration}")
    assert scan_run(tmp_path).finished == (9_999_999, 10_000_000, 12_345_678)


def test_a_run_of_legacy_checkpoints_is_told_once(tmp_path, wsm):
    for iteration in (10, 20):
        (tmp_path / f"run/iter_{iteration:07d}/mp_rank_00").mkdir(parents=True)
    (tmp_path / "run" / TRACKER_FILE).write_text("20")
    status, output = plan(wsm, tmp_path / "run")
    assert status == EXIT_USAGE and output.count("a legacy checkpoint") == 1
    assert "iter_0000010 (and 1 more)" in output and "--ckpt-convert-format torch_dist" in output
    assert "finished" not in output
    status, output = wsm("inspect", tmp_path / "run")
    assert status == 0 and output.count("is a legacy checkpoint") == 3
    assert "the tracker names iteration 20, which is a legacy checkpoint" in output
    assert "finished" not in output
    status, output = wsm("resume-check", tmp_path / "run")
    assert status == EXIT_USAGE and "legacy" in output and "finished" not in output


def test_a_legacy_checkpoint_among_others_is_left_out_by_name(run, wsm):
    (run / "iter_0000001/mp_rank_00_000").mkdir(parents=True)
    status, output = plan(wsm, run)
    assert status == 0 and "iter_0000001 is a legacy checkpoint" in output
    assert "left out" in output
    status, output = plan(wsm, run, "--iterations", "1,2")
    assert status == EXIT_USAGE and "iter_0000001 is a legacy checkpoint" in output


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor", "torch_dcp", "", None, 3])
def test_other_sharded_formats_are_named_with_a_way_out(run, wsm, backend):
    marker = {"sharded_backend": backend, "sharded_backend_version": 1}
    (run / "iter_0000004/metadata.json").write_text(json.dumps(marker))
    status, output = plan(wsm, run)
    assert status == EXIT_USAGE and "iter_0000004" in output
    assert repr(str(backend)) in output and "torch_dist" in output


def test_a_release_checkpoint_is_told(tmp_path, run, wsm):
    shutil.copytree(run / "iter_0000002", tmp_path / "only/release")
    (tmp_path / "only" / TRACKER_FILE).write_text("release")
    status, output = plan(wsm, tmp_path / "only")
    assert status == EXIT_USAGE and "release is a release checkpoint" in output
    assert "name it and the others with --source PATH" in output
    status, output = wsm("inspect", tmp_path / "only")
    assert status == 0 and "release is a release checkpoint" in output
    assert "says release" in output
    status, output = wsm("inspect", tmp_path / "only/release")
    assert status == 0 and "iteration 2" in output
    status, output = wsm("resume-check", tmp_path / "only")
    assert status == EXIT_USAGE and "says release" in output
    shutil.move(tmp_path / "only/release", run)
    status, output = plan(wsm, run)
    assert status == 0 and "a release checkpoint" not in output, (
        "beside a run's own it is no mistake"
    )


def test_a_deepspeed_run_is_told(tmp_path, wsm):
    (tmp_path / "run/global_step100").mkdir(parents=True)
    status, output = plan(wsm, tmp_path / "run")
    assert status == EXIT_USAGE and "global_step100 is a DeepSpeed checkpoint" in output


def test_a_link_that_leads_nowhere_and_a_file_are_told(run, wsm):
    (run / "iter_0000005").symlink_to("../gone/iter_0000005")
    (run / "iter_0000007").write_text("moved")
    (run / "iter_0000009").symlink_to("iter_0000009")
    for arguments in (["inspect", run], ["plan", "--load", run, "--save", run.parent / "out"]):
        status, output = wsm(*arguments)
        assert status == 0
        assert "iter_0000005 is a link that leads nowhere (to ../gone/iter_0000005)" in output
        assert "iter_0000007 is not a folder" in output
        assert "iter_0000009 is a link that leads nowhere" in output
    status, output = plan(wsm, run, "--iterations", "2,5")
    assert status == EXIT_USAGE and "iter_0000005 is a link that leads nowhere" in output


def test_a_link_to_a_checkpoint_is_one(run, tmp_path):
    shutil.move(run / "iter_0000004", tmp_path / "elsewhere")
    (run / "iter_0000004").symlink_to(tmp_path / "elsewhere")
    assert scan_run(run).finished == (2, 4, 6, 8)


def test_a_folder_that_cannot_be_looked_into_is_told(run, wsm, monkeypatch):
    real = run_directory.is_complete

    def refuse(path: Path) -> bool:
        if path.name == "iter_0000006":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(run_directory, "is_complete", refuse)
    status, output = plan(wsm, run)
    assert status == 0 and "iter_0000006 is not readable (Permission denied)" in output
    status, output = plan(wsm, run, "--to", "6")
    assert status == EXIT_USAGE and "iter_0000006 is not readable" in output


@pytest.mark.parametrize(
    "content, said",
    [
        (b"release", "says release"),
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"12a", "says '12a'"),
        (b"\x00\xff\x1b[2J", "neither an iteration nor release"),
        (b"9" * 10**6, "neither an iteration nor release"),
        ("\u0662".encode(), "neither an iteration nor release"),
    ],
    ids=repr,
)
def test_trackers_that_name_no_iteration(run, wsm, content, said):
    (run / TRACKER_FILE).write_bytes(content)
    for arguments in (["inspect", run], ["plan", "--load", run, "--save", run.parent / "out"]):
        status, output = wsm(*arguments)
        assert status == 0 and said in output and len(output) < 20_000
        assert "\x1b" not in output and "\x00" not in output
    status, output = wsm("resume-check", run)
    assert status == EXIT_USAGE and said in output and TRACKER_FILE in output


def test_a_tracker_of_a_checkpoint_that_is_gone_is_marked(run, wsm):
    (run / TRACKER_FILE).write_text("7\n")
    assert tracked_iteration(read_tracker(run)) == 7
    output = wsm("inspect", run)[1]
    assert "the tracker names iteration 7, of which there is no finished checkpoint" in output
    assert "newer than the tracker" in output


def test_a_finished_checkpoint_newer_than_the_tracker(run, wsm):
    (run / TRACKER_FILE).write_text("6")
    status, output = plan(wsm, run, "--last", "2")
    assert status == 0 and "iter_0000006" in planned(output)[0]
    assert "iter_0000008 is newer and left out" in output and "--to 8" in output
    status, output = plan(wsm, run, "--to", "8")
    assert status == 0 and "iter_0000008" in planned(output)[0]
    assert "iter_0000008 was finished all the same" in output
    lines = wsm("inspect", run)[1].splitlines()
    assert [("newer than the tracker" in line) for line in lines if "trained" in line] == [
        *(False, False, False),
        True,
    ]


def test_a_folder_that_holds_another_iteration(run, wsm):
    shutil.rmtree(run / "iter_0000004")
    shutil.copytree(run / "iter_0000006", run / "iter_0000004")
    status, output = plan(wsm, run)
    assert status == EXIT_USAGE
    assert "iter_0000004 holds the state of iteration 6" in output and "iter_0000006" in output
    assert plan(wsm, run, "--iterations", "2,6")[0] == 0
    output = wsm("inspect", run)[1]
    assert "holds the state of iteration 6" in output
    assert "the same save as iter_0000004" in output


def test_two_folders_of_one_save(run, wsm):
    """A copy whose state was brought up to date: only the id of its save tells."""
    shutil.rmtree(run / "iter_0000008")
    shutil.copytree(run / "iter_0000004", run / "iter_0000008")
    runs.restate(run / "iter_0000008", lambda state: state.update(iteration=8))
    set_args(run / "iter_0000008", consumed_train_samples=64)
    status, output = plan(wsm, run)
    assert status == EXIT_USAGE
    assert "iter_0000004 and " in output and "iter_0000008 are copies of one save" in output
    assert plan(wsm, run, "--iterations", "2,6,8")[0] == 0
    assert "the same save as iter_0000004" in wsm("inspect", run)[1]
    assert plan(wsm, run, "--node-local")[0] == EXIT_USAGE


def test_merges_of_merges_are_no_copies(run, tmp_path, wsm):
    """Their .metadata may be equal, byte for byte, and says no id."""
    for last in ("2,4", "6,8"):
        command = ["merge", "--load", run, "--save", tmp_path / "merged", "--iterations", last]
        assert wsm(*command)[0] == 0
    assert wsm("merge", "--load", tmp_path / "merged", "--save", tmp_path / "again")[0] == 0
    options = ["--save", tmp_path / "as", "--output-iteration", "100", "--iterations", "2,4"]
    assert wsm("merge", "--load", run, *options)[0] == 0
    assert "holds the state" not in wsm("inspect", tmp_path / "as")[1]


@pytest.mark.parametrize("options", [[], ["--node-local"]], ids=["plain", "source-parallel"])
def test_a_change_of_sequence_length(run, wsm, options):
    """The length grows eightfold after iteration 4: 1, 2, 10 and 18 times 256 tokens."""
    for iteration in (6, 8):
        set_args(run / f"iter_{iteration:07d}", seq_length=128, iteration=4)
    status, output = plan(wsm, run, "--json", *options)
    data = json.loads(_json_line(output))
    assert status == 0 and data["unit"] == "tokens" and data["why_iterations"] is None
    assert data["positions"] == [256, 512, 2560, 4608]
    expected = pytest.approx([0.0441, 0.3529, 0.3529, 0.25], abs=5e-5)
    assert data["coefficients"] == expected
    status, output = plan(wsm, run, "--json", "--window-tokens", "4096", *options)
    assert json.loads(_json_line(output))["iterations"] == [4, 6, 8]
    status, output = plan(wsm, run, "--json", "--iterations", "2,8", *options)
    assert json.loads(_json_line(output))["positions"] == [256, 4608]


def _json_line(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("{"))


def test_the_unit_is_said_and_why_it_is_not_tokens(run, wsm):
    status, output = plan(wsm, run)
    assert status == 0 and "positions in tokens\n" in output
    set_args(run / "iter_0000006", consumed_train_samples=20)
    for command in ("plan", "coefficients", "merge"):
        options = ["--save", run.parent / command] if command != "coefficients" else []
        status, output = wsm(command, "--load", run, *options)
        assert status == 0
        assert (
            "positions in iterations: consumed samples do not increase from iteration 4 (32) to 6 "
            "(20)"
        ) in output
    provenance = json.loads((run.parent / "merge/iter_0000008/wsm_merge.json").read_text())
    assert provenance["unit"] == "iterations" and provenance["positions"] == [2, 4, 6, 8]
    set_args(run / "iter_0000006", seq_length=None)
    output = plan(wsm, run)[1]
    assert "positions in iterations: checkpoint of iteration 6 does not say" in output


@pytest.mark.parametrize("options", [[], ["--node-local"]], ids=["plain", "source-parallel"])
def test_a_decaying_learning_rate(tmp_path, wsm, options):
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    for path in run.glob("iter_*"):
        runs.restate(
            path,
            lambda state: state["opt_param_scheduler"].update(lr_decay_style="cosine", min_lr=0.0),
        )
    status, output = plan(wsm, run, *options)
    assert status == EXIT_USAGE and "reaches into a decay" in output
    assert "--allow-lr-decay" in output and "at iteration 8 (0.0% of its peak)" in output
    status, output = plan(wsm, run, "--allow-lr-decay", *options)
    assert status == 0 and "reaches into a decay" in output
    status, output = wsm("coefficients", "--load", run)
    assert status == 0 and "reaches into a decay" in output


def test_a_constant_learning_rate_is_shown(wsm, tmp_path):
    status, output = wsm("plan", "--load", RUNS / runs.FLAT, "--save", tmp_path / "out", "--json")
    assert status == 0 and "learning rate" not in output
    assert json.loads(_json_line(output))["lr"] == [1e-3] * 4
    assert "LR 0.001" in wsm("inspect", RUNS / runs.FLAT)[1]


def test_inspect_marks_a_checkpoint_that_cannot_be_read(run, wsm):
    os.truncate(run / "iter_0000004/common.pt", 100)
    status, output = wsm("inspect", run)
    lines = [line for line in output.splitlines() if "trained" in line]
    assert status == 0 and len(lines) == 4 and "common.pt" in lines[1]
