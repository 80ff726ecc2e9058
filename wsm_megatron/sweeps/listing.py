"""The merges below a folder: what each is of, by what it was made, how it scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.run_directory import named_iteration
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.planning.provenance import read_provenance
from wsm_megatron.storage.retry import watched
from wsm_megatron.sweeps.manifest import NAME, SweepManifest

logger = logging.getLogger(__name__)

_DEPTH = 4
"""Folders between the root and a checkpoint, at most."""


@dataclass(frozen=True)
class ListedMerge:
    """A merged checkpoint on disk.

    Attributes:
        iterations: of its sources, oldest first, with ``coefficients``.
        decay: None for explicit weights.
        made: by what: ``merge``, or ``training`` for one that a run made of itself.
        version: of this package that made it.
        problem: why nothing else is known.
        scores: by metric, as its sweep has them.
    """

    path: Path
    iteration: int
    iterations: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()
    decay: str | None = None
    optimizer_state: str = ""
    made: str = ""
    version: str = ""
    scores: dict[str, float] | None = None
    problem: str | None = None

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"path": str(self.path)}


def list_merges(root: Path) -> list[ListedMerge]:
    """Every merged checkpoint below a folder, by name. One that is damaged hides no other.

    Raises:
        UsageError: it is no folder.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    scores: dict[Path, dict[str, float] | None] = {}
    found: list[ListedMerge] = []
    for path in _walk(root, _DEPTH):
        if path.name == NAME:
            scores |= _scores(path)
        else:
            one = _listed(path)
            found += [one] if one is not None else []
    return [_scored(one, scores) for one in found]


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Checkpoints' folders and manifests of sweeps; no link is followed."""
    with watched(lambda: f"{folder}: listing"):
        children = sorted(folder.iterdir())
    for child in children:
        if child.name == NAME:
            yield child
        elif child.name.startswith(".") or child.is_symlink() or not child.is_dir():
            continue
        elif named_iteration(child) is not None:
            yield child
        elif depth > 1:
            yield from _walk(child, depth - 1)


def _listed(path: Path) -> ListedMerge | None:
    iteration = named_iteration(path)
    assert iteration is not None
    try:
        said = read_provenance(path)
    except MergeError as error:
        return ListedMerge(path, iteration, problem=str(error))
    if said is None:
        return None
    options, sources = said["options"], said["sources"]
    return ListedMerge(
        path,
        iteration,
        tuple(source["iteration"] for source in sources),
        tuple(said["coefficients"]),
        None if options.get("weights") else options.get("decay"),
        str(options.get("optimizer_state", "")),
        "merge" if all("metadata_crc32" in source for source in sources) else "training",
        str((said.get("versions") or {}).get("wsm_megatron", "")),
    )


def _scores(manifest: Path) -> dict[Path, dict[str, float] | None]:
    try:
        merges = SweepManifest.read(manifest).merges
    except MergeError as error:
        logger.warning("%s", error)
        return {}
    # below the manifest as it lies now: the folder may have been moved
    return {(manifest.parent / one.name).absolute(): one.scores for one in merges}


def _scored(one: ListedMerge, scores: dict[Path, dict[str, float] | None]) -> ListedMerge:
    known = scores.get(one.path.absolute())
    return one if known is None else ListedMerge(**{**vars(one), "scores": known})
