"""Means over the steps between snapshots, without ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import same_bits
from tests.unit.plugin.test_store import LAYOUT, shards_of
from wsm_megatron.plugin.block_mean import warn_of_lost_points
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.store import DiskStore, MemoryStore, Store
from wsm_megatron.plugin.values import Plain
from wsm_megatron.schedule.block_means import Block
from wsm_megatron.schedule.window import Consumed


@pytest.fixture
def live() -> dict[str, torch.Tensor]:
    """Owned by this rank, in an order in which what is averaged is not in one piece."""
    names = ("main.a", "exp_avg.a", "main.b", "exp_avg.b", "buffer.expert_bias")
    return {name: torch.zeros(size) for name, size in zip(names, (3, 3, 0, 0, 2), strict=True)}


def named(live: dict[str, torch.Tensor]) -> list[Shard]:
    return [
        Shard(
            name=name,
            value=Plain(lambda tensor=tensor: tensor),  # type: ignore[misc]
            device=tensor.device,
            numel=tensor.numel(),
            start=0,
            stop=tensor.numel(),
            is_buffer=name.startswith("buffer."),
        )
        for name, tensor in live.items()
    ]


@pytest.fixture(params=["memory", "disk"])
def store(
    request: pytest.FixtureRequest, live: dict[str, torch.Tensor], tmp_path: Path
) -> Iterator[Store]:
    made: Store = (
        MemoryStore(named(live), 5)
        if request.param == "memory"
        else DiskStore(named(live), tmp_path / "kept", LAYOUT, 5)
    )
    yield made
    made.close()


def put(store: Store, iteration: int) -> BaseException | None:
    return store.put(Consumed(iteration, 10 * iteration, 16)).exception()


def step(
    store: Store,
    live: dict[str, torch.Tensor],
    iteration: int,
    snapshot: bool,
    snapshot_first: bool = True,
) -> Any:
    """One training step, and what is done after it."""
    generator = torch.Generator().manual_seed(iteration)
    for tensor in live.values():
        tensor += torch.randn(tensor.shape, generator=generator)
    if not snapshot_first:
        store.add_step(iteration)
    error = put(store, iteration) if snapshot else None
    store.add_step(iteration)
    return {name: tensor.clone() for name, tensor in live.items()}, error


def mean64(points: list[torch.Tensor]) -> torch.Tensor:
    total = np.zeros(points[0].shape)
    for point in points:
        total = total + point.numpy().astype(np.float64)
    mean = torch.empty(points[0].shape)
    mean.numpy()[:] = (total / len(points)).astype(np.float32)
    return mean


@pytest.mark.parametrize("snapshot_first", [True, False])
def test_the_mean_is_over_each_point_once(
    store: Store, live: dict[str, torch.Tensor], snapshot_first: bool
) -> None:
    points: list[dict[str, torch.Tensor]] = []
    for iteration in range(5, 21, 5):
        point, error = step(store, live, iteration, iteration in (15, 20), snapshot_first)
        assert error is None
        points.append(point)
    assert store.block(15) == Block(every=5, first=5, last=15, points=3)
    assert store.block(20) == Block(every=5, first=20, last=20, points=1)
    for index, name in enumerate(live):
        averaged = not name.startswith("exp_avg")
        expected = mean64([p[name] for p in points[:3]]) if averaged else points[2][name]
        assert same_bits(store.source(15, index), expected), name
        assert same_bits(store.get(15, index), points[2][name]), "the snapshot is there as well"
        assert same_bits(store.source(20, index), points[3][name]), name
    store.drop(15)
    assert store.block(15) is None


def test_bytes_are_those_of_the_snapshot_the_mean_and_the_sum(store: Store) -> None:
    assert store.nbytes == 4 * 8 + 4 * 5 and store.stepping_nbytes == (8 + 4) * 5


def test_a_nan_within_a_block_fails_its_snapshot(
    store: Store, live: dict[str, torch.Tensor]
) -> None:
    store.add_step(5)
    live["main.a"][1] = float("nan")
    store.add_step(10)
    live["main.a"][1] = 1.0
    assert "NaN or Inf in mean.main.a (1 tensors" in str(put(store, 15))
    assert store.block(15) is None
    store.add_step(20)
    assert put(store, 25) is None and store.block(25) == Block(every=5, first=20, last=25, points=2)


def test_a_step_that_cannot_be_read_fails_its_snapshot() -> None:
    gone = [False]

    def read() -> torch.Tensor:
        if gone[0]:
            raise RuntimeError("out of memory")
        return torch.ones(2)

    (shard,) = shards_of(torch.ones(2))
    shard = Shard(name="main.0", value=Plain(read), device=shard.device, numel=2, start=0, stop=2)
    store = MemoryStore([shard], 1)
    gone[0] = True
    store.add_step(1)
    gone[0] = False
    assert "out of memory" in str(put(store, 2))
    gone[0] = True
    assert "out of memory" in str(put(store, 3))
    gone[0] = False
    store.add_step(4)
    assert put(store, 5) is None and store.block(5) == Block(every=1, first=4, last=5, points=2)
    store.close()


def test_float64_sums_hold_what_float32_loses() -> None:
    """Of many small values on a large one naive float32 keeps none, and the mean is the exact one,
    rounded once."""
    value = torch.tensor([2.0**24, -(2.0**24), 1.0])
    store = MemoryStore(shards_of(value), 1)
    naive, exact = torch.zeros(3), [Fraction(0)] * 3
    number = 4097
    for iteration in range(1, number + 1):
        naive += value
        exact = [e + Fraction(float(v)) for e, v in zip(exact, value, strict=True)]
        if iteration < number:
            store.add_step(iteration)
            value.copy_(torch.tensor([1.0, -1.0, 2.0**-24]))
    assert put(store, number) is None
    expected = torch.tensor([float(e / number) for e in exact], dtype=torch.float64).float()
    assert same_bits(store.source(number, 0), expected)
    assert float(naive[0]) == 2.0**24 and not same_bits(naive / number, expected)
    store.close()


def test_means_on_disk_are_found_again(live: dict[str, torch.Tensor], tmp_path: Path) -> None:
    shards = named(live)
    first = DiskStore(shards, tmp_path, LAYOUT, 5)
    for iteration in (5, 10, 15, 20):
        step(first, live, iteration, iteration in (10, 20))
    blocks = {i: Block(every=5, first=i - 5, last=i, points=2) for i in (10, 20)}
    again, other = DiskStore(shards, tmp_path, LAYOUT, 5), DiskStore(shards, tmp_path, LAYOUT, 10)
    without = DiskStore(shards, tmp_path, LAYOUT)
    for store in (again, other):
        assert store.found().blocks == blocks, "a mean is what it is, whatever is asked for now"
        assert same_bits(store.source(20, 0), first.source(20, 0))
        assert not same_bits(store.source(20, 0), store.get(20, 0))
    assert without.found().blocks == {} and len(without.found().checkpoints) == 2
    assert same_bits(without.source(20, 0), first.get(20, 0)), "no means are wanted"
    for store in (first, again, other, without):
        store.close()


def test_snapshots_of_a_run_without_means_have_none(
    live: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    first = DiskStore(named(live), tmp_path, LAYOUT)
    step(first, live, 10, True)
    again = DiskStore(named(live), tmp_path, LAYOUT, 5)
    assert again.found().blocks == {} and again.block(10) is None
    assert same_bits(again.source(10, 0), first.get(10, 0))
    for store in (first, again):
        store.close()


@pytest.mark.parametrize("text", ["{}", "nonsense", json.dumps({"every": 5, "points": 2})])
def test_a_header_that_says_no_block_is_damage(
    live: dict[str, torch.Tensor],
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = DiskStore(named(live), tmp_path, LAYOUT, 5)
    monkeypatch.setattr(Block, "describe", lambda self: None)
    monkeypatch.setattr("wsm_megatron.plugin.store.json.dumps", _instead_of_none(text))
    assert put(store, 10) is None
    monkeypatch.undo()
    assert DiskStore(named(live), tmp_path, LAYOUT, 5).found().checkpoints == ()
    assert "not a file of a snapshot" in caplog.text
    store.close()


def _instead_of_none(text: str) -> Any:
    dumps = json.dumps
    return lambda value: text if value is None else dumps(value)


def test_lost_points_are_named(caplog: pytest.LogCaptureFixture) -> None:
    config = WSMConfig(num=4, average_every=5)
    whole, single = (
        Block(every=5, first=25, last=40, points=4),
        Block(every=5, first=60, last=60, points=1),
    )
    warn_of_lost_points([40, 60, 80], [whole, single, None], 80, config)
    assert len(caplog.messages) == 1 and "of iterations [60, 80] the snapshots are" in caplog.text
    caplog.clear()
    warn_of_lost_points([40], [whole], 47, config)
    assert len(caplog.messages) == 1 and "started from iteration 47" in caplog.text
    caplog.clear()
    warn_of_lost_points([40], [whole], 40, config)
    warn_of_lost_points([], [], 0, config)
    start = WSMConfig(num=4, average_every=5, start_iter=60)
    warn_of_lost_points([60], [single], 60, start)
    assert not caplog.messages, "nothing is lost"
