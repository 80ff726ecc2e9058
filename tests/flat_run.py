"""Small runs with flat buckets (``dp_reshardable``), laid out as Megatron does, of any content."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from tests.runs import dump_common
from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.run_directory import checkpoint_path, write_tracker
from wsm_megatron.checkpoint.writer import CheckpointFile, Item, file_name, place
from wsm_megatron.storage.buffer import Buffer

MARKER = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def bucket_key(group: int = 0, index: int = 0, dtype: str = "bfloat16") -> str:
    return (
        f"optimizer.distributed.dp_group_idx_{group}.gbuf_idx_0.dtype_(torch.{dtype}, "
        f"torch.float32).bucket_idx_{index}.param"
    )


def starts_of(mains: Sequence[torch.Tensor]) -> list[int]:
    """Where each main param of a bucket starts: at the next multiple of 64."""
    starts, position = [], 0
    for main in mains:
        starts.append(position)
        position = -(-(position + main.numel()) // 64) * 64
    return starts


def write_checkpoint(
    root: Path,
    iteration: int,
    model: Mapping[str, torch.Tensor],
    buckets: Mapping[str, Sequence[torch.Tensor]],
    *,
    cuts: Sequence[int] = (),
    chunks: Mapping[str, Sequence[Region]] | None = None,
    args: Mapping[str, object] | None = None,
) -> Path:
    """Write one checkpoint and move the tracker.

    Args:
        model: tensors, each one chunk unless ``chunks`` cuts it.
        buckets: main params of each bucket, one after another; padding in between is NaN.
        cuts: elements of every bucket at which a data-parallel rank's part ends.
        args: of the common state, beside the usual.
    """
    path = checkpoint_path(root, iteration)
    path.mkdir(parents=True)
    data: dict[tuple[str, Region], torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, tensor in model.items():
        shapes[key] = tuple(tensor.shape)
        for region in (chunks or {}).get(key) or [Region((0,) * tensor.dim(), shapes[key])]:
            where = tuple(
                slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True)
            )
            data[key, region] = tensor[where].reshape(-1)
    for key, mains in buckets.items():
        for start, part in _laid_out(mains, cuts):
            region = Region((start,), (part.numel(),))
            data[key, region] = part
            for moment in ("exp_avg", "exp_avg_sq"):
                data[key.removesuffix("param") + moment, region] = part.float() * 0.5
        numel = starts_of(mains)[-1] + mains[-1].numel()
        shapes |= {key.removesuffix("param") + n: (numel,) for n in ("param", "exp_avg")}
        shapes[key.removesuffix("param") + "exp_avg_sq"] = (numel,)
    items = [Item(key, region, part.dtype, shapes[key]) for (key, region), part in data.items()]
    placed, file = place(items, 0), CheckpointFile(path / file_name(0))
    for one, part in zip(placed, data.values(), strict=True):
        chunk = file.chunk(one)
        chunk.append(Buffer(part.contiguous()))
        chunk.finish()
    file.close()
    write_metadata(path, placed, {})
    (path / "common.pt").write_bytes(dump_common(_common(iteration, args or {})))
    write_marker(path, MARKER)
    write_tracker(root, iteration)
    return path


def _laid_out(mains: Sequence[torch.Tensor], cuts: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """What lies in a bucket, in the pieces that are on disk."""
    pieces: list[tuple[int, torch.Tensor]] = []
    for start, main in zip(starts_of(mains), mains, strict=True):
        position = pieces[-1][0] + pieces[-1][1].numel() if pieces else 0
        if position < start:
            pieces.append((position, torch.full((start - position,), torch.nan).to(main.dtype)))
        pieces.append((start, main.reshape(-1)))
    found = []
    for start, piece in pieces:
        inside = [cut for cut in sorted(cuts) if start < cut < start + piece.numel()]
        edges = [start, *inside, start + piece.numel()]
        found += [(a, piece[a - start : b - start]) for a, b in pairwise(edges)]
    return found


def _common(iteration: int, args: Mapping[str, object]) -> dict[str, object]:
    usual = {"consumed_train_samples": 8 * iteration, "seq_length": 16, "iteration": iteration}
    return {
        "args": Namespace(**(usual | dict(args))),
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "optimizer": {"optimizer": {"param_groups": [{"step": iteration}]}},
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 8 * iteration},
        "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"},
    }
