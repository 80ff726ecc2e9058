"""What a snapshot and a merge in training cost, against the time of a step.

    python -m benchmarks.plugin_overhead [--hidden 512] [--layers 8] [--num 8] [--nproc 2]

Real megatron-core on gloo CPU ranks, for the distributed and the replicated optimizer, with
snapshots in memory and on disk. Prints a Markdown table; times are the best of several, of the
slowest rank:

    step        one training step, without the plugin
    snapshot    how long training stands still for a snapshot (the copy; on GPUs only its launch)
    settle      how long a merge right after it would wait until the snapshot counts
    merge       putting merged weights in place: stash, weighted sum, param all-gather
    restore     putting the run's own weights back
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from examples.cpu_ranks import GPTConfig, run_ranks

STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--num", type=int, default=8, help="snapshots in a merge")
    parser.add_argument("--nproc", type=int, default=2)
    options = parser.parse_args()
    print("| optimizer | store | params a rank | bytes a snapshot and rank ", end="")
    print("| step | snapshot | settle | merge | restore |\n|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="plugin-overhead-") as folder:
        for optimizer in ("distributed", "replicated"):
            config = GPTConfig(
                hidden_size=options.hidden,
                ffn_hidden_size=4 * options.hidden,
                num_layers=options.layers,
                vocab_size=4096,
                seq_length=64,
                optimizer=optimizer,
            )
            for store in ("memory", "disk"):
                ranks = run_ranks(
                    measure,
                    options.nproc,
                    folder,
                    timeout=1800,
                    config=config,
                    store=store,
                    num=options.num,
                    root=Path(folder) / f"{optimizer}-{store}",
                )
                print(_row(optimizer, store, ranks), flush=True)


def measure(config: GPTConfig, store: str, num: int, root: Path) -> dict[str, Any]:
    """What one rank sees, in seconds and bytes."""
    import torch.distributed as dist

    from examples.cpu_ranks.training import build, train
    from wsm_megatron import WSM, WSMConfig

    def timed(action: Any) -> float:
        dist.barrier()
        began = time.perf_counter()
        action()
        return time.perf_counter() - began

    training = build(config)
    train(training, 2)  # first steps allocate
    times: dict[str, list[float]] = {"snapshot": [], "settle": [], "merge": [], "restore": []}
    times["step"] = [timed(lambda: train(training, 1)) for _ in range(STEPS)]
    folder = root if store == "disk" else None
    wsm = WSM(training.model, training.optimizer, WSMConfig(num=num, store=store), folder)
    if store == "memory":
        wsm.reserve(num + 1)
    for iteration in range(1, num + 1):
        times["snapshot"].append(timed(lambda: wsm.snapshot(iteration, iteration)))  # noqa: B023
        times["settle"].append(timed(wsm.settle))
    for _ in range(STEPS):
        context = wsm.merged()
        times["merge"].append(timed(context.__enter__))
        times["restore"].append(timed(lambda: context.__exit__(None, None, None)))  # noqa: B023
    wsm.close()
    return {
        "params": sum(p.numel() for p in training.model[0].parameters()),
        "bytes": wsm.nbytes,
        **{name: min(values) for name, values in times.items()},
    }


def _row(optimizer: str, store: str, ranks: list[dict[str, Any]]) -> str:
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    cells = [
        optimizer,
        store,
        f"{slowest['params'] / 1e6:.1f} M",
        f"{slowest['bytes'] / 1e6:.1f} MB",
    ]
    names = ("step", "snapshot", "settle", "merge", "restore")
    cells += [f"{1e3 * slowest[name]:.1f} ms" for name in names]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    from benchmarks import plugin_overhead  # under its own name, by which the ranks import it

    plugin_overhead.main()
