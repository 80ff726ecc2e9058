"""Optimizer state that is keyed by number (``torch_dcp``): which model tensor each of it is of.

``Float16OptimizerWithFloat16Params.state_dict`` numbers its main params within param groups, in the
order of ``named_parameters`` (``_get_param_groups``), and nothing says which param went to which
group. A main param rounds to its model tensor, so some elements tell them apart; where they do not
(tensors that are still alike), the order does. A merge compares every element later, as always.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from wsm_megatron.checkpoint.formats import TORCH_DCP
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import Layout, TensorEntry
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.safe_pickle.objects import load_object

_MAIN = re.compile(r"optimizer\.((?:\d+\.)?)fp32_from_fp16_params\.(\d+)\.(\d+)")
_STATE = re.compile(r"optimizer\.((?:\d+\.)?)optimizer\.state\.(\d+)\.([^.]+)")
_SAMPLE = 4096
"""Elements of a tensor that are compared."""


def with_names(layout: Layout) -> Layout:
    """The same layout with optimizer state under its model tensor's key, where that is found.

    Raises:
        MergeError: a tensor or an entry cannot be read.
    """
    if layout.format is not TORCH_DCP:
        return layout
    reader = CheckpointReader(layout)
    try:
        mains = dict(_named_mains(reader))
        numbers = dict(_numbers(reader, mains))
    finally:
        reader.close()
    names = {key: _name(key, "fp32_param", model) for key, model in mains.items()}
    for key in layout.tensors:
        found = _STATE.fullmatch(key)
        if found and (model := numbers.get((found[1], int(found[2])))):
            names[key] = _name(key, found[3], model)
    return layout.renamed(names)


def unnamed_mains(layout: Layout) -> list[str]:
    """Main params of which the model tensor is not known."""
    return [key for key in layout.tensors if _MAIN.fullmatch(key)]


def _named_mains(reader: CheckpointReader) -> Iterator[tuple[str, str]]:
    """Main params with the model tensor that each is of."""
    tensors = reader.layout.tensors
    models = [
        entry
        for entry in tensors.values()
        if entry.role is Role.MODEL and entry.dtype in (torch.bfloat16, torch.float16)
    ]
    samples = {entry.key: _sample(reader, entry, entry) for entry in models}
    place = {entry.key: n for n, entry in enumerate(models)}
    taken: set[str] = set()
    for group in _groups(reader.layout):
        last = -1
        for key in group:
            alike = [
                model
                for model in models
                if model.key not in taken
                and model.shape == tensors[key].shape
                and torch.equal(
                    samples[model.key].view(torch.int16),
                    _sample(reader, tensors[key], model).to(model.dtype).view(torch.int16),
                )
            ]
            if not alike:
                continue
            behind = [model for model in alike if place[model.key] > last]
            chosen = (behind or alike)[0].key
            last = place[chosen]
            taken.add(chosen)
            yield key, chosen


def _groups(layout: Layout) -> list[list[str]]:
    """Main params by param group, each group in its own order."""
    groups: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for key in layout.tensors:
        if found := _MAIN.fullmatch(key):
            groups.setdefault((found[1], int(found[2])), []).append((int(found[3]), key))
    return [[key for _, key in sorted(group)] for _, group in sorted(groups.items())]


def _sample(reader: CheckpointReader, entry: TensorEntry, cut_as: TensorEntry) -> torch.Tensor:
    """The first elements of a tensor, from the place where another one's first chunk begins."""
    chunk = next((chunk for chunk in cut_as.chunks if chunk.numel), None)
    if chunk is None:
        return torch.empty(0, dtype=entry.dtype)
    return reader.read(entry.key, next(Region(chunk.offsets, chunk.sizes).split(_SAMPLE)))


def _numbers(
    reader: CheckpointReader, mains: dict[str, str]
) -> Iterator[tuple[tuple[str, int], str]]:
    """Numbers of the state of params whose main param is known, by optimizer of a chain.

    A group's ``params`` are the numbers of its params. Where it has others than those with a main
    param (fp32 ones), which is which is not known.
    """
    objects = reader.layout.objects
    for group in _groups(reader.layout):
        found = _MAIN.fullmatch(group[0])
        assert found is not None
        entry = objects.get(f"optimizer.{found[1]}optimizer.param_groups.{found[2]}.params")
        if entry is None:
            continue
        params = load_object(reader.read_object(entry), f"{reader.layout.path}: {entry.key}")
        if isinstance(params, Sequence) and len(params) == len(group):
            for number, key in zip(params, group, strict=True):
                if key in mains and isinstance(number, int):
                    yield (found[1], number), mains[key]


def _name(key: str, state: str, model: str) -> str:
    """The key that ``torch_dist`` would give a model tensor's optimizer state."""
    found = _MAIN.fullmatch(key) or _STATE.fullmatch(key)
    assert found is not None
    chain = f"chained_{found[1]}" if found[1] else ""
    return f"{chain}optimizer.state.{state}.{model}"
