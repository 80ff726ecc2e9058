"""Bad input: one clear message, an exit status, and nothing written."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests import runs
from tests.reference import RUNS, load_tensors
from wsm_megatron.access import shared
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE

KEY = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def merge_fails(tmp_path, capsys):
    """Run ``wsm merge`` on a run; it must fail without a trace. Returns its message."""

    def run(root, *options, status, out="out", left=()):
        code = main(["merge", "--load", str(root), "--save", str(tmp_path / out), *options])
        captured = capsys.readouterr()
        assert code == status, captured.err
        assert captured.out == ""
        lines = captured.err.strip().splitlines()
        lines = [line for line in lines if not line.startswith("WARNING")]
        assert len(lines) == 1 and "Traceback" not in captured.err
        assert sorted(p.name for p in (tmp_path / out).glob("**/*")) == sorted(left)
        return lines[0]

    return run


def damaged(tmp_path, name=runs.DENSE):
    return runs.copy_run(name, tmp_path / "run")


def test_missing_or_empty_run(tmp_path, merge_fails):
    assert "no such run directory" in merge_fails(tmp_path / "none", status=EXIT_USAGE)
    (tmp_path / "empty").mkdir()
    assert "no iter_XXXXXXX" in merge_fails(tmp_path / "empty", status=EXIT_USAGE)
    message = merge_fails(runs.checkpoint(runs.DENSE, 2), status=EXIT_USAGE)
    assert "give its parent" in message


def test_unfinished_checkpoints(tmp_path, merge_fails, caplog, capsys):
    run = damaged(tmp_path)
    (runs.checkpoint(run, 8) / "metadata.json").unlink()
    message = merge_fails(run, "--iterations", "4,8", status=EXIT_USAGE)
    assert "iter_0000008 is unfinished" in message
    code = main(["merge", "--load", str(run), "--save", str(tmp_path / "good")])
    assert code == 0 and "iter_0000008 is unfinished and left out" in caplog.text
    capsys.readouterr()
    for iteration in (2, 4):
        (runs.checkpoint(run, iteration) / "metadata.json").unlink()
    assert "at least two" in merge_fails(run, status=EXIT_USAGE)


def test_iterations_that_are_not_there(merge_fails):
    message = merge_fails(RUNS / runs.DENSE, "--iterations", "4,5", status=EXIT_USAGE)
    assert "5" in message and "2, 4, 6, 8" in message


@pytest.mark.parametrize(
    "options, words",
    [
        (["--weights", "0.5,0.6,0.1,0.1"], "--allow-unnormalized"),
        (["--weights", "0.5,0.5"], "2 weights for 4"),
        (["--weights", "0.5,0.5,0,nan"], "nan"),
        (["--decay", "sharp"], "sharp"),
        (["--decay", "missing.csv"], "missing.csv"),
        (["--min-decay", "1.5"], "--min-decay"),
        (["--last", "9"], "--last"),
        (["--iterations", "2,4", "--last", "2"], "contradict"),
        (["--weights", "0.5,0.5", "--decay", "ema"], "contradict"),
        (["--optimizer-state", "last"], "use --optimizer-state drop"),
        (["--rebuild-main-params"], "no effect"),
        (["--drop", "*"], "nothing"),
    ],
    ids=" ".join,
)
def test_bad_options(merge_fails, options, words):
    assert words in merge_fails(RUNS / runs.DENSE, *options, status=EXIT_USAGE)


def test_negative_weights_do_not_merge_second_moments(merge_fails):
    options = ["--weights=-0.5,0.5,0.5,0.5", "--optimizer-state", "merge"]
    assert "second moment" in merge_fails(RUNS / runs.FULLY, *options, status=EXIT_USAGE)


def test_bad_curve(tmp_path, merge_fails):
    (tmp_path / "up.csv").write_text("t,s\n0,0.5\n1,0.9\n")
    options = ["--decay", str(tmp_path / "up.csv")]
    assert "up.csv" in merge_fails(RUNS / runs.DENSE, *options, status=EXIT_USAGE)


def test_the_run_itself_is_no_target(tmp_path, capsys):
    run = damaged(tmp_path)
    assert main(["merge", "--load", str(run), "--save", str(run)]) == EXIT_USAGE
    assert "never written to" in capsys.readouterr().err


def test_different_models(tmp_path, merge_fails):
    run = damaged(tmp_path)
    shutil.rmtree(runs.checkpoint(run, 4))
    shutil.copytree(runs.checkpoint(runs.MOE, 4), runs.checkpoint(run, 4))
    message = merge_fails(run, status=EXIT_USAGE)
    assert "not of one model" in message and "iter_0000004" in message


def test_different_shapes(tmp_path, merge_fails):
    run = damaged(tmp_path)
    shutil.rmtree(runs.checkpoint(run, 4))
    shutil.copytree(runs.checkpoint(runs.FP32_PARAM, 4), runs.checkpoint(run, 4))
    message = merge_fails(run, status=EXIT_USAGE)
    assert "(256, 32)" in message and "(128, 32)" in message and "iter_0000004" in message
    assert "--make-vocab-size-divisible-by" in message


def test_different_dtypes(tmp_path, merge_fails):
    run = damaged(tmp_path)
    runs.rewrite(runs.checkpoint(run, 4), lambda key, t: t.float() if key == KEY else t)
    message = merge_fails(run, status=EXIT_USAGE)
    assert KEY in message and "float32" in message and "iter_0000004" in message


def test_flat_buckets_after_keyed_main_params(tmp_path, merge_fails):
    """Nothing to merge them with, and no keys to rebuild them by."""
    run = damaged(tmp_path, runs.FULLY)
    shutil.rmtree(runs.checkpoint(run, 8))
    shutil.copytree(runs.checkpoint(runs.FLAT, 8), runs.checkpoint(run, 8))
    message = merge_fails(run, "--optimizer-state", "last", status=EXIT_USAGE)
    assert "iter_0000008" in message and "--optimizer-state drop" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_source(tmp_path, merge_fails, bad):
    run = damaged(tmp_path)

    def poison(key, tensor):
        if key == KEY:
            tensor[1, 77, 3] = bad
        return tensor

    runs.rewrite(runs.checkpoint(run, 6), poison)
    message = merge_fails(run, status=EXIT_FAILED)
    assert KEY in message and "iter_0000006" in message and "--allow-nonfinite" in message
    command = ["merge", "--load", str(run), "--save", str(tmp_path / "let"), "--allow-nonfinite"]
    assert main(command) == 0
    merged = load_tensors(tmp_path / "let" / "iter_0000008")[KEY]
    assert (~torch.isfinite(merged)).nonzero().tolist() == [[1, 77, 3]]


def test_nonfinite_moment_that_is_only_copied(tmp_path, merge_fails):
    run = damaged(tmp_path, runs.FULLY)
    key = f"optimizer.state.exp_avg.{KEY}"
    runs.rewrite(
        runs.checkpoint(run, 8),
        lambda k, t: t.index_fill_(1, torch.tensor([5]), float("nan")) if k == key else t,
    )
    message = merge_fails(run, "--optimizer-state", "last", status=EXIT_FAILED)
    assert key in message and "iter_0000008" in message


def test_nan_in_the_padding_of_a_flat_bucket_does_not_count(tmp_path):
    run = damaged(tmp_path, runs.FLAT)
    for iteration in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(run, iteration), _poison_padding)
    command = ["merge", "--load", str(run), "--save", str(tmp_path / "out")]
    assert main([*command, "--optimizer-state", "merge"]) == 0
    merged = load_tensors(tmp_path / "out" / "iter_0000008")
    assert any(torch.isnan(t).any() for k, t in merged.items() if ".bucket_idx_" in k)


def _poison_padding(key, tensor):
    if ".bucket_idx_" in key:
        tensor[4128:4160] = float(
            "nan"
        )  # a norm's 32 elements end at 4128, the next param is at 4160
    return tensor


def test_overflow_is_not_blamed_on_a_source(merge_fails):
    options = ["--weights=-1e9,0,0,1e9", "--allow-unnormalized", "--dtype", "fp16"]
    assert "overflow" in merge_fails(RUNS / runs.DENSE, *options, status=EXIT_FAILED)


def test_wrong_mains_are_refused(merge_fails):
    options = ["--optimizer-state", "last"]
    message = merge_fails(RUNS / runs.WRONG_MAINS, *options, status=EXIT_FAILED)
    assert "optimizer.state.param." in message and "--rebuild-main-params" in message


def test_flat_buckets_cannot_be_rebuilt(merge_fails):
    options = ["--optimizer-state", "last", "--rebuild-main-params"]
    assert "flat buckets" in merge_fails(RUNS / runs.FLAT, *options, status=EXIT_USAGE)


def test_truncated_distcp(tmp_path, merge_fails):
    run = damaged(tmp_path)
    file = runs.checkpoint(run, 4) / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 100)
    message = merge_fails(run, status=EXIT_FAILED)
    assert "truncated" in message and "iter_0000004" in message and file.name in message
    file.unlink()
    assert "missing" in merge_fails(run, status=EXIT_FAILED)


def test_files_on_other_nodes(tmp_path, merge_fails):
    """Of two nodes without shared storage, each has the files of its own ranks."""
    run = damaged(tmp_path, runs.FULLY)
    for iteration in (2, 4, 6, 8):
        next(runs.checkpoint(run, iteration).glob("__1_*.distcp")).unlink()
    message = merge_fails(run, status=EXIT_FAILED)
    assert "iter_0000002: file __1_" in message and "with --node-local" in message
    for iteration in (2, 4, 6, 8):
        (runs.checkpoint(run, iteration) / "metadata.json").unlink()
    message = merge_fails(run, status=EXIT_USAGE)
    assert "no checkpoint is finished" in message and "with --node-local" in message


@pytest.mark.parametrize("fraction", [0.02, 0.35, 0.6, 0.95])
def test_flipped_bytes(tmp_path, merge_fails, fraction):
    """Wherever a byte of a tensor changes: in its values, its header, its directory."""
    run = damaged(tmp_path)
    path = runs.checkpoint(run, 6)
    chunk = read_layout(path).tensors[KEY].chunks[0]
    position = chunk.location.offset + int(chunk.location.length * fraction)
    runs.flip_byte(path / chunk.location.file, position)
    message = merge_fails(run, status=EXIT_FAILED)
    assert KEY in message and "iter_0000006" in message and chunk.location.file in message


def test_flipped_byte_that_is_read_in_parts(tmp_path, merge_fails):
    run = damaged(tmp_path, runs.FP32_PARAM)
    path = runs.checkpoint(run, 6)
    runs.rewrite(path, grid=runs.split_axis(2, 3))
    chunk = read_layout(path).tensors[KEY].chunks[1]
    runs.flip_byte(path / chunk.location.file, chunk.location.offset + chunk.location.length // 2)
    message = merge_fails(run, status=EXIT_FAILED)
    assert KEY in message and "CRC-32" in message and "iter_0000006" in message


def test_corrupt_metadata(tmp_path, merge_fails):
    run = damaged(tmp_path)
    file = runs.checkpoint(run, 4) / ".metadata"
    file.write_bytes(file.read_bytes()[:300])
    assert ".metadata" in merge_fails(run, status=EXIT_FAILED)
    file.unlink()
    assert ".metadata is missing" in merge_fails(run, status=EXIT_FAILED)
    (file.parent / "metadata.json").write_text("{")
    assert "metadata.json" in merge_fails(run, status=EXIT_FAILED)


class _Code:
    def __reduce__(self):
        return os.system, ("touch run-by-pickle",)


def test_code_in_a_pickle_is_refused(tmp_path, merge_fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = damaged(tmp_path)
    path = runs.checkpoint(run, 8)
    good = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(_Code()))
    assert "system" in merge_fails(run, status=EXIT_FAILED)
    (path / ".metadata").write_bytes(good)
    stream = io.BytesIO()
    torch.save({"args": _Code()}, stream)
    (path / "common.pt").write_bytes(stream.getvalue())
    assert "system" in merge_fails(run, status=EXIT_FAILED)
    assert not Path("run-by-pickle").exists()


def test_other_formats(tmp_path, merge_fails):
    run = damaged(tmp_path)
    path = runs.checkpoint(run, 8)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "zarr" in merge_fails(run, status=EXIT_USAGE)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "fsdp_dtensor"}))
    assert "fsdp_dtensor" in merge_fails(run, status=EXIT_USAGE)


def test_legacy_and_dcp_formats_are_named(tmp_path):
    legacy, fsdp = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    (legacy / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="legacy"):
        read_layout(legacy)
    fsdp.mkdir()
    (fsdp / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="fsdp_dtensor"):
        read_layout(fsdp)


def test_unknown_entries(tmp_path, merge_fails):
    run = damaged(tmp_path)
    path = runs.checkpoint(run, 8)
    _add_object(path, "something_new/shard_0_1")
    message = merge_fails(run, status=EXIT_USAGE)
    assert "something_new/shard_0_1" in message and "--copy" in message and "--drop" in message
    for option, there in (("--copy", True), ("--drop", False)):
        out = tmp_path / option
        command = ["merge", "--load", str(run), "--save", str(out), option, "something_new/*"]
        assert main(command) == 0
        objects = read_layout(out / "iter_0000008").objects
        assert ("something_new/shard_0_1" in objects) == there


def _add_object(path, key):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    stream = io.BytesIO()
    torch.save([1, 2, 3], stream)
    (path / "__9_0.distcp").write_bytes(stream.getvalue())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    size = len(stream.getvalue())
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__9_0.distcp", 0, size)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_target_exists(tmp_path, merge_fails):
    (tmp_path / "out" / "iter_0000008").mkdir(parents=True)
    message = merge_fails(RUNS / runs.DENSE, status=EXIT_USAGE, left=["iter_0000008"])
    assert "exists" in message and "--output-iteration" in message


def test_no_space(monkeypatch, merge_fails):
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    message = merge_fails(RUNS / runs.DENSE, status=EXIT_FAILED)
    assert "free" in message and "needed" in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_write_fails(monkeypatch, merge_fails, code):
    def fail(descriptor, data, offset):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    message = merge_fails(RUNS / runs.DENSE, status=EXIT_FAILED)
    assert os.strerror(code) in message and "nothing was published" in message


def test_read_fails(monkeypatch, merge_fails):
    def fail(descriptor, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    message = merge_fails(RUNS / runs.MAIN, status=EXIT_FAILED)
    assert os.strerror(errno.EIO) in message and "iter_000000" in message


def test_no_permission(tmp_path, monkeypatch, merge_fails):
    def fail(self, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", fail)
    message = merge_fails(RUNS / runs.DENSE, status=EXIT_FAILED)
    assert "Permission denied" in message
    monkeypatch.undo()


def test_a_source_that_changes_during_the_merge(tmp_path, monkeypatch, merge_fails):
    run = damaged(tmp_path)
    original = shared.run_rank

    def touch_and_run(*arguments):
        result = original(*arguments)
        os.utime(runs.checkpoint(run, 4) / "__0_0.distcp")
        return result

    monkeypatch.setattr(shared, "run_rank", touch_and_run)
    message = merge_fails(run, status=EXIT_FAILED)
    assert "changed while it was read" in message and "iter_0000004" in message


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 60 + "1" + "}" * 60, "{", "\x00"])
def test_json_that_is_damaged_or_deep(text, tmp_path, merge_fails):
    run = damaged(tmp_path)
    (runs.checkpoint(run, 8) / "metadata.json").write_text(text)
    message = merge_fails(run, status=EXIT_FAILED)
    assert "iter_0000008/metadata.json is damaged" in message


def test_provenance_that_is_deep(tmp_path, capsys):
    run = damaged(tmp_path)
    assert main(["merge", "--load", str(run), "--save", str(tmp_path / "out")]) == 0
    output = tmp_path / "out" / "iter_0000008"
    (output / "wsm_merge.json").write_text("[" * 10**5)
    capsys.readouterr()
    assert main(["verify", str(output)]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "wsm_merge.json: damaged" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "a\nb", "\ud800", ""])
def test_file_names_that_no_file_has(name, tmp_path, merge_fails):
    run = damaged(tmp_path)
    path = runs.checkpoint(run, 8) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    message = merge_fails(run, status=EXIT_FAILED)
    assert "iter_0000008" in message and ("damaged" in message or "outside" in message)


@pytest.mark.parametrize("weights", ["1e308,1e308,0,0", "1e308,1e308,-1e308,-1e308", "1e309,0,0,1"])
def test_weights_whose_sum_overflows(weights, merge_fails):
    for more in ([], ["--allow-unnormalized"]):
        options = [f"--weights={weights}", *more]
        assert "--weights" in merge_fails(RUNS / runs.DENSE, *options, status=EXIT_USAGE)
