"""A merged checkpoint that was just written, read back before it is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.checkpoint.layout import Chunk, Layout, TensorEntry, read_layout
from wsm_megatron.errors import MergeError
from wsm_megatron.optimizer.main_params import check_main_params
from wsm_megatron.plugin.collectives import all_gather, rank_and_size, together


def check_written(directory: Path, args: Mapping[str, Any]) -> None:
    """Read back main params that have a key of their own and the model: they must be of the same
    weights. Chunks are shared out among the ranks. Collective.

    Args:
        args: Megatron's, which say how main params and weights are kept.

    Flat buckets (``dp_reshardable``) are not looked at: there each rank writes its main params as
    they lie in memory.

    Raises ``MergeError`` on every rank, naming the tensors and the way out.
    """
    wrong: Sequence[str] = ()
    with together(f"reading {directory} back"):
        wrong = check_main_params(_share(read_layout(directory)), args).wrong
    if names := sorted(set().union(*all_gather(wrong))):
        raise MergeError(
            f"{directory}: Megatron wrote main params that are not those of the weights, for "
            f"{len(names)} tensors ({', '.join(names[:3])}): nothing is published, as a resume "
            "would go on from them. Save without --dist-ckpt-optim-fully-reshardable, or merge "
            "with --wsm-merge-optimizer-state drop"
        )


def _share(layout: Layout) -> Layout:
    """A checkpoint with this rank's share of the model's chunks, and the main params to them."""
    rank, size = rank_and_size()
    models = {model: key for key in layout.tensors if (model := main_of(key)) in layout.tensors}
    chunks = [(model, chunk) for model in models for chunk in layout.tensors[model].chunks]
    mine: dict[str, list[Chunk]] = {}
    for model, chunk in chunks[rank::size]:
        mine.setdefault(model, []).append(chunk)
    tensors: dict[str, TensorEntry] = {}
    for model, own in mine.items():
        tensors[model] = replace(layout.tensors[model], chunks=tuple(own))
        tensors[models[model]] = layout.tensors[models[model]]
    return replace(layout, tensors=tensors)
