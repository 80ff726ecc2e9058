"""The bytes of snapshots, without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from wsm_megatron.plugin import store as store_module
from wsm_megatron.plugin.shards import Shard, slice_bounds
from wsm_megatron.plugin.store import DiskStore, Found, MemoryStore, Store
from wsm_megatron.plugin.values import Plain
from wsm_megatron.schedule.window import Consumed

LAYOUT = {"world": 1, "rank": 0}


def shards_of(*tensors: torch.Tensor) -> list[Shard]:
    return [
        Shard(
            name=f"main.{index}",
            value=Plain(lambda tensor=tensor: tensor),  # type: ignore[misc]
            device=tensor.device,
            numel=tensor.numel(),
            start=0,
            stop=tensor.numel(),
        )
        for index, tensor in enumerate(tensors)
    ]


@pytest.fixture
def live() -> list[torch.Tensor]:
    return [torch.arange(6.0).reshape(2, 3), torch.ones(4), torch.empty(0)]


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, live: list[torch.Tensor], tmp_path: Path) -> Any:
    shards = shards_of(*live)
    disk = request.param == "disk"
    made: Store = DiskStore(shards, tmp_path / "kept", LAYOUT) if disk else MemoryStore(shards)
    yield made
    made.close()


def put(store: Store, iteration: int) -> BaseException | None:
    return store.put(Consumed(iteration, 10 * iteration, 16)).exception()


def test_what_is_kept_stays_as_it_was(store: Store, live: list[torch.Tensor]) -> None:
    assert put(store, 1) is None
    live[0] += 1
    assert put(store, 2) is None
    live[0] += 1
    assert torch.equal(store.get(1, 0), torch.arange(6.0))
    assert torch.equal(store.get(2, 0), torch.arange(6.0) + 1)
    assert torch.equal(store.get(2, 1), torch.ones(4)) and store.get(2, 2).numel() == 0
    assert store.nbytes == 40


def test_a_dropped_slot_is_used_again(store: Store, live: list[torch.Tensor]) -> None:
    store.reserve(2)
    for iteration in (1, 2, 3):
        live[1].fill_(iteration)
        assert put(store, iteration) is None
        if iteration == 2:
            store.drop(1)
    assert store.get(2, 1)[0] == 2 and store.get(3, 1)[0] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_not_kept(store: Store, live: list[torch.Tensor], value: float) -> None:
    live[1][2] = value
    assert "NaN or Inf in main.1 (1 tensors" in str(put(store, 1))
    assert store.found() == Found()


def test_a_shard_that_cannot_be_read_fails_its_snapshot(live: list[torch.Tensor]) -> None:
    def missing() -> torch.Tensor:
        raise KeyError("exp_avg")

    moment = Shard(
        name="exp_avg.0", value=Plain(missing), device=torch.device("cpu"), numel=1, start=0, stop=1
    )
    store = MemoryStore([*shards_of(*live), moment])
    assert isinstance(put(store, 1), KeyError)
    store.close()


def test_a_disk_store_is_found_again(live: list[torch.Tensor], tmp_path: Path) -> None:
    first = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    assert put(first, 2) is None and put(first, 1) is None
    again = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    assert again.found() == Found((Consumed(1, 10, 16), Consumed(2, 20, 16)))
    assert torch.equal(again.get(2, 0), torch.arange(6.0))
    for store in (first, again):
        store.close()


def test_files_that_say_less_are_found_too(
    live: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written before the sequence length was kept: how many tokens it was is not known."""
    first = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_COUNTED", ())
        assert put(first, 1) is None
    assert first.found() == Found((Consumed(1, None, None),))
    first.close()


def test_another_layout_does_not_fit(live: list[torch.Tensor], tmp_path: Path) -> None:
    first = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    assert put(first, 1) is None
    other = DiskStore(shards_of(*live), tmp_path, LAYOUT | {"world": 2})
    assert other.found() == Found(misfits=(1,))
    fewer = DiskStore(shards_of(live[0]), tmp_path, LAYOUT)
    assert fewer.found() == Found(misfits=(1,))
    for store in (first, other, fewer):
        store.close()


def test_a_half_written_file_is_no_checkpoint(live: list[torch.Tensor], tmp_path: Path) -> None:
    store = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    half = store.path(3).with_suffix(".unfinished")
    half.parent.mkdir()
    half.write_bytes(b"half")
    again = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    assert again.found() == Found() and not half.exists()
    for one in (store, again):
        one.close()


def test_a_damaged_file_is_left_out(
    live: list[torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    assert put(store, 3) is None
    whole = store.path(3).read_bytes()
    for damaged in (whole[:50], whole.replace(b'layout":"{', b'layout":"?')):
        caplog.clear()
        store.path(3).write_bytes(damaged)
        assert store.found() == Found() and "not a file of a snapshot" in caplog.text
    store.close()


def test_a_full_disk_leaves_nothing(
    live: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"some bytes, and then")
        raise OSError(28, "No space left on device")

    store = DiskStore(shards_of(*live), tmp_path, LAYOUT)
    monkeypatch.setattr(store_module, "save_file", full)
    assert "No space left" in str(put(store, 1))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [] and store.found() == Found()
    store.drop(1)
    assert list(tmp_path.iterdir()) == []
    store.close()


def test_one_rank_alone_owns_everything() -> None:
    assert slice_bounds(7, None) == (0, 7)
