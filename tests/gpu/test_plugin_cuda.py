"""Snapshots of shards that live on a GPU: they hold what was there at that time."""

from __future__ import annotations

import pytest
import torch

from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.store import MemoryStore
from wsm_megatron.plugin.values import Plain
from wsm_megatron.schedule.window import Consumed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def shard(name: str, tensor: torch.Tensor, is_buffer: bool = False) -> Shard:
    return Shard(
        name=name,
        value=Plain(lambda: tensor),
        device=tensor.device,
        numel=tensor.numel(),
        start=0,
        stop=tensor.numel(),
        is_buffer=is_buffer,
    )


def test_steps_and_buffer_updates_right_after_a_snapshot_do_not_reach_it() -> None:
    main = torch.nn.Parameter(torch.ones(1 << 26, device="cuda"))
    bias = torch.ones(64, device="cuda")
    optimizer = torch.optim.SGD([main], lr=1.0)
    store = MemoryStore([shard("main.weight", main), shard("buffer.bias", bias, is_buffer=True)])
    store.guard([optimizer])
    store.reserve(2)
    main.grad = torch.ones_like(main)
    copies = []
    for iteration in (1, 2):
        copies.append(store.put(Consumed(iteration, iteration, 1)))
        bias += 1  # in the forward pass
        optimizer.step()
    for iteration in (1, 2):
        assert copies[iteration - 1].exception() is None
        assert (store.get(iteration, 0) == 2 - iteration).all()
        assert (store.get(iteration, 1) == iteration).all()
        assert store.get(iteration, 0).is_pinned()
    store.close()


def test_nan_on_the_device_is_not_kept() -> None:
    main = torch.ones(1 << 20, device="cuda")
    main[12345] = float("nan")
    store = MemoryStore([shard("main.weight", main)])
    assert "NaN or Inf in main.weight" in str(store.put(Consumed(1, 1, 1)).exception())
    store.close()


def test_steps_and_buffer_updates_right_after_a_point_do_not_reach_its_block_mean() -> None:
    main = torch.nn.Parameter(torch.full((1 << 26,), 8.0, device="cuda"))
    bias = torch.zeros(64, device="cuda")
    optimizer = torch.optim.SGD([main], lr=1.0)
    shards = [shard("main.weight", main), shard("buffer.bias", bias, is_buffer=True)]
    store = MemoryStore(shards, every=1)
    store.guard([optimizer])
    store.reserve(1)
    main.grad = torch.ones_like(main)
    for iteration in (1, 2, 3):
        store.add_step(iteration)
        bias += 1  # in the forward pass
        optimizer.step()
    assert store.put(Consumed(4, 4, 1)).exception() is None
    assert (store.get(4, 0) == 5).all() and (store.source(4, 0) == 6.5).all()
    assert (store.get(4, 1) == 3).all() and (store.source(4, 1) == 1.5).all()
    store.close()
