"""What merged weights overwrite, copied to the host and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.values import is_quantised

_MEGATRON_S = ("main_grad", "main_param", "decoupled_grad")
"""Attributes that Megatron hangs on a param: no part of its value."""


class Stash:
    """Copies of live tensors on the host.

    Of a quantised tensor, every tensor that it holds is put aside (codes, scales, what is cached
    of them transposed), those of its quantizer too (``scale`` and ``amax``), and which they were:
    Transformer Engine drops caches, and makes new ones, as it quantises.
    """

    def __init__(self) -> None:
        self._bits: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._attributes: list[tuple[Any, str, Any]] = []

    def fill(self, chunks: Sequence[torch.nn.Module], shards: Sequence[Shard]) -> None:
        """Put aside all that a merge, and an evaluation of it, change on this rank."""
        for shard in shards:
            self.add(shard.value.tensors())
        for chunk in chunks:
            self.add(chunk.parameters())
            for meta in _scaling(chunk):
                self._add_attributes(meta)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put these aside."""
        for tensor in tensors:
            if is_quantised(tensor):
                self._add_attributes(tensor)
            else:
                live = tensor.detach()
                self._bits.append((live, live.to("cpu", copy=True)))

    def put_back(self) -> None:
        """Everything as it was. No communication."""
        for owner, name, value in self._attributes:
            setattr(owner, name, value)
        for live, saved in self._bits:
            live.copy_(saved)

    def _add_attributes(self, owner: Any, inner: bool = True) -> None:
        """The tensors among an object's attributes, and of the objects among them (quantizers)."""
        for name, value in list(vars(owner).items()):
            if name in _MEGATRON_S:
                continue
            if value is None or isinstance(value, bool | torch.Tensor):
                self._attributes.append((owner, name, value))
            if isinstance(value, torch.Tensor):
                self.add([value])
            elif isinstance(value, list) and all(isinstance(one, torch.Tensor) for one in value):
                self.add(value)
            elif inner and hasattr(value, "__dict__"):
                self._add_attributes(value, inner=False)


def _scaling(chunk: torch.nn.Module) -> Iterator[Any]:
    """Scales and amax histories of Transformer Engine's delayed scaling, which every forward
    pass adds to."""
    for module in chunk.modules():
        meta = getattr(module, "fp8_meta", None)
        if isinstance(meta, dict):
            yield from (one for name, one in meta.items() if str(name).startswith("scaling_"))
