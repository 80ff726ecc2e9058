"""``.metadata`` as written, against the classes of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from wsm_megatron.checkpoint.metadata_writer import pickle_metadata, write_metadata
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.writer import Item, Placed
from wsm_megatron.safe_pickle.metadata import load_metadata

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8]


def of_torch(placed: list[Placed]) -> Metadata:
    """The same by torch's own classes."""
    entries: dict[str, Any] = {}
    storage = {}
    for one in placed:
        item = one.item
        if item.region is None:
            entries[item.key] = BytesStorageMetadata()
            index = MetadataIndex(item.key)
        else:
            assert item.dtype is not None
            properties = TensorProperties(item.dtype)
            made = TensorStorageMetadata(properties, torch.Size(item.shape), [])
            offsets, sizes = torch.Size(item.region.offsets), torch.Size(item.region.sizes)
            chunk = ChunkStorageMetadata(offsets, sizes)
            entries.setdefault(item.key, made).chunks.append(chunk)
            index = MetadataIndex(item.key, offsets)
        storage[index] = _StorageInfo(one.file, one.offset, item.stored_bytes)
    found = Metadata(entries, storage_data=storage)
    if hasattr(found, "version"):
        found.version = "1.0.0"
    return found


def chunks(key: str, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> list[Item]:
    """A tensor cut along its first dimension."""
    cut = (count * shape[0], *shape[1:])
    return [
        Item(key, Region((k * shape[0], *[0] * (len(shape) - 1)), shape), dtype, cut)
        for k in range(count)
    ]


names = st.text(min_size=1, max_size=300)
tensors = st.tuples(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple),
    st.integers(1, 5),
)
entries = st.dictionaries(names, st.one_of(tensors, st.integers(0, 2**40)), max_size=8)


@given(entries, st.randoms(use_true_random=False), st.integers(0, 2**50))
def test_torch_reads_what_its_classes_would_have_held(
    entries: dict[str, Any], random: Any, start: int
) -> None:
    items = []
    for key, entry in entries.items():
        items += [Item(key, nbytes=entry)] if isinstance(entry, int) else chunks(key, *entry)
    placed = [Placed(item, f"__{n % 3}_0.distcp", start + n) for n, item in enumerate(items)]
    random.shuffle(placed)
    assert vars(pickle.loads(pickle_metadata(placed, {}))) == vars(of_torch(placed))


def test_megatrons_attribute_is_passed_on(tmp_path: Path) -> None:
    item = Item("weight", Region((0, 0), (2, 3)), torch.bfloat16, (2, 3))
    mcore_data = {"weight": {"nd_reformulated_orig_global_shape": (2, 3)}}
    write_metadata(tmp_path, [Placed(item, "__0_0.distcp", 0)], mcore_data)
    by_torch = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert by_torch.mcore_data == mcore_data
    assert by_torch.state_dict_metadata["weight"].size == torch.Size([2, 3])
    assert load_metadata(tmp_path / ".metadata").mcore_data == mcore_data


def test_a_scalar_and_more_values_than_a_short_memo_holds() -> None:
    scalar = Placed(Item("step", Region((), ()), torch.float32), "__0_0.distcp", 0)
    many = [
        Placed(item, f"__{n}_0.distcp", 10**6 * n)
        for n, item in enumerate(chunks("weight", torch.bfloat16, (7, 5), 700))
    ]
    placed = [scalar, *many]
    assert vars(pickle.loads(pickle_metadata(placed, {}))) == vars(of_torch(placed))


@pytest.mark.parametrize("module", ["wsm_megatron.cli.main", "wsm_megatron.api"])
def test_a_merge_does_not_import_torchs_checkpoint_package(module: str) -> None:
    # It would take half as long as torch itself, on every rank.
    found = "[m for m in sys.modules if m.startswith('torch.distributed.checkpoint')]"
    code = f"import sys, {module}; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
