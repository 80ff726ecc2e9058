"""What the mean of a window gives up: the progress that the run made within it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.results import Results
from examples.wsm_vs_wsd.statistics import interval
from examples.wsm_vs_wsd.tables import Table, _table, shown


def progress_given_up(r: Results) -> Table:
    p = r.profile
    rows = []
    for run in ("main", "low"):
        stable = names.stable(run, p.steps)
        for window in p.durations:
            merge = names.merged(run, "mean", window, p.interval, p.steps)
            ours, base = r.values(merge), r.values(stable)
            behind = given_up(r, run, window)
            seeds = sorted(ours.keys() & base.keys() & behind.keys())
            if not seeds:
                continue
            gain = {s: base[s] - ours[s] for s in seeds}
            rows.append((
                run, str(window), shown(interval([gain[s] for s in seeds])),
                shown(interval([behind[s] for s in seeds])),
                shown(interval([gain[s] + behind[s] for s in seeds])),
                shown(r.difference(stable, names.decay(run, "linear", window))),
            ))  # fmt: skip
    return _table(r, "What the mean of a window gains, and what it gives up",
                  ("run", "window", "gain of the mean", "progress given up",
                   "noise averaged: the sum", "gain of the linear decay"), rows,
                  "Progress given up: how much higher the constant LR's validation loss was on"
                  " average at the points of the window than at its end. The LR is the same"
                  " throughout, so that this difference holds no noise.")  # fmt: skip


def given_up(r: Results, run: str, window: int) -> dict[int, float]:
    """By seed, nats a byte: from the loss curve of the constant LR, linear between its points."""
    p, found = r.profile, {}
    for seed, arm in r.arms(run).items():
        curve = {int(step): loss for step, loss in arm["curve"].items()}
        points = range(p.steps - window, p.steps + 1, p.interval)
        if points[0] >= min(curve) and max(curve) == p.steps:
            mean = sum(loss_at(curve, step) for step in points) / len(points)
            found[seed] = mean - curve[p.steps]
    return found


def loss_at(curve: Mapping[int, float], step: int) -> float:
    steps = sorted(curve)
    right = bisect_left(steps, step)
    if steps[right] == step:
        return curve[step]
    a, b = steps[right - 1], steps[right]
    return curve[a] + (curve[b] - curve[a]) * (step - a) / (b - a)
