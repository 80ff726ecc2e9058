"""How much memory a rank's share may take, and how it is spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wsm_megatron.errors import UsageError
from wsm_megatron.planning.tasks import Recipe, Rule, Scope
from wsm_megatron.process.memory import available_memory

MOST = 512 * 2**20
"""Bytes taken by default where the machine has them eight times over."""
FEWEST = 32 * 2**20
"""Bytes taken by default where next to nothing is free: Python and torch take ten times as many."""
TILE_BYTES = 3 * 2**20
"""Bytes of all sources together in one tile: about what a core's caches hold, measured."""
STAGED_BYTES = 16 * 2**20
"""The same on a GPU: enough to keep it busy longer than it takes to start it."""
LEAST_ELEMENTS = 2**14
"""Fewest in a tile: fewer cost more in calls than in bytes."""
AHEAD = 4 * 2**20
"""Bytes of each source that are read ahead for each thread, where memory allows."""
_SUM_BYTES = 8
_LEAST_AHEAD = 256 * 2**10
"""Less than this the kernel reads ahead by itself."""


@dataclass(frozen=True)
class Budget:
    """Bytes in flight on one rank: tiles, and what is read ahead of them.

    Attributes:
        threads: as many as asked for, or as their smallest tiles allow.
        tile_bytes: most for one tile, over all sources and merges.
        wanted_bytes: of all sources in one tile.
        ahead: bytes of each source that are read ahead for each thread; 0: as the kernel decides.
    """

    threads: int
    tile_bytes: int
    wanted_bytes: int
    ahead: int

    def tile_elements(self, recipe: Recipe, scope: Scope) -> int:
        """Elements of a tile of a recipe."""
        if recipe.rule is Rule.COPY:
            return min(TILE_BYTES, self.tile_bytes) // max(recipe.cost(1, 0), recipe.cost(0, 1))
        read = scope.bytes_read(recipe) + _SUM_BYTES * len(scope.arriving)
        written = scope.bytes_written(recipe) + _SUM_BYTES * len(scope.leaving)
        scratch = recipe.scratch(len(scope.sources), len(scope.ending))
        within = self.tile_bytes // (read + written + scratch)
        wanted = self.wanted_bytes // read
        return max(1, min(max(wanted, LEAST_ELEMENTS), within))


def default_memory() -> int:
    """An eighth of the memory that this process may still take, 32 MiB to 512 MiB."""
    return max(FEWEST, min(MOST, available_memory() // 8))


def make_budget(
    memory: int,
    threads: int,
    sources: int,
    merges: int,
    recipes: Iterable[Recipe],
    *,
    depth: int = 1,
    wanted_bytes: int = TILE_BYTES,
) -> Budget:
    """Divide memory among threads.

    Args:
        memory: bytes. threads: at most.
        depth: tiles of a thread that are under way at once.
        wanted_bytes: of all sources in one tile, where memory allows.

    Raises:
        UsageError: not even one thread's smallest tiles fit.
    """
    costs = [
        r.cost(sources, merges) + r.scratch(sources, merges)
        for r in recipes
        if r.rule is not Rule.COPY
    ]
    least = depth * LEAST_ELEMENTS * max(costs, default=0)
    if memory < least:
        raise UsageError(
            f"--memory {memory} is too little: the smallest tiles of {sources} sources and "
            f"{merges} merges take {least} bytes a thread; merge fewer at a time"
        )
    threads = min(threads, memory // max(least, 1))
    each = memory // threads
    ahead = min(AHEAD, max(0, each - 2 * max(least, depth * wanted_bytes)) // sources)
    if ahead < _LEAST_AHEAD:
        ahead = 0
    tile_bytes = (each - ahead * sources) // depth
    return Budget(threads, tile_bytes, wanted_bytes, ahead)
