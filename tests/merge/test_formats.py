"""``--format``: merged checkpoints as Megatron up to 0.18 or from 0.19 on writes them."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.common_state import attributes, load_common, read_common
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.inspection.megatron_resume import check_resume

OLD = {"common_backend": "torch", "common_backend_version": 1}


def run_merge(run, out, **options):
    options = {"optimizer_state": "last", "last": 2, "weights": (0.5, 0.5), **options}
    return merge(MergeConfig(load=run, save=out, **options)).output


def common_of(path):
    return load_common(*read_common(path))


@pytest.mark.parametrize("format", ["same", "0.16", "0.19"])
@pytest.mark.parametrize("run", [runs.FLAT, runs.FULLY, runs.MAIN])
def test_what_is_written(run, format, tmp_path):
    output = run_merge(RUNS / run, tmp_path / "out", format=format)
    new = format == "0.19" or (format == "same" and run == runs.MAIN)
    layout, marker = read_layout(output), json.loads((output / "metadata.json").read_text())
    assert (output / "common.pt").exists() != new
    assert (layout.common_entry is not None) == new
    assert marker == {"sharded_backend": "torch_dist", "sharded_backend_version": 1} | (
        {} if new else OLD
    )
    state, source = common_of(output), common_of(runs.checkpoint(run, 8))
    assert state["optimizer"] == source["optimizer"]
    assert state["content_metadata"] == source["content_metadata"]
    verify(output, sources=True)
    found = check_resume(output)
    assert found.readers == ("core 0.19 and later" if new else "core 0.14 and later")
    straight = load_tensors(run_merge(RUNS / run, tmp_path / "straight"))
    for key, tensor in load_tensors(output).items():
        assert same_bits(tensor, straight[key]), key


def test_old_format_from_new_sources_leaves_out_what_old_versions_refuse(tmp_path, caplog):
    output = run_merge(RUNS / runs.MAIN, tmp_path / "out", format="0.16")
    args, before = (
        attributes(common_of(p)["args"]) for p in (output, runs.checkpoint(runs.MAIN, 8))
    )
    assert set(before) - set(args) == {"inference_cuda_graph_scope"}
    assert "inference_cuda_graph_scope" in caplog.text
    assert "rerun_state_machine" not in common_of(output)
    assert not [key for key in read_layout(output).objects if key.startswith("rerun")]


def test_what_a_version_saved_itself_stays(tmp_path, caplog):
    """Core 0.18 has args in common.pt that 0.16 cannot read, and reads them."""
    name = "inference_cuda_graph_scope"
    scope = attributes(common_of(runs.checkpoint(runs.MAIN, 8))["args"])[name]
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    runs.restate(run / "iter_0000008", lambda state: setattr(state["args"], name, scope))
    kept = {}
    for form in ("same", "0.16"):
        output = run_merge(run, tmp_path / form, format=form)
        kept[form] = name in attributes(common_of(output)["args"])
    assert kept == {"same": True, "0.16": False}
    assert caplog.text.count(f"as core 0.16 cannot read their values: {name}") == 1


def test_new_format_keeps_all_args(tmp_path):
    output = run_merge(RUNS / runs.MAIN, tmp_path / "out")
    assert "inference_cuda_graph_scope" in attributes(common_of(output)["args"])
    assert "rerun_state_machine" in common_of(output)


@pytest.mark.parametrize("newest, oldest", [(runs.MAIN, runs.FLAT), (runs.FLAT, runs.MAIN)])
def test_sources_of_both_formats(newest, oldest, tmp_path):
    run = tmp_path / "run"
    for name, iteration in ((oldest, 6), (newest, 8)):
        path = runs.checkpoint(name, iteration)
        shutil.copytree(path, run / path.name)
    output = run_merge(run, tmp_path / "out", optimizer_state="merge")
    assert (output / "common.pt").exists() == (newest == runs.FLAT)
    verify(output, sources=True)


def test_a_merge_of_a_converted_merge(tmp_path):
    for iteration, format in ((6, "0.19"), (8, "0.16")):
        run_merge(RUNS / runs.FULLY, tmp_path / "out", to=iteration, format=format)
    output = run_merge(tmp_path / "out", tmp_path / "again")
    assert (output / "common.pt").exists()


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="--format must be one of .*not '0.17'"):
        MergeConfig(load=tmp_path, save=tmp_path / "out", format="0.17")
