"""What a rank does: arm after arm until there are none. Several such ranks share a queue."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from examples.wsm_vs_wsd.plan import plan
from examples.wsm_vs_wsd.profile import PROFILES
from examples.wsm_vs_wsd.progress import Progress
from examples.wsm_vs_wsd.queue import Queue


def work(out: Path, profile: str, deadline: float, shows: bool) -> int:
    """Returns how many arms it did. deadline: ``time.time()`` after which none is begun."""
    from examples.wsm_vs_wsd.bench import Bench
    from examples.wsm_vs_wsd.branch import branch, tune
    from examples.wsm_vs_wsd.merges import merges, merges_of_decay
    from examples.wsm_vs_wsd.stable import stable
    from examples.wsm_vs_wsd.theory import theory

    kinds = {one.__name__: one for one in (stable, branch, tune, merges, merges_of_decay, theory)}
    torch.set_num_threads(1)
    sizes = PROFILES[profile]
    bench, queue = Bench(sizes), Queue(out, plan(sizes))
    progress = Progress(queue)
    count = 0
    for arm in queue.take(deadline):
        began = time.monotonic()
        found = kinds[arm.kind](bench, queue, arm, **arm.options)
        seconds = round(time.monotonic() - began, 2)
        queue.finish(arm, {"arm": arm.name, "seed": arm.seed, "seconds": seconds, **found})
        count += 1
        if shows:
            progress.show(arm)
    return count
