"""What a merge should be: a float64 merge of what PyTorch loads of every source.

A source is loaded twice, into buffers filled differently: where the two differ, nothing was stored,
and no merge of it is right. Where only bytes were changed, behind the back of their CRC-32, the
truth is the run as it was.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests import runs
from tests.fuzz.case import ITERATIONS, WEIGHTS, Case
from tests.reference import rounded, weighted_sum64

Tensors = dict[str, torch.Tensor]
_FILLS = (7, 93)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAINS = ("optimizer.state.param.", "optimizer.state.fp32_param.")


class HoleError(Exception):
    """A tensor of a source, or of the merge, is not stored in full."""


def load(checkpoint: Path, wanted: Callable[[str], bool]) -> Tensors:
    """The tensors of a checkpoint as PyTorch loads them. Raises ``HoleError``, or as PyTorch."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    loaded = []
    for fill in _FILLS:
        state = {
            key: torch.full(entry.size, fill, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and wanted(key)
        }
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
        loaded.append(state)
    for key, tensor in loaded[0].items():
        if not same(tensor, loaded[1][key]):
            raise HoleError(f"{key} in {checkpoint}")
    return loaded[0]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits; any NaN is like another (padding)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool(torch.where(one.isnan(), other.isnan(), _bits(one) == _bits(other)).all())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


@lru_cache(maxsize=32)
def of_base(base: str, iteration: int) -> Tensors:
    return load(runs.checkpoint(base, iteration), lambda key: True)


def prepare(bases: Iterable[tuple[str, str]]) -> None:
    """Read the runs before they are changed, once for all processes that are forked."""
    for base, optimizer_state in bases:
        for iteration in ITERATIONS:
            of_base(base, iteration)
        if optimizer_state != "drop":
            _flat_places(base)


def kept(optimizer_state: str) -> Callable[[str], bool]:
    """Which tensors the merge holds."""
    if optimizer_state != "drop":
        return lambda key: True
    return lambda key: ".state." not in key and ".gbuf_idx" not in key


def expected(case: Case, rebuilt: bool = False) -> Tensors:
    """The tensors of the merge. Raises what :func:`load` raises.

    Args:
        rebuilt: main params are made of the merged model, as where sources keep them differently.
    """
    wanted = kept(case.optimizer_state)
    sources = []
    for iteration in ITERATIONS:
        path = runs.checkpoint(case.run, iteration)
        newest = iteration == ITERATIONS[-1]

        def read(key: str, newest: bool = newest) -> bool:
            unread = _is_moment(key) or (rebuilt and key.startswith(_MAINS))
            return wanted(key) and (newest or not unread)

        changed = path == case.victim and not case.silent
        loaded = load(path, read) if changed else of_base(case.base, iteration)
        sources.append({key: tensor for key, tensor in loaded.items() if read(key)})
    merged = {
        key: _merged([source[key] for source in sources]) if key in sources[0] else tensor
        for key, tensor in sources[-1].items()
    }
    for key, tensor in merged.items():
        if rebuilt and key.startswith(_MAINS):
            models = [source[_model_of(key)] for source in sources]
            merged[key] = rounded(weighted_sum64(WEIGHTS, models), tensor.dtype)
    for key, tensor in merged.items():
        main = _main_of(key, tensor, merged, case.base)
        if main is not None:
            merged[key] = main.to(tensor.dtype)
    return merged


def _model_of(main: str) -> str:
    return next(main.removeprefix(prefix) for prefix in _MAINS if main.startswith(prefix))


def _is_moment(key: str) -> bool:
    """Of these only the newest source's are read, with ``--optimizer-state last``."""
    return any(part in key.split(".") for part in _MOMENTS)


def _merged(tensors: list[torch.Tensor]) -> torch.Tensor:
    newest = tensors[-1]
    if not newest.is_floating_point():
        return newest
    return rounded(weighted_sum64(WEIGHTS, tensors), newest.dtype)


def _main_of(key: str, model: torch.Tensor, merged: Tensors, base: str) -> torch.Tensor | None:
    """The merged main param of a model tensor."""
    for prefix in _MAINS:
        if prefix + key in merged:
            return merged[prefix + key]
    if not any(".gbuf_idx" in one for one in merged):
        return None
    places = _flat_places(base).get(key)
    if places is None:
        return None
    parts = [merged[bucket][start : start + count] for bucket, start, count in places]
    return torch.cat(parts).view(model.shape)


@lru_cache(maxsize=8)
def _flat_places(base: str) -> dict[str, list[tuple[str, int, int]]]:
    """Bucket, start and length of the main params of a model tensor, found by content.

    Layers that are stacked in one tensor are apart in the buckets; each param starts at a multiple
    of 64 elements (``_round_up`` in Megatron's ``param_and_grad_buffer``).
    """
    tensors = of_base(base, ITERATIONS[-1])
    buckets = {key: t for key, t in tensors.items() if "gbuf_idx" in key and key.endswith(".param")}
    found = {}
    for key, model in tensors.items():
        if key.startswith("optimizer.") or not buckets or model.dtype != torch.bfloat16:
            continue
        stacked = key.startswith("decoder.layers.")
        parts = list(model) if stacked else [model]
        places = [_find(part.reshape(-1), buckets) for part in parts]
        assert all(places), key
        found[key] = [place for place in places if place]
    return found


def _find(part: torch.Tensor, buckets: Tensors) -> tuple[str, int, int] | None:
    count = part.numel()
    for name, bucket in buckets.items():
        for start in range(0, bucket.numel() - count + 1, 64):
            if torch.equal(bucket[start : start + count].to(part.dtype), part):
                return name, start, count
    return None


def objects(checkpoint: Path) -> dict[str, bytes]:
    """The byte entries of a checkpoint, as they are stored."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    tensors = {
        key
        for key, e in metadata.state_dict_metadata.items()
        if isinstance(e, TensorStorageMetadata)
    }
    stored = {}
    for index, info in metadata.storage_data.items():
        if index.fqn in tensors:
            continue
        with (checkpoint / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            stored[index.fqn] = file.read(info.length)
    return stored


def loads(data: bytes) -> bool:
    """Whether PyTorch reads a byte entry; anything that it would run is left aside."""
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        return "weights_only" in str(error)
    return True
