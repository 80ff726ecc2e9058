"""Do a checkpoint's main params belong to its model? Rounded to the model's dtype they are equal.

Megatron overwrites the model from the main params in the first step after a load, so a checkpoint
whose main params are of other weights silently becomes those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wsm_megatron.checkpoint.keys import (
    Role,
    is_flat_bucket,
    main_of,
    state_of,
    stores_remainders,
)
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Box
from wsm_megatron.optimizer.flat_buckets import contents, in_threads, search
from wsm_megatron.optimizer.flat_main_params import FlatMains, match
from wsm_megatron.optimizer.precision import are_remainders, quantised_by

_TILE = 2**20


@dataclass(frozen=True)
class MainsCheck:
    """What was found.

    Attributes:
        keyed: main params under their model tensor's key.
        buckets: flat buckets of main params (``dp_reshardable``), found again by their content.
        wrong: model tensors whose main param is another tensor's; in flat buckets, tensors that no
            main param rounds to.
        without: model tensors without a main param (frozen, or never saved).
        quantised: the option by which the model is saved quantised, so that main params differ
            from it by design.
        unlike: model tensors whose main params do.
        remainders: tensors of which 16-bit remainders are stored instead of main params.
        model: the optimizer steps on the model itself: there are no main params (fp32).
        unknown: elements of flat buckets that are neither padding nor round to a model tensor.
    """

    keyed: int
    buckets: int
    wrong: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    quantised: str | None = None
    unlike: tuple[str, ...] = ()
    remainders: tuple[str, ...] = ()
    model: bool = False
    unknown: int = 0

    @property
    def present(self) -> bool:
        return bool(self.keyed or self.buckets)


def check_mains(layout: Layout, args: Mapping[str, Any] | None = None) -> MainsCheck:
    """Compare every main param of a checkpoint with its model tensor; reads both once.

    Args:
        args: of the checkpoint's common state, which say whether it is saved quantised.

    Raises:
        MergeError: a tensor cannot be read.
    """
    tensors = layout.tensors
    mains = [key for key, entry in tensors.items() if entry.role is Role.MAIN]
    keyed = {
        model: key
        for key in mains
        if (model := main_of(key)) in tensors and tensors[model].shape == tensors[key].shape
    }
    differing = _differing(layout, keyed)
    flat = _flat(layout)
    wrong = sorted({*(key for key, remainder in differing.items() if not remainder), *flat.wrong})
    by_design = [key for key, remainder in differing.items() if remainder]
    by_design += [key for key, entry in tensors.items() if stores_remainders(key, entry.dtype)]
    models = [key for key, entry in tensors.items() if entry.role is Role.MODEL]
    buckets = sum(map(is_flat_bucket, mains))
    without = list(flat.without)
    if keyed and not buckets:
        without = [key for key in models if key not in keyed]
    quantised = quantised_by(args or {})
    return MainsCheck(
        keyed=len(keyed),
        buckets=buckets,
        wrong=() if quantised else tuple(wrong),
        without=tuple(sorted(without)),
        quantised=quantised,
        unlike=tuple(wrong) if quantised else (),
        remainders=tuple(sorted(by_design)),
        model=not mains and not by_design and any(map(state_of, tensors)),
        unknown=flat.unknown_elements,
    )


def _flat(layout: Layout) -> FlatMains:
    found = search(layout)
    return match(found, [(layout.path, contents(layout, found.alike))])


def _differing(layout: Layout, keyed: Mapping[str, str]) -> dict[str, bool]:
    """Model tensors whose main param differs: whether it holds remainders instead."""
    reader = CheckpointReader(layout)
    found: dict[str, bool] = {}

    def compare(model: str) -> None:
        main = _first_difference(reader, model, keyed[model])
        if main is not None:
            found[model] = are_remainders(main)

    try:
        in_threads(keyed, compare)
    finally:
        reader.close()
    return found


def _first_difference(reader: CheckpointReader, model: str, main: str) -> torch.Tensor | None:
    """Some of a main param that does not round to the model tensor; None where all does."""
    for chunk in reader.layout.tensors[model].chunks:
        for box in Box(chunk.offsets, chunk.sizes).split(_TILE):
            weights, values = reader.read(model, box), reader.read(main, box)
            rounded = values.to(weights.dtype)
            if not torch.equal(weights.view(torch.uint8), rounded.view(torch.uint8)):
                return values
    return None
