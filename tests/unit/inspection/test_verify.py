"""``wsm verify``: a whole checkpoint passes, a damaged one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED
from wsm_megatron.planning.provenance import described, read_provenance, write_provenance
from wsm_megatron.plugin.emit import checksums

KEY = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def merged(tmp_path):
    """A merged checkpoint, with the optimizer, of a copy of a run."""
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    config = MergeConfig(load=run, save=tmp_path / "out", decay="1-sqrt", optimizer_state="last")
    return merge(config).output


@pytest.mark.parametrize("run", runs.ALL)
def test_real_checkpoints_are_whole(run):
    report = verify(runs.checkpoint(run, 8))
    assert report.tensors > 0 and not report.merged


@pytest.mark.parametrize("optimizer_state", ["drop", "last", "merge"])
@pytest.mark.parametrize("run", [runs.FP32_PARAM, runs.FLAT, runs.MOE, runs.MAIN])
def test_merges_are_recomputed_from_their_sources(run, optimizer_state, tmp_path):
    config = MergeConfig(load=RUNS / run, save=tmp_path, optimizer_state=optimizer_state)
    report = verify(merge(config).output, sources=True)
    assert report.merged and report.samples > 1000


def test_command(merged, capsys):
    assert main(["verify", str(merged), "--sources", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "recomputed" in lines[-2] and json.loads(lines[-1])["samples"] > 1000


def test_a_flipped_byte_anywhere_is_found(merged, capsys):
    """In values, in an object, in the metadata, in the common state."""
    chunk = read_layout(merged).tensors[KEY].chunks[0]
    extra = next(iter(read_layout(merged).objects.values()))
    damage = {
        chunk.location.file: chunk.location.offset + chunk.location.length // 2,
        ".metadata": 200,
        "common.pt": 3000,
    }
    places = [*damage.items(), (extra.location.file, extra.location.offset + 66)]
    for name, position in places:
        good = (merged / name).read_bytes()
        runs.flip_byte(merged / name, position)
        assert main(["verify", str(merged)]) == EXIT_FAILED, name
        assert str(merged) in capsys.readouterr().err
        (merged / name).write_bytes(good)
    assert main(["verify", str(merged)]) == 0


def test_nonfinite_values_are_found(merged):
    runs.rewrite(merged, lambda key, t: t.mul_(float("nan")) if key == KEY else t)
    with pytest.raises(MergeError, match=KEY):
        verify(merged)
    with pytest.raises(MergeError, match="the merge wrote"):
        verify(merged, allow_nonfinite=True)


def forge(checkpoint: Path) -> None:
    """Make ``wsm_merge.json`` say that the files are as they are now."""
    provenance = read_provenance(checkpoint)
    (checkpoint / "wsm_merge.json").unlink()
    write_provenance(checkpoint, described(provenance), checksums(checkpoint))


def test_another_models_values_are_found_by_the_sources(merged):
    """Checksums alone cannot tell when container and provenance were both written anew."""

    def change(key, tensor):
        return tensor + torch.ones_like(tensor) if key == KEY else tensor

    runs.rewrite(merged, change)
    forge(merged)
    verify(merged)
    with pytest.raises(MergeError, match=f"{KEY}.* is not the merge"):
        verify(merged, sources=True)


def test_what_sources_need(merged):
    with pytest.raises(ValueError, match="wsm_merge.json"):
        verify(runs.checkpoint(runs.DENSE, 8), sources=True)
    source = runs.checkpoint(merged.parent.parent / "run", 4)
    source.rename(source.with_name("moved"))
    with pytest.raises(ValueError, match="iter_0000004: the source is gone"):
        verify(merged, sources=True)
