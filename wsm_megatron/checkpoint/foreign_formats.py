"""What lies in a folder that is no finished ``torch_dist`` checkpoint, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """``PATH is {what}: {way_out}``."""

    what: str
    way_out: str


UNFINISHED = Kind(
    "unfinished", "there is no metadata.json, which Megatron writes last; leave it out"
)
_NO_MARKER = Kind(
    "unfinished",
    "there is no metadata.json, which Megatron writes last with --ckpt-format torch_dist (with "
    "fsdp_dtensor and torch_dcp never: they do not merge); leave it out",
)
_LEGACY = Kind(
    "a legacy checkpoint (mp_rank_* folders, --ckpt-format torch)",
    "load it in Megatron with --ckpt-format torch and save it as torch_dist (--ckpt-convert-format "
    "torch_dist --ckpt-convert-save DIR does both and ends)",
)

_WAYS_OUT = {
    "zarr": "load it with a Megatron-core that still reads zarr, and save it with --ckpt-format "
    "torch_dist",
    "fsdp_dtensor": "only torch_dist checkpoints merge: train without Megatron FSDP, or convert it",
    "torch_dcp": "load it in Megatron and save it with --ckpt-format torch_dist",
}


def kind_of(path: Path) -> Kind:
    """What a checkpoint folder without ``metadata.json`` is."""
    if any(path.glob("mp_rank_*")):
        return _LEGACY
    return _NO_MARKER if (path / ".metadata").is_file() else UNFINISHED


def kind_of_format(backend: object) -> Kind | None:
    """What ``metadata.json`` says by ``sharded_backend``; None for ``torch_dist``."""
    if backend == "torch_dist":
        return None
    name = str(backend)[:40]
    way_out = _WAYS_OUT.get(name, "save with --ckpt-format torch_dist")
    return Kind(f"of the sharded format {name!r}, not torch_dist", way_out)
