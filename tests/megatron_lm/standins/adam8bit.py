"""Stands in for an 8-bit Adam (bitsandbytes' ``AdamW8bit``): moments are codes, uint8.

Kept of the real one: the state of a param is integers of its shape, which mean something by a code
book alone. Not kept: the code book (here E5M2 floats times 2^24; there quantiles) and its scales by
blocks, which upstream Megatron could not save.
"""

from __future__ import annotations

from typing import Any

import torch

from examples.cpu_ranks import fused_adam

_SCALE = 2.0**24


def encode(values: torch.Tensor) -> torch.Tensor:
    return (values * _SCALE).clamp(-57344, 57344).to(torch.float8_e5m2).view(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e5m2).float() / _SCALE


class Adam8bit(fused_adam.FusedAdam):
    """AdamW that keeps ``exp_avg`` and ``exp_avg_sq`` in 8 bits."""

    def __init__(self, params: Any, capturable: bool = False, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        for name, codes in list(state.items()):
            state[name] = decode(codes)
        super()._update(param, group)
        for name, values in list(state.items()):
            state[name] = encode(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch would make floats of codes; Megatron fills them in afterwards."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name, values in state.items():
                state[name] = torch.zeros_like(values, dtype=torch.uint8)


def install() -> None:
    """In place of Adam."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = Adam8bit
