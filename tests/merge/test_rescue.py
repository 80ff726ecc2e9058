"""The merge before a spike: which checkpoints, what it keeps, and how Megatron resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, merge
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE

RUN = RUNS / runs.FP32_PARAM


def rescue(capsys, *arguments: object) -> tuple[str, dict]:
    assert main(["rescue", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


@pytest.mark.parametrize(("before", "iterations"), [(8, [4, 6]), (7, [4, 6]), (6, [2, 4])])
def test_the_last_checkpoints_before_it_are_merged(
    before: int, iterations: list[int], tmp_path: Path, capsys
) -> None:
    command = ["--load", RUN, "--save", tmp_path / "out", "--before", before, "--last", 2]
    text, data = rescue(capsys, *command)
    assert data["iterations"] == iterations and data["coefficients"] == [0.5, 0.5]
    assert f"continue pre-training: --load {tmp_path / 'out'}" in text
    assert data["skip"] == [f"--iterations-to-skip {before - 1}", f"--iterations-to-skip {before}"]
    assert data["skip"][1] in text


def test_it_is_the_mean_with_main_params_and_moments(tmp_path: Path, capsys) -> None:
    rescue(capsys, "--load", RUN, "--save", tmp_path / "out", "--before", 100)
    other = merge(
        MergeConfig(
            load=RUN, save=tmp_path / "same", last=3, decay="mean", optimizer_state="last", to=8
        )
    )
    expected, found = load_tensors(other.output), load_tensors(tmp_path / "out/iter_0000008")
    assert expected.keys() == found.keys() and any("exp_avg" in key for key in found)
    assert all(same_bits(expected[key], found[key]) for key in expected)


def test_a_spike_that_has_crept_in_is_named(tmp_path: Path, capsys, caplog) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    runs.rewrite(runs.checkpoint(run, 6), lambda key, t: t + 0.1 if t.is_floating_point() else t)
    options = ["--before", 9, "--last", 4, "--optimizer-state", "drop"]
    rescue(capsys, "--load", run, "--save", tmp_path / "out", *options)
    assert any("iter_0000006" in one and "off the run's path" in one for one in caplog.messages)


@pytest.mark.parametrize(("before", "last"), [(2, 2), (5, 3), (3, 2)])
def test_too_few_checkpoints_before_it_are_refused(
    before: int, last: int, tmp_path: Path, capsys
) -> None:
    command = ["rescue", "--load", RUN, "--save", tmp_path / "out", "--before", before]
    assert main([*map(str, command), "--last", str(last)]) == EXIT_USAGE
    assert f"--before {before}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
