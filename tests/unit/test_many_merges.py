"""Several merges from one read of the sources."""

from __future__ import annotations

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.layout import read_layout


def config(tmp_path, run=runs.FULLY, **options):
    return MergeConfig(load=RUNS / run, save=tmp_path / "out", **options)


def assert_each_equals_its_own_merge(report, tmp_path, **options):
    """Every product has the bits of a merge made alone."""
    for k, one in enumerate(report.merged):
        save = tmp_path / "alone" / str(k)
        weights = {"weights": one.coefficients, "iterations": one.iterations}
        alone = merge(MergeConfig(load=RUNS / runs.FULLY, save=save, **weights, **options))
        merged, expected = load_tensors(one.output), load_tensors(alone.output)
        assert set(merged) == set(expected)
        for key, tensor in expected.items():
            assert same_bits(merged[key], tensor), (one.output, key)
        verify(one.output, sources=True)


@pytest.mark.parametrize("optimizer_state", ["drop", "last"])
def test_decays_times_windows(tmp_path, optimizer_state):
    options = {"optimizer_state": optimizer_state}
    report = merge(config(tmp_path, decay="mean,1-sqrt", window_iterations=(2, 4, 6), **options))
    roots = [str(one.output.parent.relative_to(tmp_path / "out")) for one in report.merged]
    assert roots == [
        f"{decay}-{window}-iterations" for window in (2, 4, 6) for decay in ("mean", "1-sqrt")
    ]
    assert [one.iterations for one in report.merged[::2]] == [(6, 8), (4, 6, 8), (2, 4, 6, 8)]
    for one in report.merged:
        assert one.output.name == "iter_0000008"
        assert (one.output.parent / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert_each_equals_its_own_merge(report, tmp_path, **options)


def test_sliding_windows(tmp_path):
    report = merge(config(tmp_path, decay="ema", last=2, sliding_every=2))
    assert [one.iterations for one in report.merged] == [(2, 4), (4, 6), (6, 8)]
    names = sorted(path.name for path in (tmp_path / "out").glob("iter_*"))
    assert names == ["iter_0000004", "iter_0000006", "iter_0000008"]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert_each_equals_its_own_merge(report, tmp_path)


def test_every_source_byte_is_read_once(tmp_path):
    """Three sliding windows of two decays over four checkpoints: four checkpoints are read."""
    several = merge(config(tmp_path, decay="mean,ema", last=2, sliding_every=2))
    assert len(several.merged) == 6
    objects = sum(
        entry.nbytes for one in several.merged for entry in read_layout(one.output).objects.values()
    )
    layout = read_layout(runs.checkpoint(runs.FULLY, 8))
    weights = sum(e.nbytes for e in layout.tensors.values() if e.role.value == "model")
    assert several.bytes_read == 4 * weights + objects


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sliding_every": 2}, "needs --last or --window-iterations"),
        ({"sliding_every": 0, "last": 2}, "at least 1"),
        ({"sliding_every": 2, "last": 2, "output_iteration": 5}, "no --output-iteration"),
        ({"decay": "mean,mean"}, "named twice"),
        ({"window_iterations": (2, 2)}, "named twice"),
        ({"window_iterations": (2, 4), "window_tokens": (5,)}, "contradict"),
    ],
)
def test_bad_combinations(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        merge(config(tmp_path, **options))


def test_a_target_that_exists_stops_all_of_them(tmp_path):
    (tmp_path / "out" / "iter_0000006").mkdir(parents=True)
    with pytest.raises(ValueError, match="iter_0000006 exists"):
        merge(config(tmp_path, last=2, sliding_every=2))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["iter_0000006"]


def test_source_parallel_of_one_rank_is_an_ordinary_merge(tmp_path):
    options = {"decay": "mean,ema", "last": 2, "sliding_every": 2, "optimizer_state": "last"}
    report = merge(config(tmp_path, source_parallel=True, **options))
    assert_each_equals_its_own_merge(report, tmp_path, optimizer_state="last")
