"""Do a checkpoint's main params belong to its model? Mostly they are that, before rounding.

Megatron overwrites the model from the main params in the first step after a load, so a checkpoint
whose main params are of other weights silently becomes those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from wsm_megatron.checkpoint.keys import (
    Role,
    is_flat_bucket,
    main_of,
    state_of,
)
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.optimizer.flat_buckets import (
    FlatMainParam,
    ModelChunk,
    contents,
    in_threads,
    search,
)
from wsm_megatron.optimizer.flat_main_params import FlatMainParams, match
from wsm_megatron.optimizer.fragments import find_fragments
from wsm_megatron.optimizer.precision import Kinds, are_remainders, kinds_of
from wsm_megatron.optimizer.representation import ROUNDED, Bounded

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
        why_unlike: the option by which main params differ from their model tensors by design.
        unlike: model tensors whose keyed main params do, within the error of the format.
        bounded: that error is known; otherwise any main params pass.
        remainders: model tensors, or flat buckets, of which 16-bit remainders are kept.
        model: the optimizer steps on the model itself: there are no main params (fp32).
        unknown: elements of flat buckets that are neither padding nor round to a model tensor.
    """

    keyed: int
    buckets: int
    wrong: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    why_unlike: str | None = None
    unlike: tuple[str, ...] = ()
    bounded: bool = True
    remainders: tuple[str, ...] = ()
    model: bool = False
    unknown: int = 0

    @property
    def near(self) -> bool:
        """Main params differ from their model tensors by design; in flat buckets they may."""
        return bool(self.unlike or (self.why_unlike and self.buckets))


def check_main_params(layout: Layout, args: Mapping[str, Any] | None = None) -> MainsCheck:
    """Compare every main param of a checkpoint with its model tensor; reads both once.

    Args:
        args: of the checkpoint's common state, which say whether it is saved quantised.

    Raises:
        MergeError: a tensor cannot be read.
    """
    tensors, kinds = layout.tensors, kinds_of(layout, args or {})
    mains = [key for key, entry in tensors.items() if entry.role is Role.MAIN]
    keyed = {
        model: key
        for key in mains
        if (model := main_of(key)) in tensors and tensors[model].shape == tensors[key].shape
    }
    places = find_fragments(layout)
    keyed |= {model: place.bucket for (model, _), place in places.items()}
    compared = _compare(layout, keyed, places, kinds)
    flat = _flat(layout, kinds)
    buckets = sum(map(is_flat_bucket, mains))
    without = list(flat.without)
    if keyed and not buckets:
        models = [key for key, entry in tensors.items() if entry.role is Role.MODEL]
        without = [key for key in models if key not in keyed]
    of_buckets = [key for key in mains if is_flat_bucket(key) and kinds.of(tensors[key]).rebuilt]
    usual = kinds.usual
    return MainsCheck(
        keyed=len(keyed),
        buckets=buckets,
        wrong=tuple(sorted({*compared.wrong, *flat.wrong})),
        without=() if of_buckets else tuple(sorted(without)),
        why_unlike=usual.why if isinstance(usual, Bounded) else None,
        unlike=tuple(sorted(compared.unlike)),
        bounded=not isinstance(usual, Bounded) or usual.known,
        remainders=tuple(sorted([*compared.remainders, *of_buckets])),
        model=not mains and any(map(state_of, tensors)),
        unknown=flat.unknown_elements,
    )


def _flat(layout: Layout, kinds: Kinds) -> FlatMainParams:
    found = search(layout, kinds.usual)
    return match(found, [(layout.path, contents(layout, found.alike, kinds.usual))])


@dataclass(frozen=True)
class _Compared:
    """Model tensors by how their keyed main params stand to them."""

    wrong: set[str] = field(default_factory=set)
    unlike: set[str] = field(default_factory=set)
    remainders: set[str] = field(default_factory=set)


def _compare(
    layout: Layout,
    keyed: Mapping[str, str],
    places: Mapping[ModelChunk, FlatMainParam],
    kinds: Kinds,
) -> _Compared:
    reader = CheckpointReader(layout)
    found = _Compared()

    def compare(model: str) -> None:
        kind = kinds.of(layout.tensors[keyed[model]])
        if kind.rebuilt:
            found.remainders.add(model)
        for weights, values in _pairs(reader, model, keyed[model], places):
            if kind.differ(values, weights):
                # said to be main params, and none: where the args are wrong
                (found.remainders if are_remainders(values) else found.wrong).add(model)
                return
            if isinstance(kind, Bounded) and ROUNDED.differ(values, weights):
                found.unlike.add(model)

    try:
        in_threads(keyed, compare)
    finally:
        reader.close()
    return found


def _pairs(
    reader: CheckpointReader, model: str, main: str, places: Mapping[ModelChunk, FlatMainParam]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A model tensor and its main param, piece by piece."""
    for chunk in reader.layout.tensors[model].chunks:
        whole, first = Region(chunk.offsets, chunk.sizes), 0
        place = places.get((model, whole))
        for region in whole.split(_TILE):
            lies = region if place is None else place.region(first, region.numel)
            first += region.numel
            yield reader.read(model, region), reader.read(main, lies)
