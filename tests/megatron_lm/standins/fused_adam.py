"""Stands in for Transformer Engine's ``FusedAdam``, which is the precision-aware optimizer.

Kept of the real one: its options, which state it makes and of which dtype, that it steps on the
decoupled gradient, writes the model weights itself, and keeps main params as float32, as float16
with a scale, or as the 16 bits by which float32 differs from the bf16 weights; that state which is
not float32 is read by ``get_unscaled_state`` and written by ``set_scaled_state``, which chooses the
scale anew; that the master param of a float32 weight is made, saved and never stepped on. Not kept:
the CUDA kernels (AdamW is computed here by torch operations, in another order), FP8 moments other
than by ``fp8_tensor.py``.

Everything else in Megatron believes, as before, that there is no Transformer Engine.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import torch
from packaging.version import Version

from tests.reference import rebuilt, split

_NAMES = ("exp_avg", "exp_avg_sq", "master_param")
_LARGEST = {torch.float16: torch.finfo(torch.float16).max / 2, torch.uint8: 448.0}


class FusedAdam(torch.optim.Optimizer):
    """AdamW with state of any dtype."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        fused: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "not in this stand-in"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})
        self.master_weights, self.master_weight_dtype = master_weights, master_weight_dtype
        self.use_decoupled_grad = use_decoupled_grad
        whole = master_weights and master_weight_dtype == torch.float32
        self.store_param_remainders = store_param_remainders and whole
        dtypes = (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype)
        self.name_to_dtype_map = dict(zip(_NAMES, dtypes, strict=True))
        self._scales: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    def _remains(self, param: torch.Tensor, name: str) -> bool:
        kept = self.store_param_remainders and name == "master_param"
        return kept and param.dtype == torch.bfloat16

    def _initialize_state(
        self, param: torch.Tensor, name: str, zero: bool, remainders: bool = False
    ) -> None:
        dtype = torch.int16 if remainders else self.name_to_dtype_map[name]
        state = torch.zeros(param.shape, dtype=dtype)
        if dtype == torch.uint8:
            from tests.megatron_lm.standins.fp8_tensor import Float8Tensor

            state = Float8Tensor.empty(param.shape, torch.float32)
        self.state[param][name] = state
        if self.name_to_dtype_map[name] != torch.float32:
            self._scales.setdefault(param, {})[name] = torch.ones(1)

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """All state of a param, zeros but for the master param."""
        self._initialize_state(param, "exp_avg", True)
        self._initialize_state(param, "exp_avg_sq", True)
        if self.master_weights:
            self._initialize_state(param, "master_param", False, store_param_remainders)
            if not store_param_remainders:
                self.set_scaled_state(param, "master_param", param.detach().clone().float())

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        """State as float32: itself where it is kept so, else a copy; remainders as they are."""
        state = self.state[param][state_name]
        dtype = self.name_to_dtype_map[state_name]
        if dtype == torch.float32:
            assert state.dtype == (
                torch.int16 if self._remains(param, state_name) else torch.float32
            )
            return state
        unscaled = state.float()
        return (
            unscaled.mul_(self._scales[param][state_name]) if dtype == torch.float16 else unscaled
        )

    def set_scaled_state(
        self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor
    ) -> None:
        """The reverse; changes ``unscaled_state`` where it scales it."""
        remains = self._remains(param, state_name)
        assert unscaled_state.dtype == (torch.int16 if remains else torch.float32)
        if state_name not in self.state[param]:
            self._initialize_state(param, state_name, False, remains)
        state, dtype = self.state[param][state_name], self.name_to_dtype_map[state_name]
        if dtype in _LARGEST:
            scale = self._scales[param][state_name]
            largest = unscaled_state.abs().max() if unscaled_state.numel() else torch.zeros(())
            torch.div(largest.view(1), _LARGEST[dtype], out=scale)
            if dtype == torch.float16:
                unscaled_state.mul_(torch.where(scale > 0, scale.reciprocal(), 0.0))
        state.copy_(unscaled_state)

    def state_dict(self) -> dict[str, Any]:
        state_dict: dict[str, Any] = super().state_dict()
        for number, param in self._numbered():
            if number in state_dict["state"]:
                names = state_dict["state"][number]
                state_dict["state"][number] = {
                    name: self.get_unscaled_state(param, name) for name in names
                }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for number, param in self._numbered():
            if number in state_dict["state"]:
                self.state[param] = {}
                for name, value in state_dict["state"][number].items():
                    remains = self._remains(param, name)
                    self.set_scaled_state(param, name, value if remains else value.float())

    def _numbered(self) -> list[tuple[int, torch.Tensor]]:
        params = (param for group in self.param_groups for param in group["params"])
        return list(enumerate(params))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, self._remains(param, "master_param"))
                name = "decoupled_grad" if self.use_decoupled_grad else "grad"
                if (grad := getattr(param, name, None)) is not None:
                    self._update(param, grad.float(), group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        first = self.get_unscaled_state(param, "exp_avg")
        second = self.get_unscaled_state(param, "exp_avg_sq")
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        value = self._value(param)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (second / correction2).sqrt_().add_(group["eps"])
        value.addcdiv_(first, denominator, value=-group["lr"] / correction1)
        self._keep(param, value)
        for name, state in (("exp_avg", first), ("exp_avg_sq", second)):
            if self.name_to_dtype_map[name] != torch.float32:
                self.set_scaled_state(param, name, state)

    def _value(self, param: torch.Tensor) -> torch.Tensor:
        """What the step changes: the float32 main param."""
        if not self.master_weights or param.dtype == torch.float32:
            return param.detach()
        if self._remains(param, "master_param"):
            return rebuilt(param.detach(), self.state[param]["master_param"])
        return self.get_unscaled_state(param, "master_param")

    def _keep(self, param: torch.Tensor, value: torch.Tensor) -> None:
        if not self.master_weights or param.dtype == torch.float32:
            return
        if self._remains(param, "master_param"):
            weights, remainders = split(value)
            param.detach().copy_(weights)
            self.state[param]["master_param"].copy_(remainders)
            return
        param.detach().copy_(value)
        if self.master_weight_dtype != torch.float32:
            self.set_scaled_state(param, "master_param", value)


def install() -> None:
    """Put it where Megatron's optimizers look for it, and nowhere else."""
    name = "transformer_engine.pytorch.optimizers"
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.FusedAdam = FusedAdam
    sys.modules[name] = module  # its parents are not there: no other import finds anything
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    for user in (optimizer, optimizer_config):
        user.is_te_min_version = _is_min_version


def _is_min_version(version: str, **_: Any) -> bool:
    """Before 2.1, main params are kept whole."""
    return Version(os.environ.get("TE_VERSION", "2.9")) >= Version(version)
