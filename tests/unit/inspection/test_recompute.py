"""``wsm verify --sources``: the merge made again, from where its sources are now."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors
from tests.runs import dump_common
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.common_state import load_common, read_common
from wsm_megatron.checkpoint.keys import Role, may_be_padding
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.planning.provenance import (
    described,
    read_provenance,
    seal,
    write_provenance,
)
from wsm_megatron.plugin.emit import checksums

KEY = "decoder.layers.mlp.linear_fc1.weight"
MAIN_KEY = f"optimizer.state.param.{KEY}"
MOMENT_KEY = f"optimizer.state.exp_avg.{KEY}"


def forge(checkpoint: Path, **changes: Any) -> None:
    """Make ``wsm_merge.json`` fit the files as they are now."""
    provenance = read_provenance(checkpoint)
    assert provenance is not None
    (checkpoint / "wsm_merge.json").unlink()
    write_provenance(checkpoint, described(provenance) | changes, checksums(checkpoint))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A merge with its optimizer, of a copy of a run."""
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    config = MergeConfig(load=run, save=tmp_path / "out", decay="1-sqrt", optimizer_state="last")
    return merge(config).output


@pytest.mark.parametrize("optimizer_state", ["drop", "last", "merge"])
@pytest.mark.parametrize("run", [runs.FP32_PARAM, runs.FLAT, runs.FULLY, runs.MOE, runs.MAIN])
def test_every_element_of_real_merges(run: str, optimizer_state: str, tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / run, save=tmp_path, optimizer_state=optimizer_state)
    output = merge(config).output
    report = verify(output, sources="all")
    assert report.recomputed == "all"
    assert report.samples == sum(tensor.numel() for tensor in load_tensors(output).values())
    assert report.samples > verify(output, sources=True).samples > 1000


@pytest.mark.parametrize("key", [KEY, MAIN_KEY, MOMENT_KEY])
def test_one_wrong_element_is_found(merged: Path, key: str) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == key:
            tensor = tensor.clone()
            tensor.view(-1)[tensor.numel() // 3] += 1
        return tensor

    runs.rewrite(merged, change)
    forge(merged)
    verify(merged)
    with pytest.raises(MergeError, match=f"{key} .* is not the merge of its sources"):
        verify(merged, sources="all")


def test_a_hole_in_a_flat_bucket_is_found(tmp_path: Path) -> None:
    """Elements that some other merge had left there."""
    options: dict[str, Any] = {"load": RUNS / runs.FLAT, "optimizer_state": "last"}
    output = merge(MergeConfig(save=tmp_path / "a", **options)).output
    other = load_tensors(merge(MergeConfig(save=tmp_path / "b", last=2, **options)).output)
    bucket = next(key for key, e in read_layout(output).tensors.items() if e.role is Role.MAIN)

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key == bucket:
            tensor = tensor.clone()
            tensor[64:2111] = other[key][64:2111]
        return tensor

    runs.rewrite(output, change)
    forge(output)
    with pytest.raises(MergeError, match="is not the merge of its sources"):
        verify(output, sources="all")


def test_byte_entries_are_the_newest_sources(tmp_path: Path) -> None:
    run = runs.copy_run(runs.MOE, tmp_path / "run")
    output = merge(MergeConfig(load=run, save=tmp_path / "out", optimizer_state="last")).output
    objects = read_layout(output).objects
    for key in [key for key in objects if "rng_state" in key or "_extra_state" in key][:2]:
        location = objects[key].location
        with (output / location.file).open("r+b") as stream:
            good = stream.read()
            stream.seek(location.offset)
            stream.write(bytes(location.length))
        forge(output)
        with pytest.raises(MergeError, match="damaged|archive|is not that of"):
            verify(output, sources=True)
        (output / location.file).write_bytes(good)
    # Sound by itself, and of another checkpoint.
    key = next(key for key in objects if key.startswith("rng_state"))
    older = read_layout(runs.checkpoint(run, 6))
    data = (older.path / older.objects[key].location.file).read_bytes()
    start = older.objects[key].location.offset
    blob = data[start : start + older.objects[key].nbytes]
    location = objects[key].location
    assert len(blob) == location.length
    with (output / location.file).open("r+b") as stream:
        stream.seek(location.offset)
        stream.write(blob)
    forge(output)
    verify(output)
    with pytest.raises(MergeError, match=f"{key} is not that of .*iter_0000008"):
        verify(output, sources=True)


def more(state: dict[str, Any]) -> None:
    state["more"] = 1


def sooner(state: dict[str, Any]) -> None:
    state["iteration"] = 7


def less(state: dict[str, Any]) -> None:
    del state["opt_param_scheduler"]


def hotter(state: dict[str, Any]) -> None:
    state["opt_param_scheduler"]["max_lr"] *= 2


def hungrier(state: dict[str, Any]) -> None:
    state["args"].consumed_train_samples += 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (more, "more"),
        (sooner, "iteration"),
        (less, "opt_param_scheduler"),
        (hotter, "opt_param_scheduler.max_lr"),
        (hungrier, "args.consumed_train_samples"),
    ],
)
def test_the_common_state_is_compared(
    merged: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    state = load_common(*read_common(merged))
    change(state)
    (merged / "common.pt").write_bytes(dump_common(state))
    forge(merged)
    verify(merged)
    with pytest.raises(MergeError, match=f"common state .*iter_0000008 makes it: {named}$"):
        verify(merged, sources=True)


def test_missing_and_additional_tensors_are_named(merged: Path) -> None:
    renamed = {KEY: "decoder.layers.mlp.linear_fc3.weight"}
    runs.rewrite(merged, rename=lambda key: renamed.get(key, key))
    forge(merged)
    verify(merged)
    with pytest.raises(MergeError, match=f"lacks {KEY} and has in addition {renamed[KEY]}"):
        verify(merged, sources=True)


def test_the_marker_is_compared(merged: Path) -> None:
    marker = json.loads((merged / "metadata.json").read_text())
    (merged / "metadata.json").write_text(json.dumps({**marker, "sharded_backend_version": 7}))
    forge(merged)
    with pytest.raises(MergeError, match=r"metadata\.json is not what"):
        verify(merged, sources=True)


def test_a_run_that_was_moved(merged: Path) -> None:
    run, archive = merged.parents[1] / "run", merged.parents[1] / "archive"
    run.rename(archive)
    with pytest.raises(ValueError, match="iter_0000002: the source is gone.*--sources-from"):
        verify(merged, sources=True)
    assert verify(merged, sources="all", sources_from=archive).samples > 0
    with pytest.raises(ValueError, match="--sources-from has no effect without --sources"):
        verify(merged, sources_from=archive)


def test_sources_that_are_others(merged: Path) -> None:
    with pytest.raises(ValueError, match=r"iter_0000002 is not the checkpoint that was merged"):
        verify(merged, sources=True, sources_from=RUNS / runs.FP32_PARAM)


def test_a_damaged_source_is_to_blame(merged: Path) -> None:
    source = runs.checkpoint(merged.parents[1] / "run", 4)
    chunk = read_layout(source).tensors[MAIN_KEY].chunks[0]
    place = chunk.location.offset + chunk.location.length // 2
    runs.flip_byte(source / chunk.location.file, place)
    with pytest.raises(MergeError, match=f"iter_0000004: CRC-32 of {MAIN_KEY} does not match"):
        verify(merged, sources="all")


def test_kept_iterations_that_were_not_saved(merged: Path) -> None:
    """As the plugin describes checkpoints that it kept in memory."""
    provenance = read_provenance(merged)
    assert provenance is not None
    run = merged.parents[1] / "run"
    kept: list[dict[str, Any]] = [
        {"iteration": s["iteration"], "tokens": s["tokens"]} for s in provenance["sources"]
    ]
    for source in kept[2:]:
        source["path"] = str(runs.checkpoint(run, source["iteration"]))
    state = load_common(*read_common(merged))
    state["wsm_merge"] |= {"sources": kept}
    (merged / "common.pt").write_bytes(dump_common(state))
    forge(merged, sources=kept)
    assert verify(merged).merged
    with pytest.raises(ValueError, match="iterations 2, 4 were kept in memory .* not saved"):
        verify(merged, sources=True)
    assert verify(merged, sources="all", sources_from=run).samples > 0
    runs.checkpoint(run, 4).rename(run / "gone")
    with pytest.raises(ValueError, match="iter_0000004: the source is gone"):
        verify(merged, sources=True, sources_from=run)


def test_padding_is_whatever_the_run_had_in_memory(tmp_path: Path) -> None:
    """In flat buckets that Megatron wrote; an offline merge has that of its sources."""
    config = MergeConfig(load=RUNS / runs.FLAT, save=tmp_path, optimizer_state="last")
    output = merge(config).output
    padded = {
        key: chunk
        for key, entry in read_layout(output).tensors.items()
        for chunk in entry.chunks
        if len(chunk.offsets) == 1 and may_be_padding(key, chunk.offsets[0], chunk.sizes[0])
    }
    assert any(key.endswith(".param") for key in padded)

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key in padded:
            tensor = tensor.clone()
            tensor[padded[key].offsets[0]] = 7
        return tensor

    runs.rewrite(output, change)
    provenance = read_provenance(output)
    assert provenance is not None
    kept = [
        {name: value for name, value in source.items() if name != "metadata_crc32"}
        for source in provenance["sources"]
    ]
    state = load_common(*read_common(output))
    forge(output)
    with pytest.raises(MergeError, match="is not the merge of its sources"):
        verify(output, sources="all")
    state["wsm_merge"] |= {"sources": kept}
    (output / "common.pt").write_bytes(dump_common(state))
    forge(output, sources=kept)
    assert verify(output, sources="all").samples > 0


def test_what_an_earlier_version_wrote(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its list names no side files, and has no checksum of its own."""
    (merged / "note.txt").write_text("side file")
    contents = json.loads((merged / "wsm_merge.json").read_text())
    del contents["crc32"]
    state = load_common(*read_common(merged))
    state["wsm_merge"]["format"] = contents["format"] = 1
    (merged / "common.pt").write_bytes(dump_common(state))
    size, crc = checksums(merged)["common.pt"]
    contents["files"]["common.pt"] = {"bytes": size, "crc32": f"{crc:08x}"}
    (merged / "wsm_merge.json").write_text(json.dumps(contents, indent=2) + "\n")
    report = verify(merged, sources="all")
    assert report.unchecked == ("wsm_merge.json", "note.txt")
    assert main(["verify", str(merged)]) == 0
    assert "not checked" in capsys.readouterr().out
    (merged / "metadata.json").write_text("{}")
    with pytest.raises(MergeError, match=r"changed: metadata\.json"):
        verify(merged)


def test_options_of_another_version(merged: Path) -> None:
    provenance = read_provenance(merged)
    assert provenance is not None
    options = {**provenance["options"], "flavour": "sweet"}
    state = load_common(*read_common(merged))
    state["wsm_merge"]["options"] = options
    (merged / "common.pt").write_bytes(dump_common(state))
    forge(merged, options=options)
    with pytest.raises(ValueError, match="options not known here: flavour"):
        verify(merged, sources=True)


def test_parts_that_are_not_there(merged: Path) -> None:
    provenance = read_provenance(merged)
    assert provenance is not None
    for name, value in (("files", {"a": 1}), ("sources", [{}]), ("coefficients", None)):
        (merged / "wsm_merge.json").write_bytes(seal({**provenance, name: value}))
        with pytest.raises(MergeError, match=f"damaged: {name} missing or of another kind"):
            verify(merged)


def test_the_command_takes_all_or_a_sample(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([str(merged), "--sources"], "some of its elements"),
        (["--sources", str(merged)], "some of its elements"),
        ([str(merged), "--sources", "sample"], "some of its elements"),
        (["--sources", "all", str(merged)], "all its elements"),
        ([str(merged), "--sources", "all"], "all its elements"),
    ):
        assert main(["verify", *arguments]) == 0, arguments
        assert said in capsys.readouterr().out
    for arguments in (["--sources", "some", str(merged)], ["--sources"], []):
        assert main(["verify", *arguments]) == EXIT_USAGE, arguments


@pytest.mark.parametrize("optimizer_state", ["drop", "last"])
def test_a_merge_of_many_is_the_bytes_of_one_alone(optimizer_state: str, tmp_path: Path) -> None:
    config = MergeConfig(
        load=RUNS / runs.FULLY, save=tmp_path / "many", optimizer_state=optimizer_state
    )
    many = merge(replace(config, decay="mean,ema")).merged[1].output
    alone = merge(replace(config, save=tmp_path / "alone", decay="ema")).output
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in many.iterdir())
    for name in names:
        assert (many / name).read_bytes() == (alone / name).read_bytes(), name
