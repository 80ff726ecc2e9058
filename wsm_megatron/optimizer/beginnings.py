"""Model chunks by how they begin: what a main param is compared with, before all of it is read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from wsm_megatron.checkpoint.region import Region
from wsm_megatron.optimizer.representation import Bounded, Representation

BEGINNING = 2**12
"""Elements by which model chunks and main params are told apart, before all are looked at."""
_HEAD = 64
"""Elements by which quantised weights and their main params, which are near them, are told."""

ModelChunk = tuple[str, Region]


@dataclass(frozen=True)
class Beginning:
    """How a model chunk begins, and how long it is."""

    dtype: torch.dtype
    numel: int
    digest: bytes


class Beginnings:
    """Model chunks by their beginnings.

    Args:
        usual: how main params stand to them.
    """

    def __init__(self, usual: Representation) -> None:
        self._usual = usual
        self.chunks: dict[Beginning, list[ModelChunk]] = defaultdict(list)
        self._heads: dict[Beginning, torch.Tensor] = {}

    def enter(self, beginning: Beginning, chunk: ModelChunk, data: torch.Tensor) -> None:
        """Take note of a model chunk, and of how it begins."""
        self.chunks[beginning].append(chunk)
        if isinstance(self._usual, Bounded):
            self._heads[beginning] = data[:_HEAD].float()

    def starting_with(self, main: torch.Tensor, room: int, param: str) -> list[Beginning]:
        """Beginnings that the first elements of a main param round to.

        Args:
            main: of any length; shorter than :data:`BEGINNING`, it fits short chunks only.
            room: elements up to the end of the bucket.
            param: the name of the params' dtype, where known.
        """
        found = []
        for (dtype, length), numels in self._kinds.items():
            if length > len(main) or (param in self._dtypes and str(dtype) != param):
                continue
            start = digest([main[:length].to(dtype)])
            candidates = (Beginning(dtype, n, start) for n in numels if n <= room)
            found += [one for one in candidates if one in self.chunks]
        return found or self._near(main, room)

    def _near(self, main: torch.Tensor, room: int) -> list[Beginning]:
        """Beginnings that a main param is near to, where it rounds to none; one of each length."""
        if not isinstance(self._usual, Bounded) or not self._usual.known:
            return []
        found = []
        for numel, (beginnings, heads) in self._stacked.items():
            length = heads.shape[1]
            if length > len(main) or numel > room:
                continue
            near = self._usual.close(main[:length].expand_as(heads), heads).all(1)
            if int(near.sum()) == 1:
                found.append(beginnings[int(near.nonzero())])
        return found

    @cached_property
    def _stacked(self) -> dict[int, tuple[list[Beginning], torch.Tensor]]:
        """Beginnings and their first elements, a row each, by the chunks' lengths."""
        of_length: dict[int, list[Beginning]] = defaultdict(list)
        for one in self._heads:
            of_length[one.numel].append(one)
        return {
            numel: (some, torch.stack([self._heads[one] for one in some]))
            for numel, some in of_length.items()
        }

    @cached_property
    def longest(self) -> int:
        return max((length for _, length in self._kinds), default=0)

    @cached_property
    def _dtypes(self) -> set[str]:
        return {str(dtype) for dtype, _ in self._kinds}

    @cached_property
    def _kinds(self) -> dict[tuple[torch.dtype, int], set[int]]:
        """Sizes of chunks, by dtype and length of their beginning."""
        kinds: dict[tuple[torch.dtype, int], set[int]] = defaultdict(set)
        for one in self.chunks:
            kinds[one.dtype, min(one.numel, BEGINNING)].add(one.numel)
        return dict(kinds)


def digest(pieces: Iterable[torch.Tensor]) -> bytes:
    """Equal for equal elements."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update(piece.view(torch.uint8).numpy().data)
    return found.digest()
