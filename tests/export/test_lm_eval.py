"""lm-eval runs on an export as it comes, alone and over all merges of a sweep."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from examples import evaluate_merges
from tests import runs
from tests.export import lm_eval_task
from tests.reference import RUNS
from wsm_megatron import MergeConfig
from wsm_megatron.cli.main import main
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.run import sweep


def test_lm_eval_runs_on_an_export(tmp_path: Path) -> None:
    python = lm_eval_task.interpreter()
    source = RUNS / runs.MAIN / "iter_0000008"
    tokenizer = lm_eval_task.write_tokenizer(tmp_path / "tokenizer")
    folder = export(ExportConfig(load=source, save=tmp_path / "hf", tokenizer=tokenizer)).path
    questions = lm_eval_task.write_task(tmp_path / "task")
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "made"]
    command += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, env=lm_eval_task.environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(results.read_text())["results"]["made"]["acc,none"]
    assert accuracy == pytest.approx(lm_eval_task.accuracy(folder, questions))
    assert 0 < accuracy < 1


def test_every_merge_of_a_sweep_is_scored_and_the_best_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = lm_eval_task.interpreter()
    tokenizer = lm_eval_task.write_tokenizer(tmp_path / "tokenizer")
    done = sweep(
        Sweep(
            MergeConfig(load=RUNS / runs.MAIN, save=tmp_path / "out"),
            SweepGrid(decay=("mean", "ema"), last=(3,)),
        ),
        exports=MergeExport(export="hf", export_only=True, tokenizer=tokenizer),
    )
    assert done is not None
    questions = lm_eval_task.write_task(tmp_path / "task")
    for name, value in lm_eval_task.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    scores = tmp_path / "scores.csv"
    line = [str(done.manifest), str(scores), "--tasks", "made", "--model-args", "dtype=float32"]
    line += ["--lm-eval", f"{shlex.quote(python)} -m lm_eval run"]
    evaluate_merges.main([*line, "--device", "cpu", "--include_path", str(tmp_path / "task")])
    with scores.open() as stream:
        found = {row["path"]: float(row["made.acc"]) for row in csv.DictReader(stream)}
    assert found == {
        one.path: pytest.approx(lm_eval_task.accuracy(Path(one.export), questions))
        for one in done.merges
        if one.export is not None
    }
    capsys.readouterr()
    command = ["select", "--manifest", str(done.manifest), "--scores", str(scores)]
    assert main([*command, "--metric", "made.acc"]) == 0
    best = max(found, key=lambda path: found[path])
    out = capsys.readouterr().out
    assert found[best] == max(found.values()) and "best merge: " in out
