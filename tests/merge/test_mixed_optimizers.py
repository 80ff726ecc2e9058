"""Sources that keep their optimizer state differently, as after a change of launch flags."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.optimizer.main_params import check_main_params
from wsm_megatron.planning.provenance import read_provenance

WEIGHTS = (0.2, 0.3, 0.5)


REPLICATED = "replicated"
"""FULLY as a run without the distributed optimizer would have saved it."""


def mixed_run(folder, *names):
    """Iterations 4, 6 and 8, each of another run of the same model."""
    folder.mkdir()
    for name, iteration in zip(names, (4, 6, 8), strict=True):
        path = runs.checkpoint(runs.FULLY if name == REPLICATED else name, iteration)
        shutil.copytree(path, folder / path.name)
        if name == REPLICATED:
            runs.rewrite(folder / path.name, rename=_as_replicated)
    return folder, [load_tensors(runs.checkpoint(folder, i)) for i in (4, 6, 8)]


def _as_replicated(key):
    return key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")


def run_merge(run, out, **options):
    options = {"optimizer_state": "last", "weights": WEIGHTS, **options}
    return merge(MergeConfig(load=run, save=out, **options)).output


@pytest.mark.parametrize("names", [
    (REPLICATED, runs.FULLY, runs.FULLY),
    (runs.FLAT, runs.DENSE, runs.FULLY),
    (runs.FULLY, runs.FULLY, REPLICATED),
])  # fmt: skip
def test_main_params_are_rebuilt_from_the_merged_model(names, tmp_path, caplog):
    run, sources = mixed_run(tmp_path / "run", *names)
    output = run_merge(run, tmp_path / "out")
    assert "main params are rebuilt from the merged model" in caplog.text
    resume = read_provenance(output)["resume"]
    assert resume["main_params"] == "rebuilt from the merged model"
    verify(output, sources=True)
    merged, entries = load_tensors(output), read_layout(runs.checkpoint(run, 8)).tensors
    assert set(merged) == set(entries)
    for key, tensor in merged.items():
        model = main_of(key) or key
        if entries[key].role is Role.MOMENT:
            assert same_bits(tensor, sources[-1][key]), key
        else:
            total = weighted_sum64(WEIGHTS, [source[model] for source in sources])
            main = rounded(total, merged[_main(entries, model)].dtype)
            assert same_bits(tensor, main.to(tensor.dtype)), key
    assert check_main_params(read_layout(output)).wrong == ()


def _main(entries, model):
    (main,) = [key for key in entries if main_of(key) == model]
    return main


def test_moments_merge_where_every_source_has_them(tmp_path):
    """Replicated and fully_reshardable optimizers keep moments under the same keys."""
    run, sources = mixed_run(tmp_path / "run", REPLICATED, runs.FULLY, runs.FULLY)
    merged = load_tensors(run_merge(run, tmp_path / "out", optimizer_state="merge"))
    moments = [key for key in merged if ".exp_avg" in key]
    assert len(moments) == 18
    for key in moments:
        expected = rounded(weighted_sum64(WEIGHTS, [s[key] for s in sources]), merged[key].dtype)
        assert same_bits(merged[key], expected), key


@pytest.mark.parametrize("names, state, words", [
    ((runs.FLAT, runs.FLAT, runs.FULLY), "merge", "keep their moments differently.*state last"),
    ((runs.DENSE, runs.FULLY, runs.FULLY), "merge", "keep their moments differently.*state last"),
    ((runs.FULLY, runs.FULLY, runs.FLAT), "last", "flat buckets.*neither.*--optimizer-state drop"),
    ((runs.DENSE, runs.FLAT, runs.FLAT), "last", r"flat buckets.*end the window \(--to\)"),
    ((runs.FLAT, runs.FLAT, runs.DENSE), "last", "no optimizer state to keep.*state drop"),
])  # fmt: skip
def test_refused_with_the_way_out(names, state, words, tmp_path):
    run, _ = mixed_run(tmp_path / "run", *names)
    with pytest.raises(ValueError, match=words):
        run_merge(run, tmp_path / "out", optimizer_state=state)
    assert not (tmp_path / "out").exists()


def test_flat_buckets_cannot_be_rebuilt(tmp_path):
    with pytest.raises(ValueError, match="--rebuild-main-params cannot rebuild.*state drop"):
        merge(
            MergeConfig(
                load=RUNS / runs.FLAT,
                save=tmp_path / "out",
                optimizer_state="last",
                rebuild_main_params=True,
            )
        )


def test_rebuilding_main_params_that_are_dropped(tmp_path):
    with pytest.raises(ValueError, match="--rebuild-main-params has no effect with.*state drop"):
        MergeConfig(load=tmp_path, save=tmp_path / "out", rebuild_main_params=True)


def test_flattened_main_params_of_old_versions(tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    main = "optimizer.state.param.output_layer.weight"

    def change(key, tensor):
        return tensor.flatten() if key == main else tensor

    def grid(key, shape):
        return [Region((0,) * len(shape), shape)]

    runs.rewrite(runs.checkpoint(run, 8), change, grid)
    with pytest.raises(ValueError, match=f"{main} is .4096,., its model.*state drop"):
        run_merge(run, tmp_path / "out", weights=None)
    assert run_merge(run, tmp_path / "out", weights=None, optimizer_state="drop").exists()


def test_main_params_of_another_dtype_are_no_other_layout(tmp_path):
    """They are damaged, or hold something else: no reason to rebuild those of all sources."""
    run = runs.copy_run(runs.FP32_PARAM, tmp_path / "run")
    key = next(k for k in load_tensors(runs.checkpoint(run, 8)) if ".fp32_param." in k)
    runs.rewrite(runs.checkpoint(run, 6), lambda name, t: t.to(torch.int16) if name == key else t)
    config = MergeConfig(load=run, save=tmp_path / "out", last=2, optimizer_state="last")
    with pytest.raises(ValueError, match=f"iter_0000006.*{re.escape(key)} is int16.*--rebuild"):
        merge(config)
    assert not (tmp_path / "out").exists()
