"""Every merge of a sweep is exported, of the same read; or exported alone."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig, UsageError
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.export.job import export
from wsm_megatron.export.options import MergeExport
from wsm_megatron.export.target import RECORD_FILE
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.manifest import SweepManifest
from wsm_megatron.sweeps.run import SweepOptions, sweep

HF = MergeExport(export="hf")
ONLY = MergeExport(export="hf", export_only=True)
GRID = SweepGrid(decay=("mean", "ema"), last=(2, 3))
NAMES = ["ema-last2", "ema-last3", "mean-last2", "mean-last3"]
ITERATION = "iter_0000008"


def wanted(tmp_path: Path, **options: Any) -> Sweep:
    return Sweep(MergeConfig(load=RUNS / runs.MAIN, save=tmp_path / "out", **options), GRID)


def manifest(tmp_path: Path) -> list[dict[str, Any]]:
    merges: list[dict[str, Any]] = json.loads((tmp_path / "out/sweep.json").read_text())["merges"]
    return merges


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exports(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "out/hf").glob("*/iter_*"))


def test_the_manifest_names_an_export_of_every_merge(tmp_path: Path) -> None:
    done = sweep(wanted(tmp_path), exports=HF)
    assert done is not None
    assert done.bytes_read == prepare_job(wanted(tmp_path).merge_set()).bytes_to_read()
    assert exports(tmp_path) == NAMES and len(manifest(tmp_path)) == 4
    for one in manifest(tmp_path):
        path, folder = Path(one["path"]), Path(one["export"])
        assert one["exists"] and folder == tmp_path / "out/hf" / one["name"]
        again = HF.of(path, tmp_path / "out")
        alone = export(replace(again, save=tmp_path / "again" / one["name"])).path
        assert contents(folder) == contents(alone)
    assert SweepManifest.read(done.manifest).merges == done.merges


def test_export_only_leaves_exports_and_the_manifest(tmp_path: Path) -> None:
    sweep(replace(wanted(tmp_path), base=replace(wanted(tmp_path).base, save=tmp_path / "both")),
          exports=HF)  # fmt: skip
    sweep(wanted(tmp_path, optimizer_state="drop"), exports=ONLY)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["hf", "sweep.json"]
    for one in manifest(tmp_path):
        assert not one["exists"]
        found = contents(Path(one["export"]))
        expected = contents(tmp_path / "both/hf" / one["name"])
        assert found.pop(RECORD_FILE) != expected.pop(RECORD_FILE)
        assert found == expected
    again = sweep(wanted(tmp_path), exports=ONLY)
    assert again is not None and again.bytes_read == 0


def test_what_is_exported_later_is_made_from_the_merges(tmp_path: Path) -> None:
    sweep(wanted(tmp_path))
    assert all(one["export"] is None for one in manifest(tmp_path))
    again = sweep(wanted(tmp_path), exports=HF)
    assert again is not None and again.bytes_read == 0
    assert exports(tmp_path) == NAMES
    assert all(one["exists"] and one["export"] for one in manifest(tmp_path))


SCORE = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
assert folder == pathlib.Path(os.environ["WSM_EXPORT"])
assert (folder / "config.json").is_file()
print({"mean-last2": 3, "mean-last3": 1, "ema-last2": 2, "ema-last3": 4}[folder.parent.name])
"""


@pytest.mark.parametrize("how", [HF, ONLY])
def test_an_evaluation_is_told_the_export_and_the_worse_are_deleted(
    how: MergeExport, tmp_path: Path
) -> None:
    (tmp_path / "score.py").write_text(SCORE)
    command = f"{shlex.quote(sys.executable)} {tmp_path / 'score.py'} {{export}}"
    options = SweepOptions(batch=2, keep=2, eval=command)
    sweep(wanted(tmp_path), options=options, exports=how)
    best = ["ema-last2", "mean-last3"]
    assert exports(tmp_path) == best
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {"sweep.json", "hf", *([] if how.export_only else best)}
    assert {path.name for path in (tmp_path / "out/hf").iterdir()} == set(best)
    for one in manifest(tmp_path):
        kept = one["name"].split("/")[0] in best
        assert (one["export"] is not None) == kept
        assert one["exists"] == (kept and not how.export_only)
    again = sweep(wanted(tmp_path), options=options, exports=how)
    assert again is not None and again.bytes_read == 0


def test_scores_may_name_the_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(wanted(tmp_path), exports=ONLY)
    merges = manifest(tmp_path)
    lines = [f"{one['export']},{n}" for n, one in enumerate(merges)]
    (tmp_path / "scores.csv").write_text("\n".join(["path,acc", *lines]))
    command = ["select", "--manifest", str(tmp_path / "out/sweep.json")]
    command += ["--scores", str(tmp_path / "scores.csv"), "--metric", "acc"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"best merge: {merges[-1]['path']} (not on disk)" in out
    assert f"exported: {merges[-1]['export']}" in out


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    done = sweep(wanted(tmp_path))
    assert done is not None
    data = json.loads(done.manifest.read_text())
    for one in data["merges"]:
        del one["export"]
    done.manifest.write_text(json.dumps(data))
    assert SweepManifest.read(done.manifest).merges == done.merges


@pytest.mark.parametrize("batch", [None, 2])
def test_what_cannot_be_exported_is_refused_before_anything_is_merged(
    batch: int | None, tmp_path: Path
) -> None:
    options = SweepOptions(batch=batch, eval="true" if batch else None)
    with pytest.raises(UsageError, match="qwen3 cannot express this model"):
        sweep(wanted(tmp_path), options=options, exports=replace(HF, family="qwen3"))
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "out")]
    line += ["--decay", "mean,ema", "--last", "2,3"]
    assert main([*line, "--eval", "./score.sh {export}"]) == EXIT_USAGE
    assert "give --export hf" in capsys.readouterr().err
    assert main([*line, "--export", "hf", "--export-only", "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main([*line, "--export", "hf", "--export-only", "--local-ranks", "2"]) == 0
    assert exports(tmp_path) == NAMES
