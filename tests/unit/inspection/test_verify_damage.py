"""``wsm verify`` misses nothing: random damage in every file of a published merge is found."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import runs
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.planning.provenance import read_provenance, seal

FLIPS = 400
"""Over all files of a merge; two of them in each file at least."""
CASES = {
    "weights only": (runs.DENSE, {}),
    "common state in distcp, optimizer": (runs.MAIN, {"optimizer_state": "last"}),
}


@pytest.fixture(scope="module", params=CASES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged checkpoint with files beside it."""
    run, options = CASES[request.param]
    root = tmp_path_factory.mktemp("damage")
    load = runs.copy_run(run, root / "run")
    tokenizer = runs.checkpoint(load, 8) / "tokenizer" / "deep"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tokenizer.parent / "empty.txt").touch()
    (runs.checkpoint(load, 8) / "run_config.yaml").write_text("model: {layers: 2}\n")
    output = merge(MergeConfig(load=load, save=root / "out", **options)).output
    assert verify(output, sources=True).files == len(files_of(output)) - 1
    return output


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """The file's bytes, which it has again afterwards."""
    good = path.read_bytes()
    try:
        yield good
    finally:
        path.write_bytes(good)


def test_no_flipped_bit_is_missed(merged: Path) -> None:
    chance, files = random.Random(11), files_of(merged)
    sizes = [path.stat().st_size for path in files]
    chosen = [path for path, size in zip(files, sizes, strict=True) if size for _ in range(2)]
    small = [path for path in files if 0 < path.stat().st_size < 10_000]
    chosen += chance.choices(files, sizes, k=(FLIPS - len(chosen)) // 2)
    chosen += chance.choices(small, k=FLIPS - len(chosen))
    assert any(path.name == "wsm_merge.json" for path in small)
    missed = []
    for number, path in enumerate(chosen):
        with restored(path) as good:
            bit = chance.randrange(8 * len(good))
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            try:
                verify(merged, sources=number % 10 == 0)
                missed.append((path.name, bit))
            except MergeError as error:
                assert path.name in str(error)
    assert missed == []
    verify(merged)


def test_no_byte_of_the_provenance_may_change(merged: Path) -> None:
    """Not even white space, or the order of its fields."""
    path = merged / "wsm_merge.json"
    good = json.loads(path.read_text())
    seal = good.pop("crc32")
    swapped = json.dumps({"crc32": seal, **good}, indent=2) + "\n"
    for text in (
        json.dumps({**good, "crc32": seal}),
        path.read_text() + " ",
        path.read_text().replace("\n", "\r\n"),
        path.read_text().replace('"iteration": 8', '"iteration": 9, "iteration": 8', 1),
        json.dumps(good, indent=2) + "\n",
        json.dumps({**good, "format": 1, "crc32": seal}, indent=2) + "\n",
        swapped,
        "[" * 100_000,
        "",
    ):
        with restored(path):
            path.write_text(text)
            with pytest.raises(MergeError, match=r"wsm_merge\.json: damaged"):
                verify(merged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def overwrite(path: Path) -> None:
    """With as many other bytes."""
    path.write_bytes(bytes(path.stat().st_size))


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}x"))


def link(path: Path) -> None:
    """To the very bytes: what a link names may change any time."""
    elsewhere = path.parents[3] / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [truncate, append, overwrite, Path.unlink, rename, link])
def test_whole_files(merged: Path, damage: Callable[[Path], None], tmp_path: Path) -> None:
    for file in files_of(merged):
        if file.stat().st_size == 0 and damage in (truncate, overwrite):
            continue
        copy = tmp_path / "a" / "out" / merged.name
        shutil.copytree(merged, copy)
        damage(copy / file.relative_to(merged))
        with pytest.raises(MergeError) as caught:
            verify(copy)
        assert file.name in str(caught.value), damage
        shutil.rmtree(tmp_path / "a")


def test_whatever_was_not_written_is_named(merged: Path, tmp_path: Path) -> None:
    def folder(path: Path) -> None:
        path.mkdir()

    def dangling(path: Path) -> None:
        path.symlink_to("nowhere")

    for make in (Path.touch, folder, dangling, os.mkfifo):
        for place in (merged / "more.txt", merged / "tokenizer" / "deep" / "more.txt"):
            make(place)
            try:
                with pytest.raises(MergeError, match=r"extra: (tokenizer/deep/)?more\.txt"):
                    verify(merged)
            finally:
                place.rmdir() if place.is_dir() else place.unlink()
    verify(merged)


def test_all_that_is_wrong_is_named_at_once(merged: Path, tmp_path: Path) -> None:
    copy = tmp_path / merged.name
    shutil.copytree(merged, copy)
    (copy / "tokenizer" / "empty.txt").unlink()
    (copy / "left.pt").touch()
    append(copy / "metadata.json")
    with pytest.raises(MergeError) as caught:
        verify(copy)
    message = str(caught.value)
    assert "changed: metadata.json has" in message
    assert "missing: tokenizer/empty.txt; extra: left.pt" in message


def test_another_merges_provenance_is_noticed(merged: Path, tmp_path: Path) -> None:
    """Whole by itself and with the right files, but the common state tells of another merge."""
    load, path = merged.parents[1] / "run", merged / "wsm_merge.json"
    other = merge(MergeConfig(load=load, save=tmp_path / "out", last=2)).output
    theirs, ours = read_provenance(other), read_provenance(merged)
    assert theirs is not None and ours is not None
    with restored(path):
        path.write_bytes(seal({**theirs, "files": ours["files"]}))
        with pytest.raises(MergeError, match="tell of two merges"):
            verify(merged)
