"""What merges of block means bring against merges of end points, on the demo's model and text.

    python -m benchmarks.granularity [--steps 1200] [--window 200] [--seeds 1,2]

One run at constant LR a seed, on real megatron-core, two gloo CPU ranks. Over the same last steps
of it, held-out loss (nats a byte, paired batches) of merges of 2, 4, 8 snapshots, of as many block
means of every 5th and of every step, of all snapshots of every 5th step, and of moving averages.
Prints a Markdown table: the loss, and how much lower it is than that of the trained weights.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from typing import Any

from examples.cpu_ranks import run_ranks
from examples.demo.ranks import CONFIG

DECAYS = ("mean", "1-sqrt")
BATCHES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--window", type=int, default=200, help="steps that are merged")
    parser.add_argument("--seeds", default="1,2")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    losses = []
    with tempfile.TemporaryDirectory(prefix="granularity-") as folder:
        for seed in seeds:
            keywords = {"steps": options.steps, "window": options.window, "seed": seed}
            losses.append(run_ranks(measure, 2, folder, timeout=7200, **keywords)[0])
    print("| merged | " + " | ".join(f"seed {seed}" for seed in seeds) + " |")
    print("|---" * (1 + len(seeds)) + "|")
    for name in losses[0]:
        cells = [f"{one[name]:.4f} ({one[name] - one['trained']:+.4f})" for one in losses]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measure(steps: int, window: int, seed: int) -> dict[str, float]:
    """Held-out losses by what was merged; the same on all ranks."""
    from examples.cpu_ranks.training import build, evaluate, train
    from examples.demo.corpus import Windows, load_corpus

    text, held_out = load_corpus()
    training = build(replace(CONFIG, seed=seed))
    data = Windows(held_out, CONFIG.seq_length, seed=2)
    merges = _merges(training, window)

    def step(training: Any) -> None:
        if training.iteration <= steps - window:
            return
        for wsm, every in merges.values():
            if training.iteration % every == 0:
                wsm.snapshot(training.iteration, training.iteration)
            wsm.add_step(training.iteration)

    train(training, steps, Windows(text, CONFIG.seq_length, seed=10 + seed), on_step=step)
    losses = {"trained": evaluate(training, data, BATCHES)}
    for name, (wsm, _) in merges.items():
        with wsm.merged():
            losses[name] = evaluate(training, data, BATCHES)
        wsm.close()
    return {name: loss for name, loss in losses.items() if loss is not None}


def _merges(training: Any, window: int) -> dict[str, tuple[Any, int]]:
    """What is merged, and how often it takes a snapshot, by name."""
    from wsm_megatron import WSM, WSMConfig

    def wsm(**options: Any) -> Any:
        return WSM(training.model, training.optimizer, WSMConfig(**options))

    merges: dict[str, tuple[Any, int]] = {}
    for decay in DECAYS:
        for number in (2, 4, 8):
            every = window // number
            for points, what in ((None, "snapshots"), (5, "means of every 5th"), (1, "means")):
                merge = wsm(num=number, decay=decay, average_every=points)
                merges[f"{number} {what}, {decay}"] = (merge, every)
        merges[f"{window // 5} snapshots, {decay}"] = (wsm(num=window // 5, decay=decay), 5)
    for part in (8, 4, 2):
        merges[f"half-life {window // part}"] = (wsm(half_life=window // part), 1)
    return merges


if __name__ == "__main__":
    from benchmarks import granularity  # under its own name, by which the ranks import it

    granularity.main()
