"""Where in flat buckets (``dp_reshardable``) the main param of each model chunk lies.

With that a merge can round the model from the merged main params, as Megatron does in the first
step after a load, and check on every source that the main params belong to the model.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError, some
from wsm_megatron.optimizer.flat_buckets import (
    Alike,
    Contents,
    FlatMainParam,
    ModelChunk,
    Search,
    Span,
    contents,
    search,
)
from wsm_megatron.optimizer.precision import no_main
from wsm_megatron.optimizer.representation import ROUNDED, Representation

logger = logging.getLogger(__name__)

Told = Sequence[tuple[Path, Contents]]
"""What checkpoints, the newest first, hold where the beginnings tell too little."""


@dataclass(frozen=True)
class FlatMainParams:
    """Main params in flat buckets, by model chunk.

    Attributes:
        missing: model chunks that no main param rounds to, and the first checkpoint, from the
            newest on, where that is so.
        unknown: what of each bucket is neither padding nor rounds to a model chunk.
        repeated: model tensors of which several ranks keep a main param each (norms, under TP).
    """

    places: dict[ModelChunk, FlatMainParam] = field(default_factory=dict)
    missing: dict[ModelChunk, Path] = field(default_factory=dict)
    unknown: dict[str, list[Span]] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()

    @property
    def without(self) -> tuple[str, ...]:
        """Model tensors that have no main param, as all that there are belong to others."""
        return () if self.unknown else self._missing

    @property
    def wrong(self) -> tuple[str, ...]:
        """Model tensors that have none although there are main params of other weights."""
        return self._missing if self.unknown else ()

    @property
    def _missing(self) -> tuple[str, ...]:
        return tuple(sorted({key for key, _ in self.missing}))

    @property
    def unknown_elements(self) -> int:
        return sum(stop - start for spans in self.unknown.values() for start, stop in spans)

    def rest(self, bucket: str, region: Region) -> Iterator[Region]:
        """What of a bucket's chunk is no main param of ``places``: copies, padding, unknown."""
        spans, start = self._spans.get(bucket, []), region.offsets[0]
        first = max(0, bisect_right(spans, (start,)) - 1)
        for gap, stop in _between(islice(spans, first, None), start, start + region.sizes[0]):
            yield Region((gap,), (stop - gap,))

    @cached_property
    def _spans(self) -> dict[str, list[Span]]:
        return _by_bucket((main, region.numel) for (_, region), main in self.places.items())


def find_flat_main_params(
    newest: Layout,
    older: Sequence[Layout] = (),
    usual: Representation = ROUNDED,
    must: bool = True,
) -> FlatMainParams:
    """Find the main params of the newest source's flat buckets, which lie alike in all sources.

    A few kilobytes of each model chunk and main param are read; where that does not tell two
    chunks apart, all of both, in every source. Chunks that are equal in every element of every
    source share their places, in order.

    Args:
        usual: how main params stand to their model. must: as for :func:`settle`.

    Raises:
        MergeError: main params are of other weights than the model, or a tensor cannot be read.
    """
    found = search(newest, usual)
    asked = [newest, *reversed(older)] if found.unsure else []
    return settle(
        found,
        [(one.path, contents(one, found.unsure, usual)) for one in asked if found.lies_in(one)],
        must,
    )


def settle(found: Search, told: Told, must: bool = True) -> FlatMainParams:
    """:func:`match`, refused where a model tensor's main param is of other weights.

    Args:
        must: without, such model tensors are merged for themselves, with a warning.

    Raises:
        MergeError: it is.
    """
    flat = match(found, told)
    if flat.wrong:
        blamed = next(iter(flat.missing.values()))
        keys = sorted({key for (key, _), path in flat.missing.items() if path == blamed})
        if must:
            raise MergeError(no_main(blamed, keys, next(iter(flat.unknown))))
        logger.warning(
            "%s: the main params of %s were not found in its flat buckets: merged from the model "
            "tensors, which are less exact", blamed, some(keys),
        )  # fmt: skip
        return flat
    if flat.without:
        logger.warning(
            "%s: no main params for %s (frozen, or a buffer): merged from the model's own values",
            found.path, some(flat.without),
        )  # fmt: skip
    elif flat.unknown:
        logger.warning(
            "%s: %d elements of its flat buckets round to no model tensor (copies of other ranks "
            "that drifted apart?): merged as they are", found.path, flat.unknown_elements,
        )  # fmt: skip
    return flat


def match(found: Search, told: Told) -> FlatMainParams:
    """Give every model chunk its place."""
    places: dict[ModelChunk, FlatMainParam] = {}
    missing: dict[ModelChunk, Path] = {}
    explained = []
    repeated: set[str] = set()
    for one in found.alike:
        known = [(path, kept) for path, kept in told if one.chunks[0] in kept]
        for chunks, here in _equal(one, [kept for _, kept in known]):
            places.update(zip(chunks, here, strict=False))
            explained += [(place, one.numel) for place in here if chunks]
            if len(here) > len(chunks):
                repeated.update(key for key, _ in chunks)
            for chunk in chunks[len(here) :]:
                missing[chunk] = _blamed(chunk, one, known) or found.path
    spans = _by_bucket(explained)
    unknown = {}
    for bucket, end in found.buckets.items():
        known_here = sorted([*spans.get(bucket, ()), *found.padding[bucket]])
        if gaps := list(_between(known_here, 0, end)):
            unknown[bucket] = gaps
    return FlatMainParams(places, missing, unknown, frozenset(repeated))


def _equal(one: Alike, told: Sequence[Contents]) -> Iterable[tuple[list, list]]:
    """Groups of chunks and places that are equal in every checkpoint."""
    groups: dict[tuple[bytes, ...], tuple[list[ModelChunk], list[FlatMainParam]]] = {}
    for chunk in one.chunks:
        groups.setdefault(tuple(kept[chunk] for kept in told), ([], []))[0].append(chunk)
    for place in one.places:
        groups.setdefault(tuple(kept[place] for kept in told), ([], []))[1].append(place)
    return groups.values()


def _blamed(chunk: ModelChunk, one: Alike, told: Told) -> Path | None:
    """The first checkpoint by which there are fewer places than chunks that equal this one."""
    chunks, places = list(one.chunks), list(one.places)
    for path, kept in told:
        chunks = [other for other in chunks if kept[other] == kept[chunk]]
        places = [place for place in places if kept[place] == kept[chunk]]
        if len(places) < len(chunks):
            return path
    return None


def _by_bucket(mains: Iterable[tuple[FlatMainParam, int]]) -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {}
    for main, numel in mains:
        spans.setdefault(main.bucket, []).append((main.start, main.start + numel))
    return {bucket: sorted(found) for bucket, found in spans.items()}


def _between(spans: Iterable[Span], position: int, end: int) -> Iterator[Span]:
    """What of ``position .. end`` is in none of the spans, which are sorted."""
    for start, stop in spans:
        if start >= end:
            break
        if position < start:
            yield position, start
        position = max(position, stop)
    if position < end:
        yield position, end
