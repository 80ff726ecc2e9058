"""What a dry run says of windows: by known bytes and rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsm_megatron.plugin import dry_run, room
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.dry_run import Rank, lines
from wsm_megatron.plugin.room import Room

GB = 10**9
HOST = Room(ranks=2, snapshot=8 * GB, aside=12 * GB, memory=60 * GB, disk=None)
RANK = Rank(HOST, nbytes=4 * GB, aside=6 * GB, copied=2.0 * GB, summed=8.0 * GB)
"""Room for 6 snapshots of 8 GB: a window of 5, and one being copied."""


def said(config: WSMConfig, *ranks: Rank, tokens: int | None = 100_000_000) -> str:
    return "\n".join(lines(ranks or (RANK, RANK), config, 10, tokens))


def test_a_window_in_tokens_covers_what_its_snapshots_do() -> None:
    """Of 2.5B tokens at 1B between snapshots: three of them, 2B."""
    text = said(WSMConfig(window_tokens=(2_500_000_000, 10**10), eval=True))
    assert "one every 10 iterations, 1,000,000,000 tokens" in text
    assert "--wsm-merge-window-tokens 2500000000: 3 snapshots over 20 iterations, 2,000,000" in text
    assert "32.000 GB a host, with one being copied, fits; a merge takes about 7.5 s" in text
    assert "10000000000: 11 snapshots over 100 iterations, 10,000,000,000 tokens: 96.000 GB" in text
    assert "does not fit" in text


def test_bytes_free_space_and_the_largest_window() -> None:
    text = said(WSMConfig(num=5))
    assert "a snapshot takes 4.000 GB a rank, 8.000 GB for the 2 ranks of a host" in text
    assert "about 2 s to copy" in text
    assert "free are 60.000 GB of host memory; a merge puts 12.000 GB aside" in text
    assert "largest window that fits: 5 snapshots over 40 iterations, 4,000,000,000 tokens" in text
    assert "--wsm-merge-num 5: 5 snapshots over 40 iterations" in text and "fits" in text


def test_every_evaluation_makes_every_merge() -> None:
    """(4 n / 8 + 2 x 6 / 2) s for n = 2 and 4, two decays of each."""
    text = said(WSMConfig(num=(2, 4), decay=("mean", "ema"), eval=True))
    assert "with every evaluation 4 more, and about 30 s" in text


def test_the_tightest_host_counts() -> None:
    small = replace(RANK, room=replace(HOST, memory=40 * GB))
    text = said(WSMConfig(num=3), RANK, small)
    assert "largest window that fits: 2 snapshots" in text and "does not fit" in text
    none = replace(RANK, room=replace(HOST, memory=HOST.aside))
    assert "no window fits" in said(WSMConfig(num=3), none)


def test_a_window_on_disk() -> None:
    disk = replace(RANK, room=replace(HOST, disk=80 * GB), written=1.0 * GB, read=4.0 * GB)
    text = said(WSMConfig(num=9, store="disk"), disk)
    assert "4 s to write in the background" in text and "80.000 GB on the disk" in text
    assert "largest window that fits: 9 snapshots" in text
    assert "a merge takes about 19.5 s" in text, "9 GB x 4 read and summed, 12 GB moved"


def test_a_run_that_does_not_say_its_tokens() -> None:
    text = said(WSMConfig(window_iters=40), tokens=None)
    assert "5 snapshots over 40 iterations: " in text and "tokens" not in text


@pytest.mark.parametrize("stored", [True, False])
def test_the_largest_window_is_the_largest_that_fits(stored: bool) -> None:
    for memory in range(0, 100, 3):
        disk = 3 * memory * GB if stored else None
        one = replace(HOST, memory=memory * GB, disk=disk)
        fitting = [number for number in range(60) if one.fits(number)]
        assert max(one.most, 0) == max(fitting, default=0)


def test_measuring_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda folder: GB)
    wsm: Any = SimpleNamespace(nbytes=4096, swap_nbytes=8192, averaging_nbytes=0)
    rank = Rank.measured(wsm, torch.device("cpu"), tmp_path / "not" / "yet")
    assert min(rank.copied, rank.summed, rank.written or 0, rank.read or 0) > 0
    assert list(tmp_path.iterdir()) == []
    assert Rank.measured(wsm, torch.device("cpu"), None).written is None
    assert dry_run.lines([rank], WSMConfig(num=2), 1, None)
