"""The demo, much shortened: it trains, merges through the command line, loads and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


def test_demo_reports_trained_and_merged_losses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "examples.demo", "--out", out, "--steps", "4"]
    command += ["--save-interval", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    losses = json.loads((out / "losses.json").read_text())
    assert list(losses["trained"]) == ["1", "2", "3", "4"]
    assert [merge["decay"] for merge in losses["merged"]] == ["mean", "1-sqrt", "ema"]
    for loss in [*losses["trained"].values(), *(merge["loss"] for merge in losses["merged"])]:
        assert 4 < loss < 7, "an untrained model of bytes is near ln 256"
    assert "merged, mean over 4" in done.stdout
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    _sweep_score_select_report(out, losses["trained"])


def _sweep_score_select_report(out: Path, trained: dict[str, float]) -> None:
    """The four commands of docs/demo.md, on the same run."""

    def run(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    swept, scores, page = out / "sweep", out / "scores.csv", out / "report.html"
    run("wsm_megatron", "sweep", "--load", out / "run", "--save", swept, "--last", "2,3",
        "--decay", "mean,ema", "--trajectory")  # fmt: skip
    scores.write_text(run("examples.demo.score", swept / "sweep.json"))
    shown = run("wsm_megatron", "select", "--manifest", swept / "sweep.json", "--load",
                out / "run", "--scores", scores, "--report", page)  # fmt: skip
    assert "best merge" in shown and "<svg" in page.read_text()
    known = dict(line.split(",") for line in scores.read_text().splitlines())
    assert float(known[str((out / "run/iter_0000004").absolute())]) == trained["4"]
