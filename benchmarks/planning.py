"""Planning a merge of a very large model, from synthetic metadata: seconds a phase.

    python benchmarks/planning.py [--chunks 100000] [--sources 8] [--ranks 64]
    python benchmarks/planning.py --flat 70b | moe [--sources 8] [--ranks 64]

No tensor exists: the layout of a model of about 10^12 parameters (stacked layers and experts, TP
shards) is written as ``.metadata``, read back, planned, dealt to ranks and placed. With ``--flat``
optimizer state is merged too, whose main params are looked for in flat buckets: of a dense 70B
model, or of 256 experts a layer (0.65 T). Of those chunks the beginnings exist. CPU seconds are of
all threads: on a busy machine they say more than the others.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flat_layouts import dense_70b, moe_256, write_flat
from generate import common_state
from measure import where

from wsm_megatron import MergeConfig
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.checkpoint.writer import (
    Item,
    file_name,
    place,
)
from wsm_megatron.optimizer.flat_main_params import find_flat_main_params
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.scatter import JobSlices
from wsm_megatron.process.gc_paused import gc_paused
from wsm_megatron.safe_pickle.metadata import load_metadata

LAYERS, HIDDEN, INNER, TP = 64, 8192, 2048, 2
FILES = 512
FLAT = {"70b": dense_70b, "moe": moe_256}


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
                    region = Region(tuple(offsets), tuple(sizes))
                    found.append(Item(f"{prefix}{name}.weight", region, torch.bfloat16, shape))
    return found


def write(path: Path, wanted: list[Item]) -> None:
    path.mkdir(parents=True)
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
    start, cpu = time.perf_counter(), time.process_time()
    result = call()
    took, busy = time.perf_counter() - start, time.process_time() - cpu
    print(f"{what:48} {took:8.2f} s {busy:8.2f} s CPU", flush=True)
    return result


def write_run(root: Path, chunks: int, sources: int, flat: str | None) -> None:
    """Checkpoints 1000, 2000, ...: the same metadata, sparse files of the sizes it needs."""
    paths = [checkpoint_path(root, 1000 * (k + 1)) for k in range(sources)]
    if flat is not None:
        print(write_flat(paths[-1], FLAT[flat](), FILES), f"{sources} sources", sep=", ")
    else:
        wanted = items(chunks)
        numel = sum(item.region.numel for item in wanted if item.region)
        print(f"{len(wanted)} chunks, {numel / 1e12:.2f} T parameters, {sources} sources")
        write(paths[-1], wanted)
    for path in paths:
        if path != paths[-1]:
            shutil.copytree(paths[-1], path, copy_function=_copy_or_sparse)
        (path / "common.pt").write_bytes(common_state(int(path.name.removeprefix("iter_"))))


def _copy_or_sparse(source: str, target: str) -> None:
    if not source.endswith(".distcp"):
        shutil.copyfile(source, target)
        return
    with open(target, "wb") as stream:
        stream.truncate(os.path.getsize(source))


def resident() -> int:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--flat", choices=sorted(FLAT))
    given = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory(prefix="wsm-planning-") as folder:
        root = Path(folder) / "run"
        root.mkdir()
        write_run(root, given.chunks, given.sources, given.flat)
        gc.collect()
        print(f"resident before: {resident()} MiB")
        metadata = checkpoint_path(root, 1000 * given.sources) / ".metadata"
        with gc_paused():
            timed("unpickle one .metadata", lambda: load_metadata(metadata))
            layouts = [timed("read one layout", lambda: read_layout(metadata.parent))]
            if given.flat:
                found = timed("find the main params", lambda: find_flat_main_params(layouts.pop()))
                print(f"  {len(found.places)} found, {len(found.missing)} missing")
            layouts.clear()
        state = "last" if given.flat else "drop"
        config = MergeConfig(load=root, save=Path(folder) / "out", optimizer_state=state)
        job = timed("prepare_job: open all, plan", lambda: prepare_job(config))
    parts = timed(f"parts of {given.ranks} ranks", lambda: job.rank_plans(given.ranks))
    dealer = JobSlices(job, parts)
    with gc_paused():  # as Ranks.deal does
        dealt = timed(
            "deal to all ranks",
            lambda: [pickle.dumps(dealer.deal(r)) for r in range(1, given.ranks)],
        )
        timed("receive it on a rank", lambda: pickle.loads(dealt[0]))
    print(f"  {max(map(len, dealt)) / 1e6:.1f} MB for a rank")
    timed("place one rank's chunks", lambda: job.placed(0, 1, parts[1]))
    timed(
        "place all chunks, as rank 0 does",
        lambda: [job.placed(0, rank, part) for rank, part in enumerate(parts)],
    )
    print(f"resident after: {resident()} MiB")


if __name__ == "__main__":
    main()
