"""Some 300 inputs, each kind several times; ``python -m tests.fuzz`` runs more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.fuzz import oracle
from tests.fuzz.__main__ import Result, table
from tests.fuzz.case import KINDS

ROOT = Path(__file__).parents[2]
SEEDS = 300


def test_every_outcome_is_a_clean_refusal_or_the_right_bits() -> None:
    """In a process that may fork: others of the test's own have threads."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--seeds", str(SEEDS)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["all", "inputs"] and sum(map(int, last[2:])) == SEEDS
    control = next(line.split() for line in done.stdout.splitlines() if line.startswith("nothing"))
    assert int(control[1]) > 0 and not any(map(int, control[2:])), "nothing wrong, and refused"


def test_all_kinds_come_up() -> None:
    assert 30 < len(KINDS) < SEEDS / 5


def test_the_oracle_sees_holes(tmp_path: Path) -> None:
    from tests.fuzz import stored

    path = runs.copy_run(runs.DENSE, tmp_path / "run") / "iter_0000008"

    def lose_a_chunk(metadata: stored.Metadata) -> None:
        entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
        entry.chunks.pop()  # type: ignore[union-attr]

    oracle.load(path, lambda key: True)
    stored.change(path, lose_a_chunk)
    with pytest.raises(oracle.HoleError, match="linear_fc1"):
        oracle.load(path, lambda key: True)


def test_the_oracle_compares_bits() -> None:
    one = torch.tensor([0.0, float("nan"), 1.0])
    assert oracle.same(one, one.clone())
    assert not oracle.same(one, torch.tensor([-0.0, float("nan"), 1.0]))
    assert not oracle.same(one, torch.tensor([0.0, 1.0, 1.0]))
    assert not oracle.same(one, one.double())


def test_violations_are_counted() -> None:
    results = [Result(0, ("a",), "merged", "", 0.1), Result(1, ("a",), "WRONG BITS", "x", 0.1)]
    assert [result.is_violation for result in results] == [False, True]
    assert table(results).splitlines()[-1].split() == ["all", "inputs", "1", "1"]
