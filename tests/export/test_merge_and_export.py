"""An export in the pass that merges: the bytes that an export of the published merge has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.export.test_export import contents, load, visible
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, UsageError, merge
from wsm_megatron.api import merge_and_export
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE, StoppedError
from wsm_megatron.export import sink
from wsm_megatron.export.job import export
from wsm_megatron.export.merged import MergedExports
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.export.target import RECORD_FILE
from wsm_megatron.planning.tasks import Task

OWN = MergeExport(export="safetensors", export_dtype="same", shard_size=9000)
HF = MergeExport(export="hf", shard_size=9000)
ITERATION = "iter_0000008"


def config(tmp_path: Path, run: Path | str = runs.MAIN, **options: Any) -> MergeConfig:
    load = RUNS / run if isinstance(run, str) else run
    return MergeConfig(load=load, save=tmp_path / "merged", **options)


def again(merged: Path, to: Path, how: MergeExport = OWN) -> dict[str, bytes]:
    """What ``wsm export`` makes of a published merge."""
    one = how.of(merged, merged.parent)
    return contents(export(replace(one, save=to)).path)


CASES = [(run, "drop") for run in runs.ALL] + [
    (run, state) for run in runs.WITH_OPTIMIZER for state in ("last", "merge")
]


@pytest.mark.parametrize("run, state", CASES)
def test_no_byte_differs_from_an_export_of_the_published_merge(
    run: str, state: str, tmp_path: Path
) -> None:
    done, (one,) = merge_and_export(config(tmp_path, run, optimizer_state=state), OWN)
    assert not one.already
    assert contents(one.path) == again(done.output, tmp_path / "again")


@pytest.mark.parametrize("ranks", ["1", "2", "3"])
def test_nor_does_one_that_ranks_have_shared(ranks: str, tmp_path: Path) -> None:
    """Tensors that are cut along their rows and columns go into files that several ranks write."""
    run = runs.copy_run(runs.MOE, tmp_path / "run")
    for iteration in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(run, iteration), grid=runs.split_axis(2, 3))
    flags = ["--load", str(run), "--save", str(tmp_path / "merged"), "--local-ranks", ranks]
    flags += ["--export", "safetensors", "--export-dtype", "same", "--shard-size", "9000"]
    assert main(["merge", *flags]) == 0
    found = contents(tmp_path / "merged" / "safetensors" / ITERATION)
    assert found == again(tmp_path / "merged" / ITERATION, tmp_path / "again")


def test_small_tiles_end_up_in_the_same_places(tmp_path: Path) -> None:
    options = ExecutionOptions(memory=3_000_000, threads=2)
    done, (one,) = merge_and_export(config(tmp_path, runs.MOE), OWN, options)
    assert contents(one.path) == again(done.output, tmp_path / "again")


@pytest.mark.parametrize("how", [OWN, HF])
def test_ranks_that_see_different_files_export_too(how: MergeExport, tmp_path: Path) -> None:
    execution = ExecutionOptions(node_local=True)
    done, (one,) = merge_and_export(config(tmp_path), how, execution)
    assert contents(one.path) == again(done.output, tmp_path / "again", how)


def test_the_merge_is_not_read_again_and_each_source_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[Path] = set()
    start = CheckpointReader.__init__

    def note(reader: CheckpointReader, layout: Any, *more: Any, **named: Any) -> None:
        opened.add(layout.path)
        start(reader, layout, *more, **named)

    monkeypatch.setattr(CheckpointReader, "__init__", note)
    done, _ = merge_and_export(config(tmp_path, optimizer_state="last"), HF)
    assert opened and all(path.parent == RUNS / runs.MAIN for path in opened)
    alone = merge(replace(config(tmp_path, optimizer_state="last"), save=tmp_path / "alone"))
    assert done.bytes_read == alone.bytes_read


@pytest.mark.parametrize("chunks", [5, 9])
def test_a_job_that_died_goes_on_from_what_it_has_merged(
    chunks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, alone = config(tmp_path, optimizer_state="last"), ExecutionOptions(threads=1)
    finish, count = ChunkWriter.finish, 0

    def finish_some(writer: ChunkWriter) -> None:
        nonlocal count
        if count == chunks:
            raise StoppedError("stopped", 15)
        count += 1
        finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "finish", finish_some)
        with pytest.raises(StoppedError):
            merge_and_export(wanted, OWN, alone)
    assert visible(wanted.save) == ["safetensors"] and visible(wanted.save / "safetensors") == []
    taken_over: list[str] = []
    take_over = sink.TargetWithExport.take_over

    def note(target: sink.TargetWithExport, task: Task) -> None:
        taken_over.append(task.recipe.key)
        take_over(target, task)

    monkeypatch.setattr(sink.TargetWithExport, "take_over", note)
    done, (one,) = merge_and_export(wanted, OWN, alone)
    assert taken_over
    assert contents(one.path) == again(done.output, tmp_path / "again")


KILLED = """\
import os, signal, sys
from wsm_megatron.cli.main import main
from wsm_megatron.export.shard_file import ShardFile

write, left = ShardFile.write_runs, 12

def killed(*arguments, **named):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments, **named)

ShardFile.write_runs = killed
main(sys.argv[1:])
"""


@pytest.mark.parametrize("more", [[], ["--export-only"]])
def test_a_job_that_was_killed_is_done_by_the_same_command(more: list[str], tmp_path: Path) -> None:
    line = ["merge", "--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "merged")]
    line += ["--export", "hf", "--optimizer-state", "last", "--shard-size", "9000", *more]
    repository = str(Path(__file__).resolve().parents[2])
    child = subprocess.run(
        [sys.executable, "-c", KILLED, *line, "--threads", "1"],
        env=os.environ | {"PYTHONPATH": repository},
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    folder = tmp_path / "merged" / "hf"
    assert visible(tmp_path / "merged") == ["hf"] and visible(folder) == []
    assert main(line) == 0
    names = [path.name for path in folder.iterdir()]
    assert names == [ITERATION], "nothing else is left"
    alone = merge(config(tmp_path / "alone", optimizer_state="last"))
    expected = again(alone.output, tmp_path / "again", HF)
    found = contents(folder / ITERATION)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name != RECORD_FILE)


@pytest.mark.parametrize("state", ["drop", "last"])
def test_export_only_publishes_the_same_weights_and_nothing_else(
    state: str, tmp_path: Path
) -> None:
    wanted = config(tmp_path, optimizer_state=state)
    both, (one,) = merge_and_export(replace(wanted, save=tmp_path / "both"), HF)
    done, (only,) = merge_and_export(wanted, replace(HF, export_only=True))
    weights = sum(tensor.nbytes for tensor in load(only.path).values())
    assert done.bytes_written == weights < both.bytes_written
    expected, found = contents(one.path), contents(only.path)
    assert expected.pop(RECORD_FILE) != found.pop(RECORD_FILE)
    assert found == expected
    assert [path.name for path in wanted.save.iterdir()] == ["hf"]
    assert visible(wanted.save / "hf") == [ITERATION]
    assert done.bytes_read <= both.bytes_read
    if state == "last":
        assert done.bytes_read < both.bytes_read, "no moments"


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_export_only_on_ranks(
    ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load", str(RUNS / runs.MOE), "--save", str(tmp_path / "merged")]
    flags += ["--decay", "mean,ema", "--export", "safetensors", "--export-dtype", "same"]
    flags += ["--local-ranks", ranks, "--optimizer-state", "merge"]
    assert main(["merge", *flags, "--export-only"]) == 0
    for decay in ("mean", "ema"):
        alone = merge(
            MergeConfig(
                load=RUNS / runs.MOE,
                save=tmp_path / "alone" / decay,
                decay=decay,
                optimizer_state="merge",
            )
        )
        found = load(tmp_path / "merged" / "safetensors" / decay / ITERATION)
        tensors = load_tensors(alone.output)
        assert found and all(same_bits(found[key], tensors[key]) for key in found)


def test_export_only_again_reads_nothing(tmp_path: Path) -> None:
    wanted, only = config(tmp_path), replace(HF, export_only=True)
    merge_and_export(wanted, only)
    done, (one,) = merge_and_export(wanted, only)
    assert done.bytes_read == 0 and one.already
    with pytest.raises(UsageError, match="exists and is left alone"):
        merge_and_export(replace(wanted, decay="ema"), only)


def test_an_export_without_its_merge_is_found_again(tmp_path: Path) -> None:
    """The merge is made anew; what was exported of it stays."""
    wanted = config(tmp_path)
    done, (one,) = merge_and_export(wanted, HF)
    before = contents(one.path)
    done.output.rename(tmp_path / "away")
    _, (one,) = merge_and_export(wanted, HF)
    assert one.already and done.output.is_dir() and contents(one.path) == before


def test_it_does_not_matter_how_many_ranks_made_the_merge_that_an_export_is_of(
    tmp_path: Path,
) -> None:
    """Its metadata says where tensors lie, and is another one."""
    line = ["merge", "--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "merged")]
    line += ["--export", "hf", "--local-ranks"]
    assert main([*line, "2"]) == 0
    merged, exported = tmp_path / "merged" / ITERATION, tmp_path / "merged" / "hf" / ITERATION
    before, metadata = contents(exported), (merged / ".metadata").read_bytes()
    merged.rename(tmp_path / "away")
    for _ in range(2):
        assert main([*line, "1"]) == 0
        assert (merged / ".metadata").read_bytes() != metadata and contents(exported) == before


REFUSED = {
    "a tensor that the table needs": (
        {"drop": ("output_layer.weight",)},
        {},
        "lm_head.weight is made of output_layer.weight, which the checkpoint does not have",
    ),
    "a model of another family": ({}, {"family": "qwen3"}, "qwen3 cannot express this model"),
    "no such tensor": ({}, {"leave_out": ("no*",)}, "matches no model tensor"),
    "too few rows": ({}, {"arg": ("vocab_size=1000",)}, "less than the vocabulary's 1000"),
}


@pytest.mark.parametrize("export_only", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_done(
    case: str, export_only: bool, tmp_path: Path
) -> None:
    options, exporting, words = REFUSED[case]
    how = replace(HF, export_only=export_only, **exporting)
    with pytest.raises(UsageError, match=words):
        merge_and_export(config(tmp_path, **options), how)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_told_before_anything_is_done(tmp_path: Path) -> None:
    there = tmp_path / "merged" / "hf" / ITERATION
    there.mkdir(parents=True)
    with pytest.raises(UsageError, match="exists and is left alone"):
        merge_and_export(config(tmp_path), HF)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--export-only"], "--export-only has no effect without --export"),
        (["--export", "hf", "--export-only", "--node-local"], "does not work with --node-local"),
        (["--export", "hf", "--export-save", str(RUNS / runs.MAIN)], "is the run itself"),
        (["--export", "hf", "--export-save", str(RUNS / runs.MAIN / ITERATION)], "is inside of"),
    ],
)
def test_mistakes(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["merge", "--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "merged")]
    assert main([*line, *flags]) == EXIT_USAGE
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def damaged(tmp_path: Path) -> Path:
    run = runs.copy_run(runs.MAIN, tmp_path / "run")
    place = read_layout(run / ITERATION).tensors["output_layer.weight"].chunks[0].location
    runs.flip_byte(run / ITERATION / place.file, place.offset + place.length // 2)
    return run


@pytest.mark.parametrize("export_only", [False, True])
def test_a_damaged_source_becomes_neither(export_only: bool, tmp_path: Path) -> None:
    wanted = config(tmp_path, damaged(tmp_path))
    with pytest.raises(MergeError, match="CRC-32"):
        merge_and_export(wanted, replace(HF, export_only=export_only))
    assert [path for path in wanted.save.rglob("*") if path.name != "hf"] == []


def test_a_failure_of_one_rank_ends_all(tmp_path: Path) -> None:
    line = ["merge", "--load", str(damaged(tmp_path)), "--save", str(tmp_path / "merged")]
    assert main([*line, "--export", "hf", "--local-ranks", "2"]) == EXIT_FAILED
    assert [path for path in (tmp_path / "merged").rglob("*") if path.name != "hf"] == []


def test_an_export_that_could_not_follow_its_merge_is_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two renames."""
    wanted = config(tmp_path)

    def fail(*args: Any) -> None:
        raise MergeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(MergedExports, "commit", fail)
        with pytest.raises(MergeError, match="on purpose"):
            merge_and_export(wanted, OWN)
    assert visible(wanted.save / "safetensors") == []
    done, (one,) = merge_and_export(wanted, OWN)
    assert done.bytes_read == 0 and not one.already
    assert contents(one.path) == again(done.output, tmp_path / "again")


def test_no_space_for_both_is_said_before_either_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path)
    stored = sum(
        path.stat().st_size for path in merge_size(replace(wanted, save=tmp_path / "size"))
    )

    class Usage:
        free = stored + 1000

    monkeypatch.setattr("wsm_megatron.storage.space.shutil.disk_usage", lambda place: Usage)
    with pytest.raises(MergeError, match="GB needed and 0.000 GB free; nothing was written"):
        merge_and_export(wanted, HF)
    assert not list(wanted.save.rglob("iter_*"))


def merge_size(wanted: MergeConfig) -> list[Path]:
    return [path for path in merge(wanted).output.iterdir() if path.is_file()]


def test_plan_says_what_export_only_would_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["plan", "--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "merged")]
    flags += ["--optimizer-state", "last", "--export", "hf", "--export-only"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "would export" in out and "would write" not in out and "exp_avg" not in out
    assert list(tmp_path.iterdir()) == []


def test_an_export_config_is_of_its_merge(tmp_path: Path) -> None:
    one = HF.of(tmp_path / "out" / "ema" / ITERATION, tmp_path / "out")
    assert isinstance(one, ExportConfig)
    assert one.save == tmp_path / "out" / "hf" / "ema" / ITERATION
