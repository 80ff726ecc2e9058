"""The window after a restart, with a store that holds no bytes and loads that load nothing."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.refill import Refill, leads_to
from wsm_megatron.plugin.snapshots import Snapshots
from wsm_megatron.plugin.store import Found
from wsm_megatron.schedule.window import Consumed


class Disk:
    """What a store holds, by iteration: found there, or copied from the live shards."""

    def __init__(self, *found: Consumed, misfits: tuple[int, ...] = ()) -> None:
        self.held = dict.fromkeys([c.iteration for c in found], "found")
        self._found = Found(found, misfits)

    def found(self) -> Found:
        return self._found

    def put(self, checkpoint: Consumed) -> Future[None]:
        self.held[checkpoint.iteration] = "copied"
        copy: Future[None] = Future()
        copy.set_result(None)
        return copy

    def drop(self, iteration: int) -> None:
        self.held.pop(iteration, None)


def refilled(
    disk: Disk,
    at: int,
    available: tuple[int, ...] = (),
    began: dict[int, int] | None = None,
    num: int = 3,
) -> tuple[list[int], list[int]]:
    """The window after a restart, and what was loaded for it.

    Args:
        began: where the job had started that saved a checkpoint; from 0 if not said.
    """
    loads: list[int] = []

    def consumed_at(iteration: int) -> Consumed:
        return Consumed(iteration, 10 * iteration, 16, (began or {}).get(iteration, 0))

    def load(iteration: int) -> Consumed:
        loads.append(iteration)
        return consumed_at(iteration)

    snapshots = Snapshots(WSMConfig(num=num), disk)  # type: ignore[arg-type]
    Refill(
        snapshots=snapshots,
        store=disk,  # type: ignore[arg-type]
        shards=[],  # of none there is anything that could differ
        start=consumed_at(at),
        available=available,
        load=load if available else None,
    ).run()
    window = [c.iteration for c in snapshots.kept]
    assert sorted(disk.held) == window, "what the store holds is the window"
    return window, loads


def on_disk(iteration: int, began: int = 0) -> Consumed:
    return Consumed(iteration, 10 * iteration, 16, began)


def test_what_is_on_disk_is_taken_over() -> None:
    disk = Disk(on_disk(2), on_disk(4), on_disk(6), on_disk(8))
    assert refilled(disk, at=6) == ([2, 4, 6], [])
    assert set(disk.held.values()) == {"found"}


def test_what_lies_beyond_the_window_is_deleted() -> None:
    assert refilled(Disk(on_disk(2), on_disk(4), on_disk(6)), at=6, num=2) == ([4, 6], [])


def test_what_is_of_a_branch_that_was_given_up_is_deleted() -> None:
    disk = Disk(on_disk(2), on_disk(4, began=0), on_disk(6, began=2))
    assert refilled(disk, at=6, began={6: 2}) == ([2, 6], [])


def test_gaps_are_filled_from_checkpoints() -> None:
    disk = Disk(on_disk(2), on_disk(6))
    assert refilled(disk, at=6, available=(2, 4, 6)) == ([2, 4, 6], [4, 6])
    assert disk.held == {2: "found", 4: "copied", 6: "found"}


def test_without_a_store_everything_is_loaded_and_the_start_last() -> None:
    assert refilled(Disk(), at=8, available=(2, 4, 6, 8)) == ([4, 6, 8], [6, 4, 8])


def test_what_is_of_a_branch_that_was_given_up_is_filled_from_the_branch_that_was_not() -> None:
    """On disk 4 is of the job from 0, the checkpoint of 4 is of the one from 2."""
    disk = Disk(on_disk(2), on_disk(4, began=0), on_disk(6, began=2))
    began = {4: 2, 6: 2}
    assert refilled(disk, at=6, available=(2, 4, 6), began=began) == ([2, 4, 6], [4, 6])
    assert disk.held == {2: "found", 4: "copied", 6: "found"}


def test_a_start_that_is_on_disk_from_another_job_is_copied_again() -> None:
    disk = Disk(on_disk(4, began=0), on_disk(6, began=0))
    assert refilled(disk, at=6, available=(6,), began={6: 4}) == ([4, 6], [])
    assert disk.held == {4: "found", 6: "copied"}


def test_another_layout_is_refused_only_where_the_window_reaches() -> None:
    with pytest.raises(ValueError, match=r"\[4\] were taken under another parallel layout"):
        refilled(Disk(on_disk(6), misfits=(4,)), at=6)
    full = Disk(on_disk(4), on_disk(6), misfits=(2,))
    assert refilled(full, at=6, num=2) == ([4, 6], [])


def test_what_leads_to_a_later_checkpoint() -> None:
    """Started from 4, after a branch from 0 had gone on to 8."""
    later = Consumed(12, 120, 16, 4)
    assert leads_to(Consumed(8, 80, 16, 4), later)
    assert not leads_to(Consumed(8, 80, 16, 0), later)
    assert not leads_to(Consumed(8, 80, 16, 6), later)
    assert leads_to(Consumed(4, 40, 16, 0), later) and leads_to(Consumed(2, 20, 16, 0), later)
    assert leads_to(Consumed(8, 80, 16), later) and leads_to(later, Consumed(16, 160, 16))
