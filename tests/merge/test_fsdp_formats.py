"""``fsdp_dtensor`` and ``torch_dcp``: what Megatron saves with its FSDP and with torch's."""

from __future__ import annotations

import logging
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests import runs
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.formats import (
    FSDP_DTENSOR,
    TORCH_DCP,
    TORCH_DIST_016,
    TORCH_DIST_019,
)
from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.checkpoint.layout import is_complete, read_layout
from wsm_megatron.checkpoint.run_directory import scan_run
from wsm_megatron.inspection.inspect import inspect_checkpoint
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.optimizer.indexed_state import with_names
from wsm_megatron.planning.provenance import read_provenance

RUNS = Path(__file__).parents[1] / "data" / "formats"
FSDP = "mcore0.16-dense-dp2-fsdp_dtensor"
FSDP_MOE = "main-moe-ep2-fsdp_dtensor"
DCP = "mcore0.16-dense-dp2-torch_dcp"
ALL = (FSDP, FSDP_MOE, DCP)
OF_CORE_HERE = (FSDP, DCP)
"""Their args are of classes that the installed megatron-core has."""
WEIGHTS = (0.3, 0.7)
MAINS = "optimizer.fp32_from_fp16_params."
MOMENTS = ("exp_avg", "exp_avg_sq")


def run_merge(run, out, **options):
    root = RUNS / run if isinstance(run, str) else run
    return merge(MergeConfig(load=root, save=out, weights=WEIGHTS, last=2, **options)).output


def newest(run):
    return RUNS / run / "iter_0000008"


def sources_of(run):
    return [load_tensors(RUNS / run / f"iter_000000{i}") for i in (6, 8)]


def expected_sum(key, sources, dtype=None):
    total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
    return rounded(total, dtype or sources[-1][key].dtype)


def nested(checkpoint, to):
    """A checkpoint as the nested dict that torch makes of it."""
    dcp_to_torch_save(checkpoint, to)
    return torch.load(to, weights_only=False)


def shape_of(state, above=()):
    """Paths of the leaves of a nested dict or list."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found = set()
    for key, value in items:
        inner = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(one, (dict, torch.Tensor)) for one in value)
        )
        found |= shape_of(value, (*above, key)) if inner else {(*above, key)}
    return found


def test_the_fixtures_are_what_they_say():
    entries = dcp.FileSystemReader(newest(FSDP)).read_metadata().state_dict_metadata
    tensors = [entry for entry in entries.values() if isinstance(entry, TensorStorageMetadata)]
    assert any(len({tuple(chunk.sizes) for chunk in entry.chunks}) > 1 for entry in tensors)
    for run in ALL:
        assert not (newest(run) / "metadata.json").exists()
        assert not (newest(run) / "common.pt").exists()


@pytest.mark.parametrize("run", [FSDP, FSDP_MOE])
@pytest.mark.parametrize("optimizer_state", ["drop", "last", "merge"])
def test_fsdp_dtensor_entries_are_merged_as_the_main_params_that_they_are(
    run, optimizer_state, tmp_path
):
    sources = sources_of(run)
    merged = load_tensors(run_merge(run, tmp_path / "out", optimizer_state=optimizer_state))
    kept = [key for key in sources[-1] if optimizer_state != "drop" or key.startswith("model.")]
    assert set(merged) == set(kept)
    for key, tensor in merged.items():
        if key.startswith("model.") or (key.endswith(MOMENTS) and optimizer_state == "merge"):
            assert tensor.dtype == torch.float32
            assert same_bits(tensor, expected_sum(key, sources)), key
        else:
            assert same_bits(tensor, sources[-1][key]), key


@pytest.mark.parametrize("optimizer_state", ["last", "merge"])
def test_torch_dcp_main_params_are_merged_and_the_model_is_rounded_from_them(
    optimizer_state, tmp_path
):
    sources = sources_of(DCP)
    merged = load_tensors(run_merge(DCP, tmp_path / "out", optimizer_state=optimizer_state))
    assert set(merged) == set(sources[-1])
    mains = [key for key in merged if key.startswith(MAINS)]
    models = {key for key in merged if key.startswith("model.")}
    for key in mains:
        assert same_bits(merged[key], expected_sum(key, sources)), key
    for key, tensor in merged.items():
        if key.endswith(MOMENTS) and optimizer_state == "merge":
            assert same_bits(tensor, expected_sum(key, sources)), key
        elif key not in models and key not in mains:
            assert same_bits(tensor, sources[-1][key]), key
    of_model = {}
    for model in models:
        alike = [
            key
            for key in mains
            if all(same_bits(one[key].to(torch.bfloat16), one[model]) for one in sources)
        ]
        assert len(alike) == 1, model
        of_model[model] = alike[0]
    assert sorted(of_model.values()) == sorted(mains)
    for model, main in of_model.items():
        assert same_bits(merged[model], merged[main].to(torch.bfloat16)), model


def test_torch_dcp_weights_alone_are_merged_as_they_are(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "wsm_megatron")
    sources = sources_of(DCP)
    output = run_merge(DCP, tmp_path / "out", optimizer_state="drop")
    merged = load_tensors(output)
    assert set(merged) == {key for key in sources[-1] if key.startswith("model.")}
    for key, tensor in merged.items():
        assert same_bits(tensor, expected_sum(key, sources)), key
    assert "asks for optimizer and RNG states whatever the flags" in caplog.text
    found = check_resume(output)
    assert not found.resumes
    assert not found.launches
    assert "whatever the flags" in found.problems[0]
    assert read_provenance(output)["resume"]["launch"] == {}


@pytest.mark.parametrize("run", OF_CORE_HERE)
def test_the_merge_is_the_nested_dict_that_its_newest_source_is(run, tmp_path):
    output = run_merge(run, tmp_path / "out", optimizer_state="last", output_iteration=7)
    before = nested(newest(run), tmp_path / "before.pt")
    after = nested(output, tmp_path / "after.pt")
    provenance = after.pop("wsm_merge")
    assert shape_of(after) == shape_of(before)
    assert after["iteration"] == 7
    assert isinstance(after["args"], Namespace)
    assert after["args"].iteration == 7
    assert vars(after["args"]) == vars(before["args"]) | {"iteration": 7}
    same = ("checkpoint_version", "opt_param_scheduler", "num_floating_point_operations_so_far")
    assert [after[key] for key in same] == [before[key] for key in same]
    assert [source["iteration"] for source in provenance["sources"]] == [6, 8]
    assert (output.parent / "latest_checkpointed_iteration.txt").read_text() == "7"


@pytest.mark.parametrize("run", OF_CORE_HERE)
def test_weights_alone_say_so_to_megatron(run, tmp_path):
    output = run_merge(run, tmp_path / "out", optimizer_state="drop")
    state = nested(output, tmp_path / "state.pt")
    assert state.keys() & {"optimizer", "opt_param_scheduler", "rng_state"} == set()
    assert state["args"].no_save_optim
    assert state["args"].no_save_rng
    assert state["iteration"] == 8


@pytest.mark.parametrize("run", ALL)
@pytest.mark.parametrize("optimizer_state", ["drop", "last", "merge"])
def test_verify_makes_the_merge_again(run, optimizer_state, tmp_path):
    output = run_merge(run, tmp_path / "out", optimizer_state=optimizer_state)
    assert verify(output, sources="all").samples > 0
    assert not (output / "metadata.json").exists()


@pytest.mark.parametrize("run", ALL)
def test_verify_finds_a_changed_byte(run, tmp_path):
    output = run_merge(run, tmp_path / "out")
    file = output / "__0_0.distcp"
    runs.flip_byte(file, file.stat().st_size // 2)
    with pytest.raises(MergeError, match="not what the merge wrote"):
        verify(output)


@pytest.mark.parametrize("run", ALL)
def test_verify_finds_a_changed_byte_in_megatrons_own(run, tmp_path):
    shutil.copytree(newest(run), tmp_path / "iter_0000008")
    layout = read_layout(tmp_path / "iter_0000008")
    key = next(key for key in layout.tensors if key.startswith("model."))
    at = layout.tensors[key].chunks[0].location
    runs.flip_byte(tmp_path / "iter_0000008" / at.file, at.offset + at.length // 2)
    with pytest.raises(MergeError, match=r"CRC-32|damaged"):
        verify(tmp_path / "iter_0000008")


@pytest.mark.parametrize("run", ALL)
def test_a_checkpoint_is_finished_by_its_metadata(run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(RUNS / run, root)
    assert scan_run(root).finished == (6, 8)
    (root / "iter_0000008" / ".metadata").rename(root / "iter_0000008" / ".metadata.tmp")
    assert scan_run(root).unfinished == (8,)
    with pytest.raises(ValueError, match="unfinished: there is no metadata.json"):
        read_layout(root / "iter_0000008")
    with pytest.raises(ValueError, match="unfinished"):
        run_merge(root, tmp_path / "out", to=8)


@pytest.mark.parametrize("run", runs.ALL)
def test_metadata_of_torch_dist_finishes_nothing(run, tmp_path):
    shutil.copytree(runs.checkpoint(run, 8), tmp_path / "iter_0000008")
    (tmp_path / "iter_0000008" / "metadata.json").unlink()
    assert not is_complete(tmp_path / "iter_0000008")
    with pytest.raises(ValueError, match="it names no iteration or no model"):
        read_layout(tmp_path / "iter_0000008")


@pytest.mark.parametrize("run", ALL)
def test_a_merge_can_be_a_source(run, tmp_path):
    shutil.copytree(RUNS / run / "iter_0000006", tmp_path / "out" / "iter_0000006")
    run_merge(run, tmp_path / "out", optimizer_state="last")
    again = run_merge(tmp_path / "out", tmp_path / "again", optimizer_state="merge")
    assert verify(again, sources="all").merged


@pytest.mark.parametrize(
    ("run", "name", "main"),
    [(FSDP, "fsdp_dtensor", True), (FSDP_MOE, "fsdp_dtensor", True), (DCP, "torch_dcp", False)],
)
def test_inspect_and_resume_check_name_the_format(run, name, main, tmp_path):
    output = run_merge(run, tmp_path / "out", optimizer_state="last")
    for path in (newest(run), output):
        contents = inspect_checkpoint(path)
        assert contents.format.name == name
        assert contents.format.finished_by == ".metadata"
        assert contents.summary.iteration == 8
        assert contents.summary.consumed_samples == 64
        assert contents.summary.learning_rate.value == 1e-3
        assert "unknown" not in {role.value for role in contents.by_role}
        found = check_resume(path)
        assert found.resumes, found.problems
        assert found.optimizer == name
        assert found.mains.model == main
        assert found.mains.keyed == (0 if main else 15)
        assert found.rng > 0
        assert found.merged == (path == output)
    assert not check_resume(output, against=newest(run)).problems


@pytest.mark.parametrize(
    "form", [TORCH_DIST_016, TORCH_DIST_019, FSDP_DTENSOR, TORCH_DCP], ids=lambda form: form.readers
)
def test_a_format_is_itself_on_every_rank(form):
    assert pickle.loads(pickle.dumps(form)) is form


def test_optimizer_state_that_is_numbered_is_named_after_its_model_tensor():
    layout = with_names(read_layout(newest(DCP)))
    mains = {main_of(key): layout.stored_key(key) for key in layout.tensors if main_of(key)}
    assert mains.keys() == {key for key in layout.tensors if key.startswith("model.")}
    assert mains["model.embedding.word_embeddings.weight"] == f"{MAINS}0.0"
    assert mains["model.decoder.final_layernorm.weight"] == f"{MAINS}1.4"
    moment = "optimizer.state.exp_avg.model.decoder.final_layernorm.weight"
    assert layout.stored_key(moment) == "optimizer.optimizer.state.14.exp_avg"


def test_tensors_that_are_alike_are_told_apart_by_their_order(tmp_path):
    state = nested(newest(DCP), tmp_path / "state.pt")
    norms = sorted(key for key in state["model"] if key.endswith("layernorm.weight"))
    ones = state["optimizer"]["fp32_from_fp16_params"][1]
    for key in norms:
        state["model"][key].fill_(1)
    for number, main in enumerate(ones):
        main.fill_(1 + number * 2**-12)  # rounds to 1, and differs
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000008")
    layout = with_names(read_layout(tmp_path / "iter_0000008"))
    stored = {main_of(key): layout.stored_key(key) for key in layout.tensors if main_of(key)}
    in_order = [f"model.{key}" for key in state["model"] if key.endswith("layernorm.weight")]
    assert [stored[key] for key in in_order] == [f"{MAINS}1.{n}" for n in range(len(ones))]


@pytest.mark.parametrize("source", [6, 8])
def test_main_params_of_other_weights_are_refused(source, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(RUNS / DCP, root)
    path = root / f"iter_000000{source}"
    state = nested(path, tmp_path / "state.pt")
    state["optimizer"]["fp32_from_fp16_params"][0][1].mul_(2)
    shutil.rmtree(path)
    dcp.save(state, checkpoint_id=path)
    with pytest.raises(ValueError, match=rf"iter_000000{source}: .*0\.1 round to no model tensor"):
        run_merge(root, tmp_path / "out", optimizer_state="last")
    assert not check_resume(path).resumes
    run_merge(root, tmp_path / "out")


def test_a_main_param_that_differs_further_on_is_refused(tmp_path):
    root = tmp_path / "run"
    shutil.copytree(RUNS / DCP, root)
    path = root / "iter_0000006"
    state = nested(path, tmp_path / "state.pt")
    large = torch.nn.functional.pad(torch.zeros(1, 16), (0, 0, 0, 600)) + 0.5
    state["model"]["embedding.word_embeddings.weight"] = large.bfloat16()
    wrong = large.clone()
    wrong[-1, -1] = 3
    state["optimizer"]["fp32_from_fp16_params"][0][0] = wrong
    for name in MOMENTS:
        state["optimizer"]["optimizer"]["state"]["0"][name] = large.clone()
    for one in (path, root / "iter_0000008"):
        shutil.rmtree(one)
        dcp.save(state, checkpoint_id=one)
        state["iteration"] = 8
    with pytest.raises(MergeError, match=r"embedding\.word_embeddings\.weight"):
        run_merge(root, tmp_path / "out", optimizer_state="last")
    assert not (tmp_path / "out" / "iter_0000008").exists()


@pytest.mark.parametrize("run", ALL)
@pytest.mark.parametrize("format", ["0.16", "0.19"])
def test_no_other_format_is_made_of_them(run, format, tmp_path):
    with pytest.raises(ValueError, match=f"--format {format}: the sources are of"):
        run_merge(run, tmp_path / "out", format=format)


def test_sources_of_two_formats_are_refused(tmp_path):
    root = tmp_path / "run"
    shutil.copytree(RUNS / FSDP / "iter_0000006", root / "iter_0000006")
    shutil.copytree(RUNS / DCP / "iter_0000008", root / "iter_0000008")
    with pytest.raises(ValueError, match="not of one"):
        run_merge(root, tmp_path / "out")


@pytest.mark.parametrize("run", ALL)
def test_a_model_tensor_is_copied_with_its_optimizer_state(run, tmp_path):
    key = next(
        key
        for key in load_tensors(newest(run))
        if key.endswith("layers.0.mlp.linear_fc2.weight") or "experts.0.linear_fc2.weight" in key
    )
    sources = sources_of(run)
    merged = load_tensors(run_merge(run, tmp_path / "out", optimizer_state="merge", copy=(key,)))
    assert same_bits(merged[key], sources[-1][key])
    layout = with_names(read_layout(newest(run)))
    state = [layout.stored_key(one) for one in layout.tensors if one.endswith(f".{key}")]
    assert len(state) == (3 if run == DCP else 2)
    for one in state:
        assert same_bits(merged[one], sources[-1][one]), one


def test_weights_alone_of_megatron_fsdp_come_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "wsm_megatron")
    run_merge(FSDP, tmp_path / "kept", optimizer_state="last")
    assert "weights alone" not in caplog.text
    output = run_merge(FSDP, tmp_path / "out", optimizer_state="drop")
    assert "loads no weights alone into Megatron FSDP" in caplog.text
    resume = read_provenance(output)["resume"]
    assert "--no-load-optim" in resume["launch"]["continue"]["flags"]
    assert resume["main_params"] == "merged"
