"""How evenly the routers of a mixture of experts spread tokens, counted in evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wsm_megatron.plugin.collectives import all_gather, total

_Layer = tuple[str, str, int]
"""A router on every rank that has it: the part of the model, the layer's number, its experts."""


@dataclass(frozen=True)
class LoadBalance:
    """How far loads are from an even one; both are 0 where every expert gets the same.

    Attributes:
        max_violation: max_i load_i / mean load - 1, from 0 up: the mean over the layers.
        min_violation: min_i load_i / mean load - 1, from 0 down to -1, an expert without tokens.
        worst: max_violation of the layer where it is largest.
    """

    max_violation: float
    min_violation: float
    worst: float

    @classmethod
    def of(cls, loads: Sequence[Sequence[int]]) -> LoadBalance | None:
        """From the tokens of every expert, layer by layer; None where no layer got any."""
        used = [layer for layer in loads if sum(layer)]
        if not used:
            return None
        means = [sum(layer) / len(layer) for layer in used]
        most = [max(layer) / mean - 1 for layer, mean in zip(used, means, strict=True)]
        least = [min(layer) / mean - 1 for layer, mean in zip(used, means, strict=True)]
        return cls(sum(most) / len(used), sum(least) / len(used), max(most))


class ExpertLoads:
    """Counts the tokens that each expert of each layer is given, by the routers' own maps.

    Tensor-parallel ranks that route the same tokens count them once each: that multiplies all
    loads of a layer alike. Tokens that a router drops, or that are padding, are not counted.
    Collective.

    Args:
        chunks: the model chunks of this rank.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        routers = list(_routers(chunks))
        everywhere = set[_Layer]().union(*all_gather([layer for layer, _ in routers]))
        self._layers = sorted(everywhere)
        self._routers = [(self._layers.index(layer), router) for layer, router in routers]
        self._counted: dict[int, torch.Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is routed within it, from zero."""
        self._counted.clear()
        hooks = [
            router.register_forward_hook(partial(self._count, layer), with_kwargs=True)
            for layer, router in self._routers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def balance(self) -> LoadBalance | None:
        """Of what was counted on all ranks; None for a model without experts. Collective."""
        if not self._layers:
            return None
        sizes = [experts for *_, experts in self._layers]
        own = torch.zeros(sum(sizes), dtype=torch.int64)
        for layer, loads in enumerate(own.split(sizes)):
            if (counted := self._counted.get(layer)) is not None:
                loads += counted.cpu()
        return LoadBalance.of([loads.tolist() for loads in total(own).split(sizes)])

    def _count(
        self, layer: int, _: Any, inputs: Sequence[Any], keywords: dict[str, Any], output: Any
    ) -> None:
        """After a forward pass of a router, which gives probabilities and the map: a row a token, a
        column an expert. One that gives no such map is not counted."""
        routing_map = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        experts = self._layers[layer][-1]
        if not isinstance(routing_map, torch.Tensor) or routing_map.shape[-1] != experts:
            return
        routed = routing_map.detach().reshape(-1, experts) != 0
        padding = keywords.get("padding_mask", inputs[1] if len(inputs) > 1 else None)
        if padding is not None:
            routed = routed & ~padding.reshape(-1, 1)
        loads = routed.sum(dim=0)
        before = self._counted.get(layer)
        self._counted[layer] = loads if before is None else before + loads


def _routers(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[_Layer, Any]]:
    """Every router of this rank's part of the model. Pipeline stages count their layers from 0; a
    router knows its layer's number in the whole model."""
    from megatron.core.transformer.moe.router import Router

    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, Router):
                part, _, inner = name.partition(".layers.")
                number = getattr(module, "layer_number", None)
                where = inner if number is None else f"{number:05d}"
                yield (part, where, module.config.num_moe_experts), module
