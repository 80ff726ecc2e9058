"""What may be wrong with the values of a source, and the errors that say so."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from wsm_megatron.checkpoint.keys import is_variance, may_be_padding
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError
from wsm_megatron.kernels.finite import all_finite
from wsm_megatron.optimizer.precision import REMAINDERS, explain
from wsm_megatron.optimizer.representation import Bounded
from wsm_megatron.planning.tasks import Output, Task
from wsm_megatron.storage.buffer import Buffer


def wrong_main(task: Task, layout: Layout, values: torch.Tensor | None = None) -> MergeError:
    """A source's main param is of other weights than its model tensor.

    Args:
        values: some of the main param's, where they were read.
    """
    (main, model), dtype = task.recipe.inputs, task.recipe.input_dtypes[1]
    near = isinstance(task.recipe.main, Bounded)
    differs = "it is not near it" if near else f"rounded to {dtype} it differs"
    where = f" (from element {task.flat.start} on)" if task.flat is not None else ""
    if task.recipe.main.rebuilt:
        return MergeError(
            f"{layout.path}: values of {main}{where} are no remainders, as the newest source's are "
            f"({REMAINDERS}), but main params themselves, or damaged: leave this checkpoint out, "
            "or merge with --rebuild-main-params"
        )
    return MergeError(
        f"{layout.path}: the main param {main}{where} does not belong to the model tensor {model}: "
        f"{differs}. {explain(layout.path, main, values)}"
    )


def is_damaged(key: str, region: Region, data: torch.Tensor) -> bool:
    """Whether values of a chunk, or of a part of it, are not finite, padding apart."""
    if not data.is_floating_point() or all_finite(data):
        return False
    return not _is_padding(key, region)


def check_finite(task: Task, layout: Layout, key: str, data: torch.Tensor) -> None:
    """Raise ``MergeError`` where copied values of an input are not finite, padding apart."""
    if not data.is_floating_point() or all_finite(data):
        return
    if not writes_padding(task, key):
        raise MergeError(_nonfinite_message(layout, key, data))


def explain_nonfinite(
    task: Task, read: Iterable[tuple[Layout, list[Buffer]]], output: Output
) -> None:
    """An output is not finite: name the source that is to blame, or the overflow.

    Args:
        read: of every source, what was read of the task's inputs.

    Raises:
        MergeError: unless it is padding.
    """
    if writes_padding(task, task.recipe.inputs[0]):
        return
    for layout, buffers in read:
        for key, buffer in zip(task.recipe.inputs, buffers, strict=False):
            if not all_finite(buffer.elements):
                raise MergeError(_nonfinite_message(layout, key, buffer.elements))
    raise MergeError(
        f"{output.key}: the merged values overflow {output.dtype} although every source is finite; "
        "choose another --dtype"
    )


def check_variance(task: Task, merged: torch.Tensor) -> None:
    """Raise ``MergeError`` where a merged running variance is negative."""
    if is_variance(task.recipe.key) and (merged < 0).any():
        raise MergeError(
            f"{task.recipe.key}: the merged running variance is negative in places, which "
            "extrapolation (negative --weights) can do; use --buffers last"
        )


def writes_padding(task: Task, key: str) -> bool:
    """Whether a task of a flat bucket may be padding; a main param that was found there is not."""
    return task.flat is None and _is_padding(key, task.region)


def _is_padding(key: str, region: Region) -> bool:
    return len(region.offsets) == 1 and may_be_padding(key, region.offsets[0], region.sizes[0])


def _nonfinite_message(layout: Layout, key: str, data: torch.Tensor) -> str:
    count = int((~torch.isfinite(data)).sum())
    return (
        f"{layout.path}: {key} holds NaN or Inf ({count} of the {data.numel()} values "
        "looked at); leave this checkpoint out, or pass --allow-nonfinite"
    )
