"""The script that scores a sweep's merges: its file goes to ``wsm select`` as it is."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest

from examples import evaluate_merges
from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig
from wsm_megatron.cli.main import main
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.run import sweep

HARNESS = """\
import argparse, json, pathlib, sys
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "output_path", "num_fewshot"):
    parser.add_argument("--" + name)
given = parser.parse_args()
assert given.model == "hf" and given.num_fewshot == "5"
model_args = dict(one.split("=") for one in given.model_args.split(","))
assert model_args["dtype"] == "float32"
with open({log!r}, "a") as stream:
    print(model_args["pretrained"], file=stream)
folder = pathlib.Path(model_args["pretrained"])
if folder.parent.name == {fails!r}:
    sys.exit(3)
head = load_file(folder / "model.safetensors")["lm_head.weight"].double()
score = float(head.abs().sum())
found = {{
    "alias": given.tasks,
    "acc,none": score,
    "acc_stderr,none": 0.5,
    "exact_match,strict": -score,
    "f1,none": float("nan"),
    "sample_len": 24,
}}
out = pathlib.Path(given.output_path, "some__model")
out.mkdir(parents=True)
(out / "results_2026.json").write_text(json.dumps({{"results": {{given.tasks: found}}}}))
"""
"""Stands in for lm-eval: its options, and results as version 0.4 writes them."""


class Harness:
    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "asked"
        self.exports = MergeExport(export="hf", export_only=True)

    def command(self, fails: str = "") -> str:
        script = self.folder / "harness.py"
        script.write_text(HARNESS.format(log=str(self.log), fails=fails))
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"

    def run(self, manifest: Path, scores: Path, *more: str, fails: str = "") -> None:
        line = [str(manifest), str(scores), "--tasks", "made", "--model-args", "dtype=float32"]
        evaluate_merges.main([*line, "--num_fewshot", "5", "--lm-eval", self.command(fails), *more])

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().split()


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def swept(tmp_path: Path, exports: MergeExport) -> Path:
    config = MergeConfig(load=RUNS / runs.MAIN, save=tmp_path / "out")
    done = sweep(Sweep(config, SweepGrid(decay=("mean", "ema"), last=(2, 3))), exports=exports)
    assert done is not None
    return done.manifest


def rows(scores: Path) -> list[dict[str, str]]:
    with scores.open() as stream:
        return list(csv.DictReader(stream))


def test_a_sweep_is_scored_and_its_best_merge_chosen(
    tmp_path: Path, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, scores = swept(tmp_path, harness.exports), tmp_path / "scores.csv"
    newest = RUNS / runs.MAIN / "iter_0000008"
    last = export(ExportConfig(load=newest, save=tmp_path / "last")).path
    harness.run(manifest, scores, "--also", f"8={last}")
    found = rows(scores)
    merges = json.loads(manifest.read_text())["merges"]
    assert [row["path"] for row in found] == ["8", *(one["path"] for one in merges)]
    assert set(found[0]) == {"path", "made.acc", "made.exact_match.strict"}
    assert harness.asked == [str(last), *(one["export"] for one in merges)]
    capsys.readouterr()
    command = ["select", "--manifest", str(manifest), "--scores", str(scores), "--json"]
    assert main([*command, "--metric", "made.acc"]) == 0
    chosen = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = max(found[1:], key=lambda row: float(row["made.acc"]))
    assert chosen["best"]["path"] == best["path"]
    assert [one["iteration"] for one in chosen["checkpoints"]] == [8]


def test_a_failure_keeps_what_is_scored_and_the_same_command_goes_on(
    tmp_path: Path, harness: Harness
) -> None:
    manifest, scores = swept(tmp_path, harness.exports), tmp_path / "scores.csv"
    with pytest.raises(SystemExit, match="exit status 3; what is scored is kept"):
        harness.run(manifest, scores, fails="ema-last2")
    before = len(rows(scores))
    assert 0 < before < 4
    harness.run(manifest, scores)
    assert len(rows(scores)) == 4 and len(harness.asked) == 4 + 1


def test_a_merge_without_an_export_is_named(tmp_path: Path, harness: Harness) -> None:
    manifest = swept(tmp_path, MergeExport())
    with pytest.raises(SystemExit, match="has no export: run the sweep again with --export hf"):
        harness.run(manifest, tmp_path / "scores.csv")
