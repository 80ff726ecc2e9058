"""How a value that training works on is read and written, and which tensors hold it.

The twin in memory of ``optimizer/representation.py``, whose arithmetic it uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from wsm_megatron.optimizer.representation import REMAINDER, round_main

MASTER = "master_param"
"""Transformer Engine's name of a main param in an optimizer's state."""


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of Transformer Engine's quantised ones (FP8, MXFP8, NVFP4, …)."""
    return hasattr(tensor, "_quantizer") or hasattr(tensor, "quantizer")


class Value(ABC):
    """A main param, moment or buffer of this rank, looked up whenever it is used: a load may
    replace the tensors that hold it."""

    @property
    def dtype(self) -> torch.dtype:
        """What a merged value is rounded to, before :meth:`write`."""
        return torch.float32

    @property
    def exists(self) -> bool:
        """False before the first step of an optimizer that makes its state then."""
        return True

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The value, flat and floating: a view of the tensor that holds it, or made anew."""

    @abstractmethod
    def write(self, value: torch.Tensor, start: int = 0) -> bool:
        """Put a flat merged value in place, from element ``start`` on.

        Returns:
            whether no finite value became an infinite one.
        """

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """What :meth:`write` changes, but for the model weights."""


class Plain(Value):
    """A floating tensor that is the value."""

    def __init__(self, live: Callable[[], torch.Tensor]) -> None:
        self._live = live

    @property
    def dtype(self) -> torch.dtype:
        return self._live().dtype

    def read(self) -> torch.Tensor:
        return self._live().detach().view(-1)

    def write(self, value: torch.Tensor, start: int = 0) -> bool:
        self.read()[start : start + value.numel()].copy_(value)
        return True

    def tensors(self) -> list[torch.Tensor]:
        return [self._live()]


class Scaled(Value):
    """State of Transformer Engine's ``FusedAdam``: float32, or fewer bits times a scale.

    Read and written by the optimizer's own ``get_unscaled_state`` and ``set_scaled_state``, as
    Megatron does for checkpoints: the merge is rounded to float32, then to what is kept.

    Args:
        param: the optimizer's. name: ``exp_avg``, ``exp_avg_sq`` or ``master_param``.
    """

    def __init__(self, adam: Any, param: torch.Tensor, name: str) -> None:
        self._adam, self._param, self._name = adam, param, name

    @property
    def exists(self) -> bool:
        return self._name in self._adam.state.get(self._param, {})

    def read(self) -> torch.Tensor:
        unscaled: torch.Tensor = self._adam.get_unscaled_state(self._param, self._name)
        return unscaled.detach().view(-1)

    def write(self, value: torch.Tensor, start: int = 0) -> bool:
        state = self._adam.state[self._param][self._name]
        assert start == 0 and value.numel() == state.numel(), "one scale for all of it"
        unscaled = value.to(state.device, torch.float32, copy=True)  # it is scaled in place
        self._adam.set_scaled_state(self._param, self._name, unscaled.view(state.shape))
        return True

    def tensors(self) -> list[torch.Tensor]:
        scales = self._adam._scales.get(self._param, {})
        held = (self._adam.state[self._param][self._name], scales.get(self._name))
        return [tensor for tensor in held if tensor is not None]


class Remainders(Value):
    """A float32 main param of which the optimizer has the low 16 bits, the weights the rest.

    Args:
        held: the int16 remainders, where they are there. weights: bfloat16, of the same elements.
    """

    def __init__(self, held: Callable[[], list[torch.Tensor]], weights: torch.Tensor) -> None:
        self._held, self._weights = held, weights.detach().view(-1)

    @property
    def exists(self) -> bool:
        return bool(self._held())

    def read(self) -> torch.Tensor:
        value = torch.empty_like(self._weights, dtype=torch.float32)
        REMAINDER.rebuild(self._remainders(), self._weights, value)
        return value

    def write(self, value: torch.Tensor, start: int = 0) -> bool:
        place = slice(start, start + value.numel())
        merged = value.to(self._weights.device, copy=True)
        return bool(REMAINDER.write(merged, self._remainders()[place], self._weights[place]))

    def tensors(self) -> list[torch.Tensor]:
        return self._held()

    def _remainders(self) -> torch.Tensor:
        (main,) = self._held()
        return main.view(-1)


class Copied(Value):
    """A value of which there are copies that Megatron does not make: the model's own weights, where
    the optimizer keeps the main param and writes both in its step.

    Args:
        weights: of the same elements, quantised perhaps; None where the value is the weights.
        others: more tensors of them, floating.
    """

    def __init__(
        self,
        value: Value,
        *,
        weights: torch.Tensor | None = None,
        others: Callable[[], list[torch.Tensor]] = list,
    ) -> None:
        self._value, self._weights, self._others = value, weights, others

    @property
    def dtype(self) -> torch.dtype:
        return self._value.dtype

    @property
    def exists(self) -> bool:
        return self._value.exists

    def read(self) -> torch.Tensor:
        return self._value.read()

    def write(self, value: torch.Tensor, start: int = 0) -> bool:
        finite = self._value.write(value, start)
        copies = self._others() if self._weights is None else [self._weights, *self._others()]
        return all([finite, *(_round_to(copy, value, start) for copy in copies)])

    def tensors(self) -> list[torch.Tensor]:
        return [*self._value.tensors(), *self._others()]


def _round_to(copy: torch.Tensor, value: torch.Tensor, start: int) -> bool:
    """Whether no finite value became an infinite one."""
    value = value.to(copy.device)
    if is_quantised(copy):
        assert start == 0 and value.numel() == copy.numel(), "one scale for all of it"
        copy.detach().copy_(value.view(copy.shape))
        return True
    return bool(round_main(value, copy.detach().view(-1)[start : start + value.numel()]))
