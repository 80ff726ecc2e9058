"""A moving average of live tensors, without ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.reference import same_bits
from tests.unit.plugin.test_store import shards_of
from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.moving_average import MovingAverage
from wsm_megatron.plugin.store import MemoryStore
from wsm_megatron.schedule.half_life import Averaged, HalfLife
from wsm_megatron.schedule.window import Consumed

HALF_LIFE = HalfLife(length=7, unit="iterations")


@pytest.fixture
def live() -> list[torch.Tensor]:
    return [torch.zeros(2, 3), torch.zeros(0), torch.zeros(4)]


@pytest.fixture
def average(live: list[torch.Tensor]) -> Iterator[MovingAverage]:
    yield from _average(live)


def _average(live: list[torch.Tensor]) -> Iterator[MovingAverage]:
    shards = shards_of(*live)
    store = MemoryStore(shards)
    store.reserve(2)
    yield MovingAverage(HALF_LIFE, shards, store)
    assert len(store._slots) <= 1 and len(store._free) >= 1, "two of them do for all samples"
    store.close()


class Reference:
    """The same in numpy: each operation rounded in float64."""

    def __init__(self) -> None:
        self.value, self.weight, self.last = np.zeros(10), np.float64(0), 0

    def take(self, iteration: int, live: list[torch.Tensor]) -> None:
        sample = torch.cat([t.view(-1) for t in live]).numpy().astype(np.float64)
        kept = np.float64(2.0) ** np.float64((self.last - iteration) / HALF_LIFE.length)
        self.weight = kept * self.weight + np.float64(1)
        self.value = self.value + (sample - self.value) / self.weight
        self.last = iteration

    def check(self, average: MovingAverage) -> None:
        actual = torch.cat([average.source(self.last, index) for index in range(3)])
        assert same_bits(actual, torch.from_numpy(self.value.astype(np.float32)))


def move(live: list[torch.Tensor], iteration: int) -> None:
    generator = torch.Generator().manual_seed(iteration)
    for tensor in live:
        tensor += torch.randn(tensor.shape, generator=generator)


def take(average: MovingAverage, iteration: int) -> None:
    average.settle()
    average.take(Consumed(iteration, 8 * iteration, 16, 0))


def test_the_average_is_the_reference_s(average: MovingAverage, live: list[torch.Tensor]) -> None:
    reference = Reference()
    assert average.coefficients() is None and average.kept == ()
    for iteration in (2, 4, 6, 7, 20, 22):
        move(live, iteration)
        take(average, iteration)
        reference.take(iteration, live)
        assert iteration in average
        average.settle()
        assert iteration in average and iteration - 1 not in average
        reference.check(average)
    merge = average.coefficients()
    assert merge is not None and merge.iterations == (22,) and merge.coefficients == (1.0,)


def test_small_changes_are_not_lost(average: MovingAverage, live: list[torch.Tensor]) -> None:
    """An eighth of a unit in the last place, again and again: float32 would stand still."""
    reference, naive = Reference(), torch.ones(())
    live[0].fill_(1.0)
    for iteration in range(1, 80):
        if iteration == 20:
            live[0].fill_(1.0 + 2.0**-23)
        take(average, iteration)
        reference.take(iteration, live)
        naive += (live[0][0, 0] - naive) / torch.tensor(float(reference.weight))
    average.settle()
    reference.check(average)
    assert float(average.source(79, 0)[0]) == 1.0 + 2.0**-23 and float(naive) == 1.0


def test_a_sample_with_a_nan_is_left_out(
    average: MovingAverage, live: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    reference = Reference()
    for iteration in (1, 2, 3):
        move(live, iteration)
        spoilt = live[2].clone()
        if iteration == 2:
            live[2][1] = float("nan")
        else:
            reference.take(iteration, live)
        take(average, iteration)
        average.settle()
        live[2].copy_(spoilt)
        reference.check(average)
    assert caplog.messages == [
        "wsm: moving average without iteration 2: rank 0: MergeError: NaN or Inf in main.2 "
        "(1 tensors of this rank)"
    ]


def test_it_goes_on_from_what_was_written(average: MovingAverage, live: list[torch.Tensor]) -> None:
    """A run that goes on, and one that loads what was written, agree in every bit."""
    for iteration in (1, 2, 3):
        move(live, iteration)
        take(average, iteration)
    average.settle()
    written = [average.source(3, index).clone() for index in range(3)]
    described = average.describe(3)["moving_average"]
    average.go_on_from_float32()
    trained = [tensor.clone() for tensor in live]

    other = _average(live)
    again = next(other)
    for tensor, merged in zip(live, written, strict=True):
        tensor.view(-1).copy_(merged)
    again.restore(Averaged.read(described))
    for tensor, before in zip(live, trained, strict=True):
        tensor.copy_(before)
    move(live, 5)
    for one in (average, again):
        take(one, 5)
        one.settle()
    for index in range(3):
        assert same_bits(average.source(5, index), again.source(5, index))
    assert again.kept == average.kept
    other.close()


def test_another_half_life_is_not_gone_on_from(average: MovingAverage) -> None:
    take(average, 1)
    average.settle()
    state = average._state
    assert state is not None
    longer = MovingAverage(HalfLife(length=8, unit="iterations"), [], MemoryStore([]))
    with pytest.raises(UsageError, match="length=7.*cannot go on as one of.*length=8"):
        longer.restore(state)
