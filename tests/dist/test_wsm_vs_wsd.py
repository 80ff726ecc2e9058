"""The evidence, as its ci profile makes it: structure, pairing, resuming, statistics. No outcomes:
a few steps of a toy have none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("matplotlib")

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.plan import plan
from examples.wsm_vs_wsd.profile import PROFILES
from examples.wsm_vs_wsd.record import collect
from examples.wsm_vs_wsd.results import Results

CI = PROFILES["ci"]


def _command(*words: object) -> str:
    command = [sys.executable, "-m", "examples.wsm_vs_wsd", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "out"
    printed = _command("run", "ci", "--out", out)
    assert "min left" in printed, "progress and an estimate"
    return out


@pytest.fixture(scope="module")
def data(out: Path) -> dict[str, Any]:
    return collect(out)


def test_every_arm_has_a_result_and_the_runs_say_how_it_was_made(data: dict[str, Any]) -> None:
    assert set(data["arms"]) == {arm.name for arm in plan(CI)}
    (run,) = data["runs"]
    assert len(run["commit"]) in (0, 40) and run["command"].startswith("python -m examples")
    assert run["hardware"]["cores"] and run["versions"]["megatron-core"]
    assert run["profile"]["seeds"] == list(CI.seeds)


def test_every_model_is_there_once_for_each_seed(data: dict[str, Any]) -> None:
    found = Counter(
        (row["name"], arm["seed"]) for arm in data["arms"].values() for row in arm["rows"]
    )
    assert set(found.values()) == {1}
    models = {name for name, _ in found}
    assert set(found) == {(name, seed) for name in models for seed in CI.seeds}
    expected = [names.decay("main", s, w) for s in names.STYLES for w in CI.windows]
    for window in CI.durations:
        expected.append(names.merged("main", "mean", window, CI.interval, CI.steps))
    for interval in CI.intervals(CI.windows[-1]):
        expected.append(names.merged("main", "ema", CI.windows[-1], interval, CI.steps))
    assert set(expected) <= models


def test_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_data(
    data: dict[str, Any],
) -> None:
    """A decay's first training loss is that of the constant LR: same checkpoint, same batch."""
    results = Results(data)
    for seed in CI.seeds:
        stable = data["arms"][f"s{seed}-main"]["training_losses"]
        for window in CI.windows:
            first = (CI.steps - window) // CI.interval
            for style in names.STYLES:
                decayed = data["arms"][f"s{seed}-main-{style}-{window}"]["training_losses"]
                assert decayed[0] == stable[first]
    seeds = results.values(names.stable("main", CI.steps))
    assert len(set(seeds.values())) == len(seeds), "seeds differ"


def test_decays_end_at_no_lr_and_all_else_at_the_constant_one(data: dict[str, Any]) -> None:
    lrs = {name: arm["last_lr"] for name, arm in data["arms"].items() if "last_lr" in arm}
    for seed in CI.seeds:
        for style in names.STYLES:
            assert lrs[f"s{seed}-main-{style}-{CI.middle}"] == 0.0
        assert lrs[f"s{seed}-merge-decay"] == lrs[f"s{seed}-low-linear-{CI.middle}"] == 0.0
        for arm in ("noisy-constant-8", "moments-last", "moments-drop", "spiked", "rescued"):
            assert lrs[f"s{seed}-{arm}"] == CI.lr


def test_merges_by_the_product_have_the_bits_of_merges_in_memory(data: dict[str, Any]) -> None:
    bits = [arm["same_bits"] for arm in data["arms"].values() if arm.get("same_bits") is not None]
    policies = 3  # of the moments; and decay after merging, and the rescue
    assert bits == [True] * (policies + 2) * len(CI.seeds)


def test_a_run_goes_on_where_it_was_stopped(out: Path, data: dict[str, Any]) -> None:
    again = ["s1-main-1-sqrt-4", "s2-moments-drop", "s1-main-merges"]
    for name in again:
        (out / "arms" / f"{name}.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (out / "arms").glob("*.json")}
    assert f"{len(plan(CI))} of {len(plan(CI))} arms" in _command("run", "ci", "--out", out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in again:
        redone = json.loads((out / "arms" / f"{name}.json").read_text())
        assert redone["rows"] == data["arms"][name]["rows"]


def test_results_of_other_sizes_are_not_mixed(out: Path) -> None:
    command = [sys.executable, "-m", "examples.wsm_vs_wsd", "run", "night", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "other sizes" in done.stderr


def test_selection_looks_at_the_validation_split_alone(data: dict[str, Any]) -> None:
    results = Results(data)
    candidates = [names.decay("main", s, w) for w in CI.windows for s in names.STYLES]
    for seed, name in results.selected(candidates).items():
        losses = {one: results.values(one, "validation")[seed] for one in candidates}
        assert losses[name] == min(losses.values())
        assert results.selected_values(candidates)[seed] == results.values(name, "test")[seed]


def test_the_page_is_made_from_the_data_alone(out: Path, tmp_path: Path) -> None:
    _command("page", "--out", out, "--data", tmp_path / "ci.json", "--docs", tmp_path / "one")
    _command("page", "--data", tmp_path / "ci.json", "--docs", tmp_path / "two")
    page = (tmp_path / "one" / "evidence.md").read_text()
    assert page == (tmp_path / "two" / "evidence.md").read_text()
    assert "Made from a `ci` run" in page and "## Claim by claim" in page
    assert (tmp_path / "one" / "evidence.png").read_bytes().startswith(b"\x89PNG")
    assert "Not run" not in page


def test_a_page_of_half_the_arms_says_what_is_missing(data: dict[str, Any], tmp_path: Path) -> None:
    from examples.wsm_vs_wsd.page import write_page

    some = {k: v for k, v in data["arms"].items() if "moe" not in k and "low" not in k}
    page = write_page({**data, "arms": some}, tmp_path).read_text()
    assert "Not run in this profile's time." in page and "| not run |" in page
