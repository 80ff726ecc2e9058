"""One name for one layer's tensor, however a checkpoint stacks its layers and experts.

| stored | here |
|---|---|
| ``decoder.layers.mlp.linear_fc2.weight``, stacked | ``layers.3.mlp.linear_fc2.weight`` |
| ``decoder.layers.3.mlp.linear_fc2.weight`` | the same |
| ``decoder.layers.mlp.experts.experts.NAME``, stacked | ``layers.3.mlp.experts.7.NAME`` |
| ``mtp.layers.0.transformer_layer.NAME`` | ``layers.N.NAME`` |
| ``mtp.layers.0.enorm.weight`` | ``layers.N.enorm.weight`` |

Layers are stacked along the first axis, experts along the next. N is the number of the decoder's
layers: those of MTP follow them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from wsm_megatron.checkpoint.layout import TensorEntry
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import UsageError

_PREFIX = re.compile(r"(?:model\d*\.)?(?:module\.)?")
_LAYER = re.compile(r"(?:decoder|encoder)\.layers\.(?:(\d+)\.)?(.+)")
_MTP = re.compile(r"mtp\.layers\.(\d+)\.(?:transformer_layer\.|mtp_model_layer\.)?(.+)")
_EXPERT = re.compile(r"(.*\bmlp\.experts\.)experts\.(?:(\d+)\.)?(.+)")


@dataclass(frozen=True)
class Part:
    """One layer's, and one expert's, share of a stored tensor.

    Attributes:
        key: of the stored tensor. region: where in it the share is.
        shape: without the axes along which layers and experts are stacked.
    """

    name: str
    key: str
    region: Region
    shape: tuple[int, ...]

    def place(self, inner: Region) -> Region:
        """Where a region of this share lies in the stored tensor."""
        stacked = len(self.region.offsets) - len(self.shape)
        return Region(
            (*self.region.offsets[:stacked], *inner.offsets), ((1,) * stacked + inner.sizes)
        )


def parts_of(tensors: Iterable[TensorEntry], layers: int) -> dict[str, Part]:
    """The shares of model tensors by name.

    Args:
        layers: of the decoder; MTP's are counted on from there.

    Raises:
        UsageError: two tensors have one meaning.
    """
    parts: dict[str, Part] = {}
    for entry in tensors:
        for part in _parts(entry, layers):
            if part.name in parts:
                raise UsageError(
                    f"{entry.key} and {parts[part.name].key} are both {part.name}; leave one out "
                    "with --leave-out"
                )
            parts[part.name] = part
    return parts


def _parts(entry: TensorEntry, layers: int) -> Iterator[Part]:
    key = entry.key[_matched(_PREFIX, entry.key) :]
    template, stacked = _template(key, layers)
    if len(entry.shape) < stacked:
        raise UsageError(f"{entry.key} {entry.shape} has no axis for layers or experts")
    inner = entry.shape[stacked:]
    for index in product(*map(range, entry.shape[:stacked])):
        region = Region((*index, *(0,) * len(inner)), ((1,) * stacked + inner))
        yield Part(template.format(*index), entry.key, region, inner)


def _template(key: str, layers: int) -> tuple[str, int]:
    """A name with a gap for every stacked axis, and how many these are."""
    stacked = 0
    if found := _MTP.fullmatch(key):
        name = f"layers.{layers + int(found[1])}.{found[2]}"
    elif found := _LAYER.fullmatch(key):
        stacked += found[1] is None
        name = f"layers.{found[1] or '{}'}.{found[2]}"
    else:
        return key, 0
    if found := _EXPERT.fullmatch(name):
        stacked += found[2] is None
        name = f"{found[1]}{found[2] or '{}'}.{found[3]}"
    return name, stacked


def _matched(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return 0 if found is None else found.end()
