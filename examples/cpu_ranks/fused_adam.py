"""AdamW with the state layout of Transformer Engine's and Apex's FusedAdam.

megatron-core's distributed optimizer treats plain ``torch.optim.Adam`` differently: it cannot
load a checkpoint before that optimizer's first step. The difference that matters is that
``step`` lives in the param group, not in each parameter's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (decoupled weight decay); one ``step`` counter a param group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (adam_w_mode) is implemented")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if group["params"]:  # as FusedAdam does, empty groups keep no step
                group["step"] = group.get("step", 0) + 1
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        beta1, beta2 = group["betas"]
        grad = param.grad.float()  # type: ignore[union-attr]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = 1.0, 1.0
        if group["bias_correction"]:
            correction1 = 1 - beta1 ** group["step"]
            correction2 = 1 - beta2 ** group["step"]
        denominator = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)


FusedSGD = torch.optim.SGD  # imported in one line with FusedAdam
