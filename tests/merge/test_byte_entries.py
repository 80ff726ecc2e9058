"""Byte entries (``_extra_state``, RNG, sizes of buckets): sound, or not merged."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from tests import runs
from wsm_megatron.checkpoint.layout import ObjectEntry, read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.cli.main import main
from wsm_megatron.errors import MergeError


def damage(path: Path, position: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize("name", [runs.FLAT, runs.MAIN])
def test_a_flipped_bit_anywhere_is_noticed(name: str, tmp_path: Path) -> None:
    checkpoint = runs.checkpoint(runs.copy_run(name, tmp_path / "run"), 8)
    chance = random.Random(0)
    layout = read_layout(checkpoint)
    for entry in list(layout.objects.values()) * 5:
        file = checkpoint / entry.location.file
        position = entry.location.offset + chance.randrange(entry.location.length)
        mask = 1 << chance.randrange(8)
        damage(file, position, mask)
        reader = CheckpointReader(layout)
        with pytest.raises(MergeError, match=f"{checkpoint}: .*no sound torch.save archive"):
            reader.read_object(entry)
        reader.close()
        damage(file, position, mask)
        reader = CheckpointReader(layout)
        assert len(reader.read_object(entry)) == entry.nbytes
        reader.close()


def an_entry(checkpoint: Path, part: str) -> ObjectEntry:
    return next(e for key, e in read_layout(checkpoint).objects.items() if part in key)


@pytest.mark.parametrize("part", ["_extra_state", "rng_state", "per_bucket_numel"])
def test_a_damaged_entry_of_the_newest_source_is_not_merged(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    checkpoint = runs.checkpoint(run, 8)
    location = an_entry(checkpoint, part).location
    damage(checkpoint / location.file, location.offset + location.length // 3, 0x10)
    save = ["--load", str(run), "--save", str(tmp_path / "out"), "--optimizer-state", "last"]
    assert main(["merge", *save]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert part in message and "iter_0000008" in message and "no sound torch.save" in message
    assert not list((tmp_path / "out").glob("**/*"))


def test_bytes_that_torch_save_did_not_write_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron and PyTorch wrap every object; nothing says whether bare bytes are sound."""
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    checkpoint = runs.checkpoint(run, 8)
    location = an_entry(checkpoint, "_extra_state").location
    data = bytearray((checkpoint / location.file).read_bytes())
    bare = pickle.dumps({"a": 1}).ljust(location.length, b" ")
    data[location.offset : location.offset + location.length] = bare
    (checkpoint / location.file).write_bytes(data)
    assert main(["merge", "--load", str(run), "--save", str(tmp_path / "out")]) == 1
    assert "_extra_state" in capsys.readouterr().err
