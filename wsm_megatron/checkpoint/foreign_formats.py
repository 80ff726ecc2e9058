"""What lies in a folder that is no finished checkpoint of a known format, and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """``PATH is {what}: {way_out}``."""

    what: str
    way_out: str


UNFINISHED = Kind(
    "unfinished",
    "there is no metadata.json, which Megatron writes last (no .metadata either, which is the last "
    "file of fsdp_dtensor and torch_dcp); leave it out",
)
NO_FORMAT = Kind(
    "unfinished",
    "there is no metadata.json, which Megatron writes last with torch_dist, and .metadata, which "
    "it writes last with fsdp_dtensor and torch_dcp, is of neither: it names no iteration or no "
    "model; leave it out",
)
_LEGACY = Kind(
    "a legacy checkpoint (mp_rank_* folders, --ckpt-format torch)",
    "load it in Megatron with --ckpt-format torch and save it as torch_dist (--ckpt-convert-format "
    "torch_dist --ckpt-convert-save DIR does both and ends)",
)

_WAYS_OUT = {
    "zarr": "load it with a Megatron-core that still reads zarr, and save it with --ckpt-format "
    "torch_dist",
}


def kind_of(path: Path) -> Kind:
    """What a checkpoint folder without its format's last file is."""
    if any(path.glob("mp_rank_*")):
        return _LEGACY
    return NO_FORMAT if (path / ".metadata").is_file() else UNFINISHED


def kind_of_format(backend: object) -> Kind | None:
    """What ``metadata.json`` says by ``sharded_backend``; None for ``torch_dist``."""
    if backend == "torch_dist":
        return None
    name = str(backend)[:40]
    way_out = _WAYS_OUT.get(name, "save with --ckpt-format torch_dist")
    return Kind(f"of the sharded format {name!r}, not torch_dist", way_out)
