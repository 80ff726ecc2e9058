"""Planning a merge of a very large MoE layout, from synthetic metadata: seconds a phase.

    python benchmarks/planning.py [--chunks 100000] [--sources 8] [--ranks 64]

No tensor exists: the layout of a model of about 10^12 parameters (stacked layers and experts, TP
shards) is written as ``.metadata``, read back, planned, shared out and placed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wsm_megatron import MergeConfig
from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.layout import Layout, read_layout
from wsm_megatron.checkpoint.unpickle import load_metadata
from wsm_megatron.checkpoint.writer import Item, file_name, place, write_marker, write_metadata
from wsm_megatron.engine.job import chunks_of
from wsm_megatron.engine.plan import make_plan

LAYERS, HIDDEN, INNER, TP = 64, 8192, 2048, 2
FILES = 512


def items(chunks: int) -> list[Item]:
    """``chunks`` chunks of expert weights: layer, expert and TP shard."""
    experts = max(1, chunks // (LAYERS * TP * 2))
    prefix = "decoder.layers.mlp.experts.experts."
    found = []
    for name, rows, columns, axis in (
        ("linear_fc1", 2 * INNER, HIDDEN, 2),
        ("linear_fc2", HIDDEN, INNER, 3),
    ):
        shape = (LAYERS, experts, rows, columns)
        sizes = [1, 1, rows, columns]
        sizes[axis] //= TP
        for layer in range(LAYERS):
            for expert in range(experts):
                for shard in range(TP):
                    offsets = [layer, expert, 0, 0]
                    offsets[axis] = shard * sizes[axis]
                    box = Box(tuple(offsets), tuple(sizes))
                    found.append(Item(f"{prefix}{name}.weight", box, torch.bfloat16, shape))
    return found


def write(path: Path, wanted: list[Item]) -> None:
    path.mkdir()
    per_file = -(-len(wanted) // FILES)
    placed = []
    for rank in range(FILES):
        mine = place(wanted[rank * per_file : (rank + 1) * per_file], rank)
        placed += mine
        end = mine[-1].offset + mine[-1].item.stored_bytes if mine else 0
        with (path / file_name(rank)).open("wb") as stream:
            stream.truncate(end)  # sparse: the size that the metadata needs, no bytes
    write_metadata(path, placed, {})
    write_marker(path, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})


def timed(what: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = call()
    print(f"{what:58} {time.perf_counter() - start:8.2f} s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=64)
    given = parser.parse_args()
    wanted = items(given.chunks)
    numel = sum(item.box.numel for item in wanted if item.box)
    print(f"{len(wanted)} chunks, {numel / 1e12:.2f} T parameters, {given.sources} sources")
    with tempfile.TemporaryDirectory(prefix="wsm-planning-") as folder:
        path = Path(folder) / "iter_0000001"
        timed("write .metadata", lambda: write(path, wanted))
        timed("unpickle one .metadata", lambda: load_metadata(path / ".metadata"))
        layout: Layout = timed("read one layout", lambda: read_layout(path))
    layouts = [replace(layout, path=path) for _ in range(given.sources)]
    config = MergeConfig(load=Path("run"), save=Path("out"))
    plan = timed(f"plan {given.sources} sources", lambda: make_plan(layouts, config))
    shares = timed(
        f"shares of {given.ranks} ranks", lambda: plan.shares(given.ranks, given.sources, 1)
    )
    share = shares[given.ranks // 2]
    print(f"  {len(plan.tasks)} tasks, {len(share)} of them one rank's")
    timed("place one rank's chunks", lambda: place(chunks_of(share), 0))
    timed("place all chunks, as rank 0 does", lambda: place(chunks_of(plan.tasks), 0))


if __name__ == "__main__":
    main()
