"""The restricted unpickler of ``.metadata``."""

from __future__ import annotations

import copyreg
import os
import pickle
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path, PosixPath
from typing import Any, cast

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.unit.safe_pickle.test_objects import Call
from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle import metadata_classes
from wsm_megatron.safe_pickle.metadata import load_metadata

RUNS = Path(__file__).parents[2] / "data" / "runs"


def make_metadata(**more: Any) -> Metadata:
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2, 3]), [chunk])
    index = MetadataIndex("weight", [0, 0])
    return Metadata(
        state_dict_metadata={"weight": tensor, "object": BytesStorageMetadata()},
        storage_data={
            index: _StorageInfo("__0_0.distcp", 0, 100),
            MetadataIndex("object"): _StorageInfo("__0_0.distcp", 100, 10),
        },
        **more,
    )


def write(path: Path, data: Any, protocol: int = 4) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol))
    return path


def stand_in(value: Any) -> Any:
    """What stands in for a torch object and all that it holds."""
    if isinstance(value, dict):
        return {stand_in(key): stand_in(held) for key, held in value.items()}
    if isinstance(value, list):
        return [stand_in(held) for held in value]
    made = getattr(metadata_classes, type(value).__name__.lstrip("_"), None)
    if made is None:
        return value
    names = [one.name for one in fields(made) if hasattr(value, one.name)]
    return made(**{name: stand_in(getattr(value, name)) for name in names})


def check_same(loaded: metadata_classes.Metadata, expected: Metadata) -> None:
    assert loaded == stand_in(expected)
    for entry, torchs in zip(
        loaded.state_dict_metadata.values(), expected.state_dict_metadata.values(), strict=True
    ):
        assert type(entry).__name__ == type(torchs).__name__


@pytest.mark.parametrize("run", sorted(p.name for p in RUNS.iterdir()))
def test_every_fixture_reads_as_the_plain_pickle_does(run: str) -> None:
    paths = sorted(RUNS.glob(f"{run}/iter_*/.metadata"))
    assert len(paths) == 4
    for path in paths:
        check_same(load_metadata(path), pickle.loads(path.read_bytes()))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_all_that_dcp_and_megatron_write_is_admitted(tmp_path: Path, protocol: int) -> None:
    expected = make_metadata(
        planner_data={"weight": ("model", 0, "weight")},
        storage_meta=StorageMeta(checkpoint_id=PosixPath("/run/iter_0000002"), save_id="x"),
    )
    reformulated = {"nd_reformulated_orig_global_shape": (2, 3)}
    expected.mcore_data = {"weight": reformulated}  # type: ignore[attr-defined]
    loaded = load_metadata(write(tmp_path / ".metadata", expected, protocol))
    check_same(loaded, expected)
    assert loaded.mcore_data == {"weight": reformulated}


def test_transforms_of_the_storage_are_kept(tmp_path: Path) -> None:
    expected = make_metadata()
    expected.storage_data[MetadataIndex("object")].transform_descriptors = ["zstd"]
    loaded = load_metadata(write(tmp_path / ".metadata", expected))
    assert loaded.storage_data is not None
    assert loaded.storage_data[metadata_classes.MetadataIndex("object")].transform_descriptors == [
        "zstd"
    ]


@pytest.mark.parametrize("name", ["Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"])
def test_no_attribute_of_a_class_is_set(tmp_path: Path, name: str) -> None:
    # BUILD on the class itself, with a state of attributes to set.
    state = b"N}\x8c\x08__hash__Ns\x86b."
    module = b"torch.distributed.checkpoint.metadata"
    attack = b"\x80\x04c" + module + b"\n" + name.encode() + b"\n" + state
    with pytest.raises(MergeError, match="damaged"):
        load_metadata(write(tmp_path / ".metadata", attack))
    hash(metadata_classes.MetadataIndex("weight"))


def test_a_stand_in_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="MetadataIndex stands in for torch's"):
        pickle.dumps(metadata_classes.MetadataIndex("weight"))


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (os.system, ("touch {0}",), "posix.system"),
        (subprocess.Popen, (["touch", "{0}"],), "subprocess.Popen"),
        (eval, ("open('{0}', 'w')",), "builtins.eval"),
        (exec, ("open('{0}', 'w')",), "builtins.exec"),
        (open, ("{0}", "w"), "_?io.open"),
        (getattr, (torch.Size, "numel"), "builtins.getattr"),
        (torch.load, ("{0}",), "torch.serialization.load"),
    ],
)
def test_nothing_is_run(tmp_path: Path, function: Any, args: tuple, named: str) -> None:
    made = tmp_path / "made"
    args = tuple(
        [x.format(made) for x in a] if isinstance(a, list) else
        a.format(made) if isinstance(a, str) else a
        for a in args
    )  # fmt: skip
    attack = make_metadata(planner_data=[Call(function, *args)])
    path = write(tmp_path / ".metadata", attack)
    with pytest.raises(MergeError, match=rf"\.metadata: refers to {named}, .*nothing .* was run"):
        load_metadata(path)
    assert not made.exists()


def test_a_name_reached_through_an_admitted_module_is_refused(tmp_path: Path) -> None:
    # Protocol 4 walks dotted names: torch -> os -> system.
    attack = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R."
    with pytest.raises(MergeError, match=r"refers to torch\.os\.system"):
        load_metadata(write(tmp_path / ".metadata", attack))


@pytest.fixture
def registered_extension() -> Iterator[int]:
    copyreg.add_extension("posix", "system", 200)
    try:
        pickle.loads(b"\x80\x02\x82\xc8.")  # puts os.system into the registry's cache
        yield 200
    finally:
        copyreg.remove_extension("posix", "system", 200)


def test_the_extension_registry_is_no_way_around(tmp_path: Path, registered_extension: int) -> None:
    attack = b"\x80\x02\x82" + bytes([registered_extension]) + b"."
    with pytest.raises(MergeError, match="opcode that no checkpoint needs"):
        load_metadata(write(tmp_path / ".metadata", attack))


def test_an_unregistered_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="opcode that no checkpoint needs"):
        load_metadata(write(tmp_path / ".metadata", b"\x80\x02\x82\xc9."))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = pickle.dumps(make_metadata(), 4)
    for length in range(0, len(whole), 7):
        with pytest.raises(MergeError, match=r"\.metadata: .*(damaged|not checkpoint metadata)"):
            load_metadata(write(tmp_path / ".metadata", whole[:length]))


def test_flipped_bytes_are_read_or_refused_but_never_crash(tmp_path: Path) -> None:
    whole = pickle.dumps(make_metadata(), 4)
    refused = 0
    for position in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[position] ^= 0x15
        try:
            load_metadata(write(tmp_path / ".metadata", bytes(flipped)))
        except MergeError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused > 50


BROKEN: Any = TensorStorageMetadata.__new__(TensorStorageMetadata)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight": 1}, "holds a dict, not checkpoint metadata"),
        (Metadata({"weight": cast(Any, 3)}, storage_data={}), "state_dict_metadata is .*'weight'"),
        (Metadata({"weight": BROKEN}, storage_data={}), "state_dict_metadata is .*'weight'"),
        (Metadata({}), "storage_data is a NoneType"),
        (Metadata({}, storage_data={"a": 1}), "storage_data is damaged at 'a'"),
        (
            Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("x", -1, 5)}),
            "storage_data is damaged at 'a'",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        load_metadata(write(tmp_path / ".metadata", data))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"\.metadata: cannot be read.*No such file"):
        load_metadata(tmp_path / ".metadata")
