"""Main params that are no rounded weights, where ranks see different files: the same bits."""

from __future__ import annotations

from pathlib import Path

from tests import runs
from tests.dist.test_source_parallel import (
    assert_equal,
    merge_all,
    ones,
    ordinary,
    spread,
    whole_checkpoints,
)
from tests.reference import load_tensors, split
from tests.unit.optimizer.test_precision import quantised_run, set_args
from wsm_megatron import MergeReport
from wsm_megatron.checkpoint.keys import main_of


def run_of_remainders(to: Path) -> Path:
    """A run of main params, as the precision-aware optimizer would have kept them."""
    run = runs.copy_run(runs.FULLY, to)
    for i in runs.ITERATIONS:
        path = runs.checkpoint(run, i)
        values = {main_of(k): split(t) for k, t in load_tensors(path).items() if main_of(k)}
        runs.rewrite(
            path,
            lambda key, t, v=values: (
                v[main_of(key)][1].float() if main_of(key) else v.get(key, [t])[0]
            ),
        )
        set_args(path, use_precision_aware_optimizer=True)
    return run


def test_merges_have_the_same_bits(tmp_path: Path) -> None:
    """Remainders, and quantised weights with keyed main params and with flat buckets."""
    made = {
        "remainders": run_of_remainders(tmp_path / "remainders"),
        "keyed": quantised_run(runs.FULLY, tmp_path / "keyed", "fp8_param_gather"),
        "flat": quantised_run(runs.FLAT, tmp_path / "flat", "fp8_param_gather"),
    }
    cases = [
        (name, sees, state)
        for name in made
        for sees in (whole_checkpoints(0, 0, 1, 1), whole_checkpoints(1, 0, 1, 0))
        for state in ("merge", "drop")
    ]
    jobs, expected = [], []
    for number, (name, sees, state) in enumerate(cases):
        folder, options = tmp_path / str(number), {"optimizer_state": state}
        jobs.append(ones(spread(made[name], folder, 2, sees), folder / "out", **options))
        expected.append(ordinary(made[name], folder / "expected", **options).output)
    for report, output in zip(merge_all(jobs, tmp_path), expected, strict=True):
        assert isinstance(report, MergeReport), report
        assert_equal(report.output, output)
