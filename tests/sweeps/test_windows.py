"""``wsm plan`` says which windows a run affords."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors
from wsm_megatron import MergeConfig
from wsm_megatron.cli.main import main
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.sweeps.windows import affordable


def plan(capsys, tmp_path: Path, run: str, *options: str) -> tuple[str, dict]:
    command = ["plan", "--load", str(RUNS / run), "--save", str(tmp_path / "out"), *options]
    assert main([*command, "--json"]) == 0, capsys.readouterr().err
    *lines, last = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []
    return "\n".join(lines), json.loads(last)


@pytest.mark.parametrize("state", ["drop", "last", "merge"])
def test_bytes_are_those_that_a_merge_of_that_window_reads(state: str, tmp_path: Path) -> None:
    def job(last: int):
        run = RUNS / runs.FP32_PARAM
        return prepare_job(
            MergeConfig(load=run, save=tmp_path / "out", last=last, optimizer_state=state)
        )

    found = affordable(job(4))
    assert [one.count for one in found.windows] == [2, 3, 4]
    for window in found.windows:
        assert window.read == sum(
            task.region.numel * task.recipe.cost(1 if task.recipe.rule.name == "COPY" else n, 0)
            for n in [window.count]
            for task in job(n).plan.tasks
        )


def test_windows_cover_tokens_and_take_disk(tmp_path: Path, capsys) -> None:
    _, data = plan(capsys, tmp_path, runs.MOE)
    two, three, four = data["windows"]["windows"]
    assert [one["tokens"] for one in (two, three, four)] == [256, 512, 768]
    assert [one["oldest"] for one in (two, three, four)] == [6, 4, 2]
    folder = RUNS / runs.MOE
    sizes = [
        sum(file.stat().st_size for file in runs.checkpoint(folder, i).glob("*.distcp"))
        for i in runs.ITERATIONS
    ]
    assert data["windows"]["checkpoint_bytes"] == sum(sizes) // 4
    assert four["stored"] == 4 * (sum(sizes) // 4)
    usage = os.statvfs(tmp_path)
    assert data["windows"]["free"] == pytest.approx(usage.f_bavail * usage.f_frsize, rel=0.01)
    assert data["windows"]["more_that_fit"] > 0


def test_what_is_kept_in_training_is_float32_of_every_weight(tmp_path: Path, capsys) -> None:
    _, data = plan(capsys, tmp_path, runs.DENSE)
    weights = [
        tensor
        for key, tensor in load_tensors(runs.checkpoint(RUNS / runs.DENSE, 8)).items()
        if tensor.is_floating_point() and "optimizer" not in key
    ]
    assert data["windows"]["kept_bytes"] == 4 * sum(tensor.numel() for tensor in weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window-tokens", "600"], "--window-tokens 600 covers 3 checkpoints, iterations 4 to 8: "
         "512 tokens; one more would make it 768"),
        (["--last", "2"], "--last 2 covers 2 checkpoints, iterations 6 to 8: 256 tokens; one more "
         "would make it 512"),
        ([], "the window covers 4 checkpoints, iterations 2 to 8: 768 tokens"),
        (["--iterations", "2,6"], "--iterations 2,6 covers 2 checkpoints, iterations 2 to 6: "
         "512 tokens"),
    ],
)  # fmt: skip
def test_what_a_window_really_covers_is_said(
    options: list[str], words: str, tmp_path: Path, capsys
) -> None:
    text, _ = plan(capsys, tmp_path, runs.DENSE, *options)
    assert f"{words}\n" in text


def test_sources_named_one_by_one_have_no_windows(tmp_path: Path, capsys) -> None:
    run = RUNS / runs.DENSE
    sources = [word for i in (2, 4) for word in ("--source", str(runs.checkpoint(run, i)))]
    assert main(["plan", *sources, "--save", str(tmp_path / "out"), "--json"]) == 0
    assert "windows" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_damaged_checkpoint_outside_the_window_stops_nothing(tmp_path: Path, capsys) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    (runs.checkpoint(run, 2) / "common.pt").write_bytes(b"nothing")
    command = ["plan", "--load", str(run), "--save", str(tmp_path / "out"), "--last", "2"]
    assert main([*command, "--json"]) == 0
    windows = json.loads(capsys.readouterr().out.splitlines()[-1])["windows"]["windows"]
    assert [one["tokens"] for one in windows] == [256, 512, None]
