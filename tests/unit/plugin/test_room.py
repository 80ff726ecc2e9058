"""What is refused at start-up because it does not fit the host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsm_megatron.plugin import room
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.swap import swap_nbytes
from wsm_megatron.plugin.values import Plain

GB = 10**9


@pytest.fixture
def wsm() -> Any:
    """4 GB a snapshot, 4 GB put aside and 2 GB of averages on each of the host's two ranks."""
    reserved: list[int] = []
    return SimpleNamespace(
        nbytes=4 * GB,
        swap_nbytes=4 * GB,
        averaging_nbytes=2 * GB,
        reserve=reserved.append,
        reserved=reserved,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes free in host memory and on disk."""
    free = {"memory": 0, "disk": 0}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(room, "free_bytes", lambda folder: free["disk" if folder else "memory"])
    return free


def test_a_window_in_memory_leaves_room_for_what_a_merge_puts_aside(
    wsm: Any, free: dict[str, int]
) -> None:
    free["memory"] = 2 * (4 * 4 + 6) * GB
    room.reserve_room(wsm, 3, None)
    assert wsm.reserved == [4]
    free["memory"] -= 1
    with pytest.raises(ValueError, match="a window of 3 snapshots needs 32.000 GB.* 12.000 GB"):
        room.reserve_room(wsm, 3, None)


def test_a_window_on_disk_needs_memory_as_well(
    wsm: Any, free: dict[str, int], tmp_path: Path
) -> None:
    free |= {"memory": 2 * (4 + 6) * GB, "disk": 2 * 4 * 4 * GB}
    room.reserve_room(wsm, 3, tmp_path)
    assert wsm.reserved == [1]
    free["memory"] -= 1
    with pytest.raises(ValueError, match="a snapshot needs 8.000 GB.* 12.000 GB.* of host memory"):
        room.reserve_room(wsm, 3, tmp_path)
    free |= {"memory": 99 * GB, "disk": free["disk"] - 1}
    with pytest.raises(ValueError, match="needs 32.000 GB.*on the file system.*larger"):
        room.reserve_room(wsm, 3, tmp_path)


def test_what_is_put_aside_is_all_that_is_overwritten() -> None:
    """Model weights whole on every rank, main params, and a merged shard on its way."""
    model = torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    main = torch.zeros(32)

    def shard(start: int, stop: int) -> Shard:
        return Shard(
            name="main.weight",
            value=Plain(lambda: main),
            device=main.device,
            numel=32,
            start=start,
            stop=stop,
        )

    assert swap_nbytes([model], [shard(0, 32)]) == 32 * 2 + 32 * 4 + 32 * 4
    assert swap_nbytes([model], [shard(0, 16)]) == 32 * 2 + 32 * 4 + 16 * 4


def test_free_bytes_looks_at_the_nearest_folder(tmp_path: Path) -> None:
    assert room.free_bytes(tmp_path / "not" / "yet") > 0 and room.free_bytes(None) > 0
