"""Arms that merge points of a run in memory and evaluate the merges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.bench import Bench
from examples.wsm_vs_wsd.plan import Arm
from examples.wsm_vs_wsd.points import Points
from examples.wsm_vs_wsd.profile import Profile
from examples.wsm_vs_wsd.queue import Queue

_Named = Iterator[tuple[str, torch.Tensor]]


def merges(
    bench: Bench,
    queue: Queue,
    arm: Arm,
    *,
    run: str,
    lr: float,
    end: int,
    experts: bool = False,
    everything: bool = False,
) -> dict[str, Any]:
    """Every decay over every window; with ``everything`` also block means, other intervals, more
    windows, and windows that end early."""
    profile = bench.profile
    points = Points.load(queue.state(f"s{arm.seed}-{run}") / "points.pt")
    found = dict(_windows(profile, points, run, end))
    if everything:
        for more in (_blocks, _durations, _intervals, _early):
            found |= more(profile, points, run, end)
    config = profile.config(arm.seed, lr, experts)
    rows = [{"name": name, **bench.losses_of(config, one)} for name, one in found.items()]
    return {"rows": rows}


def _windows(p: Profile, points: Points, run: str, end: int) -> _Named:
    for window in p.windows:
        if 2 * window <= end:  # not from the very start
            for decay in names.DECAYS:
                name = names.merged(run, decay, window, p.interval, end)
                yield name, points.merged(decay, window, p.interval, end)


def _blocks(p: Profile, points: Points, run: str, end: int) -> _Named:
    for window in p.windows:
        for decay in names.DECAYS:
            name = names.blocks(run, decay, window, p.interval, end)
            yield name, points.merged_blocks(decay, window, p.interval, end)


def _durations(p: Profile, points: Points, run: str, end: int) -> _Named:
    for window in p.durations:
        for decay in ("mean", "ema"):
            name = names.merged(run, decay, window, p.interval, end)
            yield name, points.merged(decay, window, p.interval, end)


def _intervals(p: Profile, points: Points, run: str, end: int) -> _Named:
    for window in p.windows[1:]:
        for interval in p.intervals(window):
            for decay in ("mean", "ema"):
                name = names.merged(run, decay, window, interval, end)
                yield name, points.merged(decay, window, interval, end)


def _early(p: Profile, points: Points, run: str, end: int) -> _Named:
    for early in p.early_ends:
        yield names.stable(run, early), points.at(early)
        name = names.merged(run, "mean", p.middle, p.interval, early)
        yield name, points.merged("mean", p.middle, p.interval, early)


def merges_of_decay(
    bench: Bench, queue: Queue, arm: Arm, *, decay: str, lr: float, window: int
) -> dict[str, Any]:
    """Merging after decay: of the second half of a decay, and of all of it."""
    profile = bench.profile
    points = Points.load(queue.state(decay) / "points.pt")
    config, rows = profile.config(arm.seed, lr), []
    for length in (window // 2, window):
        for how in ("mean", "ema"):
            name = f"main: decay linear {window}, then merge {how} of {length}"
            merged = points.merged(how, length, profile.interval, profile.steps)
            rows.append({"name": name, **bench.losses_of(config, merged)})
    return {"rows": rows}
