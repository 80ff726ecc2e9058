"""What averages over steps cost inside a run, against the time of a step.

    python -m benchmarks.averages [--hidden 512] [--layers 8] [--nproc 2]

Real megatron-core on gloo CPU ranks, for the distributed and the replicated optimizer: block
means (``average_every``) and a moving average (``half_life``). Prints a Markdown table; times are
the best of several, of the slowest rank:

    step        one training step, without the plugin
    stall       how long training stands still for a point, or a sample, once the one before is
                taken in (the copy; on GPUs only its launch)
    taken in    the same, and until the point is in the sum, or the sample in the average, which
                goes on beside training
    end         block means: what the snapshot that ends the block takes longer, beside training
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

from examples.cpu_ranks import GPTConfig, run_ranks

POINTS, BLOCKS = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--nproc", type=int, default=2)
    options = parser.parse_args()
    print("| average | optimizer | owned by a rank | bytes a snapshot | bytes besides ", end="")
    print("| step | stall | taken in | end |\n|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="averages-") as folder:
        for optimizer in ("distributed", "replicated"):
            config = GPTConfig(
                hidden_size=options.hidden,
                ffn_hidden_size=4 * options.hidden,
                num_layers=options.layers,
                vocab_size=4096,
                seq_length=64,
                optimizer=optimizer,
            )
            for rows in zip(
                *run_ranks(measure, options.nproc, folder, timeout=1800, config=config), strict=True
            ):
                print(_row(optimizer, list(rows)), flush=True)


def measure(config: GPTConfig) -> list[dict[str, Any]]:
    """What one rank sees, in seconds and bytes, of each average."""
    from examples.cpu_ranks.training import build, train

    training = build(config)
    train(training, 2)  # first steps allocate
    step = [_timed(lambda: train(training, 1)) for _ in range(3)]
    return [
        {"average": name, "step": min(step), **measured(training)}
        for name, measured in (("block mean", _block_mean), ("moving average", _moving_average))
    ]


def _block_mean(training: Any) -> dict[str, Any]:
    from wsm_megatron import WSM, WSMConfig

    times: dict[str, list[float]] = {}
    sizes: dict[str, Any] = {}
    for name, every in (("plain", None), ("means", 1)):
        wsm = WSM(training.model, training.optimizer, WSMConfig(num=2, average_every=every))
        wsm.reserve(3)
        iteration, times[name] = 0, []
        for _ in range(BLOCKS):
            for _ in range(POINTS - 1):
                iteration += 1
                times.setdefault("stall", []).append(_timed(lambda: wsm.add_step(iteration)))  # noqa: B023
                wsm._store.finish_steps()
                iteration += 1
                times.setdefault("taken in", []).append(
                    _timed(lambda: (wsm.add_step(iteration), wsm._store.finish_steps()))  # noqa: B023
                )
            iteration += 1
            times[name].append(
                _timed(lambda: (wsm.snapshot(iteration, iteration), wsm.settle()))  # noqa: B023
            )
        if every is None:
            times = {"plain": times["plain"]}
        sizes = _sizes(wsm)
        wsm.close()
    best = {name: min(values) for name, values in times.items()}
    return sizes | best | {"end": max(best["means"] - best["plain"], 0.0)}


def _moving_average(training: Any) -> dict[str, Any]:
    from wsm_megatron import WSM, WSMConfig

    wsm = WSM(training.model, training.optimizer, WSMConfig(half_life=100))
    wsm.reserve(2)
    moving: Any = wsm._moving
    stall, taken_in = [], []
    for iteration in range(1, 2 * BLOCKS * POINTS, 2):
        stall.append(_timed(lambda: wsm.snapshot(iteration, iteration)))  # noqa: B023
        wsm.settle()
        moving._wait()
        taken_in.append(
            _timed(lambda: (wsm.snapshot(iteration + 1, 1), wsm.settle(), moving._wait()))  # noqa: B023
        )
    measured = _sizes(wsm) | {"stall": min(stall), "taken in": min(taken_in)}
    wsm.close()
    return measured


def _sizes(wsm: Any) -> dict[str, Any]:
    return {
        "owned": sum(shard.size for shard in wsm._shards),
        "snapshot": wsm.nbytes,
        "besides": wsm.averaging_nbytes,
    }


def _timed(action: Any) -> float:
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _row(optimizer: str, ranks: list[dict[str, Any]]) -> str:
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    cells = [slowest["average"], optimizer, f"{slowest['owned'] / 1e6:.1f} M"]
    cells += [f"{slowest[name] / 1e6:.1f} MB" for name in ("snapshot", "besides")]
    cells += [f"{1e3 * slowest[name]:.1f} ms" for name in ("step", "stall", "taken in")]
    cells.append(f"{1e3 * slowest['end']:.1f} ms" if "end" in slowest else "")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    from benchmarks import averages  # under its own name, by which the ranks import it

    averages.main()
