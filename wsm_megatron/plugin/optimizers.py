"""The main params of a Megatron optimizer; the only place that knows optimizer classes.

Each trainable element has one main param somewhere, and one rank that keeps it:

- ``DistributedOptimizer``: flat 1/DP shards. They are its own float32 tensors, or, with the
  precision-aware optimizer, state of Transformer Engine's ``FusedAdam`` or of
  ``HybridDeviceOptimizer`` (CPU offload), which write the model weights themselves.
- ``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer``: whole, on every data-parallel rank.
- the same two within a ``LayerWiseDistributedOptimizer`` (Muon): whole, on one of these ranks.
- ``ChainedOptimizer`` (dense and experts; Muon and Adam): its links one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wsm_megatron.errors import UsageError
from wsm_megatron.optimizer.precision import FP16_MAINS, quantised_as
from wsm_megatron.optimizer.representation import REMAINDER, ROUNDED, Representation
from wsm_megatron.plugin.values import (
    MASTER,
    Copied,
    Plain,
    Remainders,
    Scaled,
    Value,
    is_quantised,
)

_LAYER_WISE = "LayerWiseDistributedOptimizer"


@dataclass(frozen=True, kw_only=True, eq=False)
class MainParam:
    """A main param, or a shard of one, on this rank.

    Attributes:
        param: the whole model param. offset: where the main param begins in it, flat.
        value: how it is read and written. kind: how it stands to the model weights.
        stepped: what the optimizer that steps knows it by. steps: that optimizer.
    """

    param: torch.nn.Parameter
    value: Value
    stepped: torch.Tensor
    steps: torch.optim.Optimizer
    kind: Representation = ROUNDED
    offset: int = 0

    def is_of_other_weights(self) -> bool:
        """Whether it cannot be the model weights'. Any remainders can."""
        if self.kind.rebuilt or not self.value.exists:
            return False
        weights = self.param.detach()
        weights = (weights.float() if is_quantised(weights) else weights).view(-1)
        own = weights.narrow(0, self.offset, self.stepped.numel())
        return bool(self.kind.differ(self.value.read().to(own.device), own))

    @property
    def has_state(self) -> bool:
        """Whether its moments are there; most optimizers make them in their first step, SGD without
        momentum never."""
        stateless = self.steps.defaults.get("momentum") == 0
        return stateless or bool(self.steps.state.get(self.stepped))

    def moments(self) -> dict[str, Value]:
        """Floating optimizer state of its shape, by name; none where a state is kept in integer
        codes (8-bit Adam), of which no sum has a meaning."""
        state: Mapping[str, Any] = self.steps.state.get(self.stepped, {})
        alike = {
            name: one
            for name, one in state.items()
            if isinstance(one, torch.Tensor) and one.shape == self.stepped.shape and name != MASTER
        }
        if any(not one.is_floating_point() and one.dtype.itemsize == 1 for one in alike.values()):
            return {}
        return {
            name: self.moment(name) for name in sorted(alike) if alike[name].is_floating_point()
        }

    def moment(self, name: str) -> Value:
        """One of its moments, there or not."""
        if hasattr(self.steps, "get_unscaled_state"):
            return Scaled(self.steps, self.stepped, name)
        return Plain(lambda: self.steps.state[self.stepped][name])


class Part(ABC):
    """One of Megatron's optimizers that hold main params.

    Attributes:
        megatron: Megatron's object.
        replicated: every data-parallel rank holds the same main params, whole.
    """

    replicated = False

    def __init__(self, megatron: Any) -> None:
        self.megatron = megatron

    @property
    def steps(self) -> torch.optim.Optimizer:
        """The ``torch.optim`` optimizer in it."""
        steps: torch.optim.Optimizer = self.megatron.optimizer
        return steps

    @property
    def is_captured(self) -> bool:
        """Its step is replayed as a CUDA graph, which calls no hooks."""
        return bool(getattr(self.megatron.config, "optimizer_cuda_graph", False))

    @abstractmethod
    def main_params(self) -> Iterator[MainParam]:
        """Those of this rank."""

    def copy_to_weights(self) -> None:
        """Megatron's own copy of main params to this rank's model weights."""
        config = self.megatron.config
        if getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False) and hasattr(
            self.megatron, "_copy_main_params_to_param_buffer"
        ):
            self.megatron._copy_main_params_to_param_buffer()
        elif hasattr(self.megatron, "_copy_main_params_to_model_params"):
            self.megatron._copy_main_params_to_model_params()


class Distributed(Part):
    """Megatron's ``DistributedOptimizer``."""

    def main_params(self) -> Iterator[MainParam]:
        if self.megatron.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            for groups in (self.megatron.model_float16_groups, self.megatron.model_fp32_groups):
                yield from (self._held_by_adam(param) for group in groups for param in group)
            return
        megatron = self.megatron
        for groups, mains in (
            (megatron.model_float16_groups, megatron.shard_fp32_from_float16_groups),
            (megatron.model_fp32_groups, megatron.shard_fp32_groups),
        ):
            for param, main in _pairs(groups, mains):
                kind = self._kind_of_quantised() if is_quantised(param) else ROUNDED
                yield self._main_param(param, main, Plain(partial(_same, main)), kind)

    def _main_param(
        self, param: torch.nn.Parameter, stepped: torch.Tensor, value: Value, kind: Representation
    ) -> MainParam:
        offset = self.megatron._get_model_param_range_map(param)["param"].start
        return MainParam(
            param=param, value=value, stepped=stepped, steps=self.steps, kind=kind, offset=offset
        )

    def _held_by_adam(self, param: torch.nn.Parameter) -> MainParam:
        """The precision-aware optimizer steps on a shard of the model weights."""
        group, number = self.megatron.model_param_group_index_map[param]
        steps: Any = self.steps
        shard = steps.param_groups[group]["params"][number]
        kind: Representation = ROUNDED
        if hasattr(steps, "param_to_fp32_param"):
            inner = Plain(partial(_offloaded, steps, shard))
            value: Value = Copied(inner, weights=shard, others=partial(_loaded_to, steps, shard))
        elif shard.dtype == torch.float32:  # its master param is made, saved, and never stepped on
            value = Copied(Plain(partial(_same, shard)), others=partial(_masters, steps, shard))
        elif steps.store_param_remainders and shard.dtype == torch.bfloat16:
            if is_quantised(param):
                raise UsageError(
                    "cannot merge in training: main params are kept as remainders of quantised "
                    "weights, which no optimizer can step on: give --main-params-dtype fp16, or "
                    "train without --fp8-param-gather"
                )
            value, kind = Remainders(partial(_masters, steps, shard), shard), REMAINDER
        else:
            value = Copied(Scaled(steps, shard, MASTER), weights=shard)
            kind = FP16_MAINS if steps.master_weight_dtype == torch.float16 else ROUNDED
        if is_quantised(param):
            kind = self._kind_of_quantised()
        return self._main_param(param, shard, value, kind)

    def _kind_of_quantised(self) -> Representation:
        ddp, config = self.megatron.ddp_config, self.megatron.config
        fp4 = getattr(ddp, "fp4_param_gather", False)
        kind = quantised_as(
            {
                "fp4_param_gather": fp4,
                "fp8_param_gather": not fp4,
                "fp8_recipe": getattr(config, "fp8_recipe", None),
            }
        )
        assert kind is not None
        return kind


class Replicated(Part):
    """Megatron's ``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer``."""

    replicated = True

    def main_params(self) -> Iterator[MainParam]:
        for param, main in self._pairs():
            yield MainParam(
                param=param, value=Plain(partial(_same, main)), stepped=main, steps=self.steps
            )

    def _pairs(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        megatron = self.megatron
        if hasattr(megatron, "fp32_from_float16_groups"):
            yield from _pairs(megatron.float16_groups, megatron.fp32_from_float16_groups)
            yield from _pairs(megatron.fp32_from_fp32_groups, megatron.fp32_from_fp32_groups)
        else:
            for group in self.steps.param_groups:
                yield from ((param, param) for param in group["params"])


class LayerWise(Replicated):
    """The same, within a ``LayerWiseDistributedOptimizer``: whole, and of this rank alone."""

    replicated = False


def parts(optimizer: Any, *, layer_wise: bool = False) -> list[Part]:
    """The optimizers that hold main params: a chain's links, without the empty ones.

    Raises ``UsageError`` naming an optimizer class that is not supported.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import (
        ChainedOptimizer,
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
    )

    if type(optimizer) is ChainedOptimizer or _is_layer_wise(optimizer):
        within = layer_wise or _is_layer_wise(optimizer)
        links = optimizer.chained_optimizers
        return [part for link in links for part in parts(link, layer_wise=within)]
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    if type(optimizer) is DistributedOptimizer:
        if getattr(optimizer.ddp_config, "use_megatron_fsdp", False):
            raise UsageError("cannot merge in training with Megatron FSDP (use_megatron_fsdp)")
        return [Distributed(optimizer)]
    if type(optimizer) in (Float16OptimizerWithFloat16Params, FP32Optimizer):
        return [LayerWise(optimizer) if layer_wise else Replicated(optimizer)]
    raise UsageError(
        f"cannot merge in training with optimizer {type(optimizer).__name__}: supported are "
        "DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer and "
        f"{_LAYER_WISE}"
    )


def update_weights(chunks: Sequence[torch.nn.Module], optimizer: Any) -> None:
    """Bring the main params of every rank to the model weights of all, by Megatron's own copy and
    all-gather. Collective over the data-parallel groups."""
    for part in parts(optimizer):
        part.copy_to_weights()
    for link in _layer_wise(optimizer):
        if not getattr(link, "use_buffer_param_sync", False):
            link.allgather_params()
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if getattr(config, "use_distributed_optimizer", False):
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def _layer_wise(optimizer: Any) -> Iterator[Any]:
    if _is_layer_wise(optimizer):
        yield optimizer
        return
    for link in getattr(optimizer, "chained_optimizers", ()):
        yield from _layer_wise(link)


def _is_layer_wise(optimizer: Any) -> bool:
    return any(base.__name__ == _LAYER_WISE for base in type(optimizer).__mro__)


def _pairs(params: Any, mains: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    for param_group, main_group in zip(params, mains, strict=True):
        yield from zip(param_group, main_group, strict=True)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _masters(steps: Any, param: torch.Tensor) -> list[torch.Tensor]:
    """The main param in an optimizer's state, if it is there."""
    state = steps.state.get(param, {})
    return [state[MASTER]] if MASTER in state else []


def _offloaded(hybrid: Any, shard: torch.Tensor) -> torch.Tensor:
    """What ``HybridDeviceOptimizer`` steps on, on the host or not; a load makes new ones."""
    inner: torch.Tensor = hybrid.param_to_inner_param[shard]
    return inner


def _loaded_to(hybrid: Any, shard: torch.Tensor) -> list[torch.Tensor]:
    """Until the first step after a load, the main param is there twice, and a save takes this."""
    inner = _offloaded(hybrid, shard)
    return [master for master in _masters(hybrid, shard) if master is not inner]
