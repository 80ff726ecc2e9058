"""Merges of real checkpoints against an independent float64 reference, bit for bit."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import ExecutionOptions, MergeConfig, coefficients, merge
from wsm_megatron.checkpoint.common_state import load_common, read_common
from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.planning.provenance import read_provenance

WEIGHTS = (0.07, 0.21, 0.31, 0.41)


def sources_of(run, iterations=runs.ITERATIONS):
    return [load_tensors(runs.checkpoint(run, i)) for i in iterations]


def run_merge(run, out, execution=ExecutionOptions(), **options):
    options.setdefault("weights", WEIGHTS)
    root = RUNS / run if isinstance(run, str) else run
    return merge(MergeConfig(load=root, save=out, **options), execution)


def expected_sum(key, sources, weights=WEIGHTS, dtype=None):
    total = weighted_sum64(weights, [source[key] for source in sources])
    return rounded(total, dtype or sources[-1][key].dtype)


def roles_of(path):
    layout = read_layout(path)
    return {key: entry.role for key, entry in {**layout.tensors, **layout.objects}.items()}


@pytest.mark.parametrize("run", runs.ALL)
def test_weights_only_merge_equals_the_reference(run, tmp_path):
    report = run_merge(run, tmp_path / "out")
    sources, merged = sources_of(run), load_tensors(report.output)
    roles = roles_of(runs.checkpoint(run, 8))
    assert set(merged) == {k for k in sources[0] if roles[k] in (Role.MODEL, Role.BUFFER)}
    for key, tensor in merged.items():
        assert same_bits(tensor, expected_sum(key, sources)), key
    kept = set(roles_of(report.output).values())
    assert kept <= {Role.MODEL, Role.BUFFER, Role.EXTRA, Role.COMMON, Role.COPY}


@pytest.mark.parametrize("optimizer_state", ["last", "merge"])
@pytest.mark.parametrize("run", runs.WITH_OPTIMIZER)
def test_merge_with_optimizer_state_equals_the_reference(run, optimizer_state, tmp_path):
    report = run_merge(run, tmp_path / "out", optimizer_state=optimizer_state)
    sources, merged = sources_of(run), load_tensors(report.output)
    assert set(merged) == set(sources[-1])
    roles = roles_of(runs.checkpoint(run, 8))
    assert roles_of(report.output) == roles
    mains = {main_of(key): key for key in merged if main_of(key)}
    assert bool(mains) == (run in (runs.FP32_PARAM, runs.FULLY))
    for key, tensor in merged.items():
        if roles[key] is Role.MOMENT and optimizer_state == "last":
            expected = sources[-1][key]
        elif key in mains:
            expected = expected_sum(mains[key], sources).to(tensor.dtype)
        elif roles[key] is Role.MODEL:
            continue  # rounded from flat buckets: tests/unit/optimizer/test_flat_main_params.py
        else:
            expected = expected_sum(key, sources)
        assert same_bits(tensor, expected), key


@pytest.mark.parametrize("decay", ["mean", "linear", "cosine", "1-sqrt", "ema", "exponential"])
def test_a_decay_is_its_coefficients(decay, tmp_path):
    options = {"decay": decay, "weights": None, "min_decay": 0.1}
    report = run_merge(runs.DENSE, tmp_path / "out", **options)
    tokens = [i * 8 * 16 for i in runs.ITERATIONS]  # batch 8, sequence 16
    assert report.coefficients == coefficients(tokens, decay, 0.1)
    sources, merged = sources_of(runs.DENSE), load_tensors(report.output)
    for key, tensor in merged.items():
        assert same_bits(tensor, expected_sum(key, sources, report.coefficients)), key


@pytest.mark.parametrize("window, chosen", [
    ({"iterations": (2, 6)}, (2, 6)),
    ({"last": 3}, (4, 6, 8)),
    ({"from_": 2, "to": 6}, (2, 4, 6)),
    ({"window_iterations": 4}, (4, 6, 8)),
    ({"window_tokens": 4 * 8 * 16}, (4, 6, 8)),
    ({"every": 4}, (4, 8)),
])  # fmt: skip
def test_window(window, chosen, tmp_path):
    report = run_merge(runs.DENSE, tmp_path / "out", weights=None, decay="mean", **window)
    assert report.iterations == chosen
    assert report.output == tmp_path / "out" / f"iter_{chosen[-1]:07d}"
    sources = sources_of(runs.DENSE, chosen)
    weights = [1 / len(chosen)] * len(chosen)
    for key, tensor in load_tensors(report.output).items():
        assert same_bits(tensor, expected_sum(key, sources, weights)), key


@pytest.mark.parametrize(
    "dtype, name", [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_dtype_of_the_model_tensors(dtype, name, tmp_path):
    report = run_merge(runs.MOE, tmp_path / "out", dtype=name)
    sources, merged = sources_of(runs.MOE), load_tensors(report.output)
    for key, tensor in merged.items():
        wanted = torch.float32 if key.endswith("expert_bias") else dtype
        assert same_bits(tensor, expected_sum(key, sources, dtype=wanted)), key


def test_extrapolation_and_unnormalized_weights(tmp_path):
    for k, weights in enumerate([(-0.5, 0.25, 0.25, 1.0), (0.3, 0.3, 0.3, 0.3)]):
        report = run_merge(
            runs.DENSE, tmp_path / str(k), weights=weights, allow_unnormalized=bool(k)
        )
        sources = sources_of(runs.DENSE)
        for key, tensor in load_tensors(report.output).items():
            assert same_bits(tensor, expected_sum(key, sources, weights)), key


def test_buffers_last(tmp_path):
    report = run_merge(runs.MOE, tmp_path / "out", buffers="last")
    sources, merged = sources_of(runs.MOE), load_tensors(report.output)
    buffers = [key for key in merged if key.endswith("expert_bias")]
    assert buffers
    for key in buffers:
        assert same_bits(merged[key], sources[-1][key])
        assert not same_bits(merged[key], expected_sum(key, sources))


def test_copy_and_drop_patterns(tmp_path):
    report = run_merge(
        runs.FULLY,
        tmp_path / "out",
        optimizer_state="last",
        copy=("*final_layernorm*",),
        drop=("*._extra_state/*", "*exp_avg_sq*"),
    )
    sources, merged = sources_of(runs.FULLY), load_tensors(report.output)
    copied = [key for key in merged if "final_layernorm" in key]
    assert len(copied) == 3  # the tensor, its main param and its first moment
    for key in copied:
        assert same_bits(merged[key], sources[-1][key])
    assert set(sources[-1]) - set(merged) == {k for k in sources[-1] if "exp_avg_sq" in k}
    assert Role.EXTRA not in roles_of(report.output).values()


def test_wrong_mains_are_rebuilt_from_the_model(tmp_path):
    report = run_merge(
        runs.WRONG_MAINS, tmp_path / "out", optimizer_state="last", rebuild_main_params=True
    )
    sources, merged = sources_of(runs.WRONG_MAINS), load_tensors(report.output)
    mains = {key: main_of(key) for key in merged if main_of(key)}
    assert len(mains) == 9
    for main, model in mains.items():
        expected = expected_sum(model, sources, dtype=torch.float32)
        assert same_bits(merged[main], expected)
        assert same_bits(merged[model], expected.to(torch.bfloat16))


@pytest.mark.parametrize("axis, parts", [(0, 1), (1, 2), (2, 3)])
def test_sources_of_different_layouts(axis, parts, tmp_path):
    """Every source cut differently, and its file in another order."""
    run = runs.copy_run(runs.FP32_PARAM, tmp_path / "run")
    runs.rewrite(runs.checkpoint(run, 2), grid=runs.split_axis(axis, parts))
    runs.rewrite(runs.checkpoint(run, 6), grid=runs.split_axis(axis + 1, 3), reverse=True)
    report = run_merge(run, tmp_path / "out", optimizer_state="merge")
    straight = run_merge(runs.FP32_PARAM, tmp_path / "straight", optimizer_state="merge")
    merged, expected = load_tensors(report.output), load_tensors(straight.output)
    assert set(merged) == set(expected)
    for key, tensor in merged.items():
        assert same_bits(tensor, expected[key]), key


def test_order_of_chunks_on_disk_does_not_matter(tmp_path):
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for iteration in (4, 8):
        runs.rewrite(runs.checkpoint(run, iteration), reverse=True)
    merged = load_tensors(run_merge(run, tmp_path / "out").output)
    for key, tensor in load_tensors(run_merge(runs.DENSE, tmp_path / "straight").output).items():
        assert same_bits(tensor, merged[key]), key


def test_chunks_larger_than_the_limit_are_split(tmp_path, monkeypatch):
    from wsm_megatron.planning import plan

    monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 500)
    report = run_merge(
        runs.FP32_PARAM, tmp_path / "out", ExecutionOptions(threads=3), optimizer_state="last"
    )
    chunks = read_layout(report.output).tensors["embedding.word_embeddings.weight"].chunks
    assert len(chunks) > 10 and max(chunk.numel for chunk in chunks) <= 500
    monkeypatch.undo()
    straight = run_merge(runs.FP32_PARAM, tmp_path / "straight", optimizer_state="last")
    merged = load_tensors(report.output)
    for key, tensor in load_tensors(straight.output).items():
        assert same_bits(tensor, merged[key]), key


def test_a_merge_of_merges(tmp_path):
    first = run_merge(runs.DENSE, tmp_path / "out", iterations=(2, 4), weights=(0.5, 0.5))
    second = run_merge(runs.DENSE, tmp_path / "out", iterations=(6, 8), weights=(0.5, 0.5))
    report = run_merge(tmp_path / "out", tmp_path / "again", weights=(0.25, 0.75))
    sources = [load_tensors(first.output), load_tensors(second.output)]
    for key, tensor in load_tensors(report.output).items():
        assert same_bits(tensor, expected_sum(key, sources, (0.25, 0.75))), key


def test_common_state_tracker_and_provenance(tmp_path):
    for run in (runs.FULLY, runs.MAIN):
        out = tmp_path / run
        report = run_merge(run, out, output_iteration=100)
        assert report.output == out / "iter_0000100"
        assert (out / "latest_checkpointed_iteration.txt").read_text() == "100"
        state = load_common(*read_common(report.output))
        newest = load_common(*read_common(runs.checkpoint(run, 8)))
        assert state["iteration"] == 100 and newest["iteration"] == 8
        assert state["args"].consumed_train_samples == newest["args"].consumed_train_samples
        assert state["args"].no_save_optim and state["args"].no_save_rng
        assert (report.output / "common.pt").exists() == (run != runs.MAIN)
        provenance = json.loads((report.output / "wsm_merge.json").read_text())
        assert [s["iteration"] for s in provenance["sources"]] == list(runs.ITERATIONS)
        assert [s["tokens"] for s in provenance["sources"]] == [256, 512, 768, 1024]
        assert provenance["coefficients"] == list(WEIGHTS)
        assert set(provenance["files"]) == {
            p.name for p in report.output.iterdir() if p.name != "wsm_merge.json"
        }
        for name in ("files", "date", "crc32"):
            assert provenance.pop(name)
        assert state["wsm_merge"] == provenance


def test_optimizer_state_keeps_the_newest_common_state(tmp_path):
    report = run_merge(runs.FULLY, tmp_path / "out", optimizer_state="last")
    state = load_common(*read_common(report.output))
    newest = load_common(*read_common(runs.checkpoint(runs.FULLY, 8)))
    assert state["optimizer"] == newest["optimizer"]
    assert state["opt_param_scheduler"] == newest["opt_param_scheduler"]
    assert not state["args"].no_save_optim


def test_side_files_of_the_newest_source_are_copied(tmp_path):
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for iteration in runs.ITERATIONS:
        side = runs.checkpoint(run, iteration) / "tokenizer" / "deep"
        side.mkdir(parents=True)
        (side / "vocab.json").write_text(str(iteration))
        (side.parent.parent / "note.txt").write_text(str(iteration))
    output = run_merge(run, tmp_path / "out").output
    assert (output / "tokenizer" / "deep" / "vocab.json").read_text() == "8"
    assert (output / "note.txt").read_text() == "8"


def test_sources_are_not_touched_and_may_be_read_only(tmp_path):
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}
    run_merge(run, tmp_path / "out", optimizer_state="merge")
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}


def test_equal_merges_of_one_day_are_equal_bytes(tmp_path, monkeypatch):
    """Whatever the number of threads."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1735689599")
    outputs = [
        run_merge(runs.FP32_PARAM, tmp_path / name, ExecutionOptions(threads=threads)).output
        for name, threads in (("a", 1), ("b", 4))
    ]
    for path in outputs[0].iterdir():
        assert path.read_bytes() == (outputs[1] / path.name).read_bytes(), path.name
    assert read_provenance(outputs[0])["date"] == "2024-12-31"


def test_a_merge_of_another_day_is_still_this_very_merge(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1735689599")
    first = run_merge(runs.DENSE, tmp_path / "out")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1735689600")
    again = run_merge(runs.DENSE, tmp_path / "out")
    assert again.output == first.output and again.ranks == ()


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    (runs.checkpoint(run, 8) / "tokenizer").mkdir()
    (runs.checkpoint(run, 8) / "tokenizer" / "vocab.json").write_text("{}")
    before = os.umask(umask)
    try:
        run_merge(run, tmp_path / "out", optimizer_state="drop")
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *tmp_path.glob("out/**/*")]
    found = {path.name: path.stat().st_mode & 0o777 for path in paths}
    folders = {"out", "iter_0000008", "tokenizer"}
    assert found == {name: (0o777 if name in folders else 0o666) & ~umask for name in found}
    assert {"__0_0.distcp", ".metadata", "common.pt", "wsm_merge.json", "vocab.json"} < set(found)


def test_bytes_are_counted(tmp_path):
    report = run_merge(runs.DENSE, tmp_path / "out")
    layout = read_layout(runs.checkpoint(runs.DENSE, 8))
    tensors = sum(entry.nbytes for entry in layout.tensors.values())
    objects = sum(entry.nbytes for entry in layout.objects.values())
    assert report.bytes_read == 4 * tensors + objects
    distcp = sum(p.stat().st_size for p in report.output.glob("*.distcp"))
    assert report.bytes_written == distcp


def test_nothing_else_is_left_in_the_root(tmp_path):
    run_merge(runs.DENSE, tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["iter_0000008", "latest_checkpointed_iteration.txt"]
    shutil.rmtree(tmp_path / "out")
