"""Make a run of synthetic checkpoints in Megatron's layout, dense or MoE, with TP chunks.

    python benchmarks/generate.py RUN --checkpoints 8 --gib 1 [--moe] [--tp 2] [--optimizer]

Values are random bf16 of the size that trained weights have; every checkpoint differs from the one
before as after some steps. Layers are stacked, experts too, as Megatron-LM saves them. A file a TP
rank, like a run of that many ranks.
"""

from __future__ import annotations

import argparse
import io
import json
from argparse import Namespace
from pathlib import Path

import torch

from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.run_directory import checkpoint_path, write_tracker
from wsm_megatron.checkpoint.writer import (
    CheckpointFile,
    Item,
    Placed,
    file_name,
    place,
    write_file,
)
from wsm_megatron.storage.buffer import Buffer

MARKER = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
SEQUENCE, BATCH = 4096, 1024


def tensors(gib: float, moe: bool) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and tensor-parallel axis of every model tensor, about ``gib`` GiB of bf16."""
    hidden, layers = 2048, 4
    wanted = int(gib * 2**30 / 2)
    vocabulary = 32000 if gib >= 0.5 else 2048
    rest = max(wanted - 2 * vocabulary * hidden, layers * hidden * hidden)
    inner = max(256, int((rest / layers / hidden - 4 * hidden) / 3) // 256 * 256)
    stack = "decoder.layers."
    found: dict[str, tuple[tuple[int, ...], int]] = {
        "embedding.word_embeddings.weight": ((vocabulary, hidden), 0),
        f"{stack}self_attention.linear_qkv.weight": ((layers, 3 * hidden, hidden), 1),
        f"{stack}self_attention.linear_proj.weight": ((layers, hidden, hidden), 2),
        f"{stack}mlp.linear_fc1.layer_norm_weight": ((layers, hidden), -1),
        "decoder.final_layernorm.weight": ((hidden,), -1),
        "output_layer.weight": ((vocabulary, hidden), 0),
    }
    if moe:
        experts, each = 8, max(64, inner // 8 // 64 * 64)
        prefix = f"{stack}mlp.experts.experts."
        found[f"{stack}mlp.router.weight"] = (layers, experts, hidden), -1
        found[f"{prefix}linear_fc1.weight"] = (layers, experts, 2 * each, hidden), 2
        found[f"{prefix}linear_fc2.weight"] = (layers, experts, hidden, each), 3
    else:
        found[f"{stack}mlp.linear_fc1.weight"] = (layers, 2 * inner, hidden), 1
        found[f"{stack}mlp.linear_fc2.weight"] = (layers, hidden, inner), 2
    return found


def chunks(shape: tuple[int, ...], axis: int, tp: int, stacked: bool) -> list[tuple[int, Region]]:
    """TP rank and region of every chunk: one a layer, expert and TP shard."""
    lead = 0 if not stacked else (2 if len(shape) == 4 else 1)
    regions = [(0, Region((0,) * len(shape), (*([1] * lead), *shape[lead:])))]
    for dim in range(lead):
        regions = [
            (0, Region((*b.offsets[:dim], i, *b.offsets[dim + 1 :]), b.sizes))
            for _, b in regions
            for i in range(shape[dim])
        ]
    if axis < 0:
        return regions
    step = shape[axis] // tp
    return [
        (rank, _along(region, axis, rank * step, step))
        for rank in range(tp)
        for _, region in regions
    ]


def _along(region: Region, axis: int, start: int, size: int) -> Region:
    offsets = (*region.offsets[:axis], start, *region.offsets[axis + 1 :])
    return Region(offsets, (*region.sizes[:axis], size, *region.sizes[axis + 1 :]))


def items(gib: float, moe: bool, tp: int, optimizer: bool) -> dict[int, list[Item]]:
    """What each rank's file holds."""
    found: dict[int, list[Item]] = {rank: [] for rank in range(tp)}
    prefixes = {"": torch.bfloat16}
    if optimizer:
        names = ("fp32_param", "exp_avg", "exp_avg_sq")
        prefixes |= {f"optimizer.state.{name}.": torch.float32 for name in names}
    for prefix, dtype in prefixes.items():
        for key, (shape, axis) in tensors(gib, moe).items():
            for rank, region in chunks(shape, axis, tp, key.startswith("decoder.layers.")):
                found[rank].append(Item(prefix + key, region, dtype, shape))
    return found


def write_checkpoint(
    root: Path, iteration: int, per_rank: dict[int, list[Item]], noise: torch.Tensor
) -> None:
    path = checkpoint_path(root, iteration)
    path.mkdir(parents=True)
    placed: list[Placed] = []
    for rank, wanted in per_rank.items():
        file = CheckpointFile(path / file_name(rank))
        for k, one in enumerate(place(wanted, rank)):
            chunk, region = file.chunk(one), one.item.region
            assert region is not None and one.item.dtype is not None
            start = (iteration * 7919 + k * 104729) % (noise.numel() // 2)
            for part in region.split(noise.numel() // 2):
                chunk.append(Buffer(noise[start : start + part.numel].to(one.item.dtype)))
            chunk.finish()
            placed.append(one)
        file.close()
    write_metadata(path, placed, {})
    write_file(path / "common.pt", common_state(iteration))
    write_marker(path, MARKER)


def common_state(iteration: int) -> bytes:
    arguments = Namespace(
        consumed_train_samples=iteration * BATCH, seq_length=SEQUENCE, iteration=0, bf16=True
    )
    stream = io.BytesIO()
    state = {"args": arguments, "iteration": iteration, "checkpoint_version": 3.0}
    torch.save(state, stream)
    return stream.getvalue()


def generate(root: Path, checkpoints: int, gib: float, moe: bool, tp: int, optimizer: bool) -> None:
    """Write a run, or leave it alone where it is there already with the same options."""
    wanted = json.dumps([checkpoints, gib, moe, tp, optimizer])
    stamp = root / "generated.json"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2**25, generator=generator) * 0.02
    noise = noise.to(torch.bfloat16).to(torch.float32)  # so that mains belong to their weights
    per_rank = items(gib, moe, tp, optimizer)
    for k in range(checkpoints):
        write_checkpoint(root, 1000 * (k + 1), per_rank, noise)
    write_tracker(root, 1000 * checkpoints)
    stamp.write_text(wanted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--gib", type=float, default=1.0, help="bf16 weights of one checkpoint")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--optimizer", action="store_true", help="mains and moments too")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    add_arguments(parser)
    given = parser.parse_args()
    generate(given.run, given.checkpoints, given.gib, given.moe, given.tp, given.optimizer)
