"""How far a merge is from the decay that it stands for; and what the path says of its gain.

Theorem 3.1 makes a merge training with decayed updates along the same path. A real decay takes
another path, since its gradients are taken elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch

from examples.wsm_vs_wsd.bench import Bench
from examples.wsm_vs_wsd.names import DECAYS
from examples.wsm_vs_wsd.plan import Arm
from examples.wsm_vs_wsd.points import Points
from examples.wsm_vs_wsd.queue import Queue
from wsm_megatron.schedule.decay import coefficients
from wsm_megatron.trajectory.geometry import Geometry
from wsm_megatron.trajectory.gram import GramSums
from wsm_megatron.trajectory.variance import update_variance


def theory(
    bench: Bench, queue: Queue, arm: Arm, *, run: str, decays: dict[str, str]
) -> dict[str, Any]:
    """decays: arms of decays by ``STYLE WINDOW``."""
    profile = bench.profile
    points = Points.load(queue.state(f"s{arm.seed}-{run}") / "points.pt")
    distances = []
    for what, decayed in decays.items():
        style, window = what.split()[0], int(what.split()[1])
        end = Points.load(queue.state(decayed) / "points.pt").at(profile.steps)
        merged = points.merged(style, window, profile.interval, profile.steps)
        start = points.at(profile.steps - window)
        found = _distance(start, points.at(profile.steps), merged, end)
        distances.append({"run": run, "style": style, "window": window, **found})
    variances = [
        one for window in profile.durations for one in _variance(points, run, window, bench)
    ]
    return {"rows": [], "distances": distances, "variances": variances}


def _distance(
    start: torch.Tensor, stable: torch.Tensor, merged: torch.Tensor, decayed: torch.Tensor
) -> dict[str, float]:
    """Euclidean, of all weights. ``ratio`` is 0 where the emulation is exact and 1 where the merge
    is as far from the decayed weights as the undecayed run's are."""
    start, stable, merged, decayed = (one.double() for one in (start, stable, merged, decayed))
    a, b = merged - start, decayed - start
    return {
        "merge_to_decay": (merged - decayed).norm().item(),
        "stable_to_decay": (stable - decayed).norm().item(),
        "start_to_decay": b.norm().item(),
        "start_to_merge": a.norm().item(),
        "ratio": ((merged - decayed).norm() / (stable - decayed).norm()).item(),
        "cosine": (torch.dot(a, b) / (a.norm() * b.norm())).item(),
    }


def _variance(points: Points, run: str, window: int, bench: Bench) -> list[dict[str, Any]]:
    """What the updates of a window are made of, and how much of it each decay averages away."""
    steps = points.window(window, bench.profile.interval, bench.profile.steps)
    sums = GramSums(len(steps))
    sums.add(("model", "all"), [points.at(step) for step in steps])
    (gram,) = sums.sums().values()
    geometry = Geometry(gram)
    found = update_variance(geometry.updates, steps)
    drift, walk, jitter = found.shares
    common: dict[str, Any] = {
        "run": run,
        "window": window,
        "intervals": len(steps) - 1,
        "update": found.mean,
    }
    common |= {"drift": drift, "walk": walk, "jitter": jitter}
    return [
        {
            **common,
            "decay": decay,
            "averaged_away": found.averaged_away(c),
            "progress_kept": found.progress_kept(c),
            "moved": float(geometry.to_merge(c)[-1]),
        }
        for decay in DECAYS
        for c in [coefficients(steps, decay)]
    ]
