"""How a main param is kept, and how it stands to its model tensor.

Megatron steps on a float32 value for every weight. What of that value is in a checkpoint depends on
the run: the value itself, which the model tensor is rounded from; its low 16 bits, while the model
tensor has the high ones; a value that the model tensor is quantised from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from wsm_megatron.kernels import Finite
from wsm_megatron.kernels.finite import all_finite

REMAINDER_RANGE = (-(2**15), 2**15 - 1)
"""Of an int16."""


@dataclass(frozen=True)
class Representation:
    """The usual one: a floating main param, and a model tensor that is that value, rounded.

    Attributes:
        finer: the main param says more of the weights than a rounding would lose: it is merged also
            where no optimizer state is kept.
        rebuilt: the value has to be made from main param and model tensor together.
        apart: what belongs together can be told from the rounded main param and the model tensor,
            each read by another rank.
    """

    finer = False
    rebuilt = False
    apart = True

    def differ(self, main: torch.Tensor, model: torch.Tensor) -> Finite:
        """Whether a main param cannot be that of a model tensor; on CUDA as a tensor."""
        return differ(main.to(model.dtype), model)

    def rebuild(self, main: torch.Tensor, model: torch.Tensor, value: torch.Tensor) -> None:
        """Fill ``value`` (float32) with what is summed; only where it is ``rebuilt``."""
        raise NotImplementedError

    def write(self, value: torch.Tensor, main: torch.Tensor | None, model: torch.Tensor) -> Finite:
        """Fill main param and model tensor from a merged value.

        Args:
            main: None where it is the value itself, or not kept.

        Returns:
            whether no finite value became an infinite one; on a CPU at once, on CUDA as a tensor.
        """
        if main is not None:
            main.copy_(value)
        return round_main(value, model)

    def from_model(self, model: torch.Tensor, main: torch.Tensor) -> None:
        """Fill a main param with that of a model tensor as it is."""
        main.copy_(model)


@dataclass(frozen=True)
class Remainder(Representation):
    """The low 16 bits of the value, of which the bfloat16 model tensor has the high ones.

    Transformer Engine's fused Adam (``store_param_remainders``, ``multi_tensor_adam.cu``) keeps
    them as int16. The model tensor is the value rounded half up in magnitude: its bits are the
    high half of the value's, plus one where the remainder, read as signed, is negative. So the
    value's bits are the model's, shifted up, plus the signed remainder. Any remainder fits any
    weights; ``fully_reshardable`` saves them as float32, which holds the same integers.
    """

    finer = True
    rebuilt = True
    apart = False

    def differ(self, main: torch.Tensor, model: torch.Tensor) -> Finite:
        """Whether these are no remainders."""
        if not main.is_floating_point():
            return False
        low, high = REMAINDER_RANGE
        wrong = ~((main == main.round()) & (main >= low) & (main <= high)).all()
        return bool(wrong) if main.device.type == "cpu" else wrong

    def rebuild(self, main: torch.Tensor, model: torch.Tensor, value: torch.Tensor) -> None:
        bits = value.view(torch.int32)
        bits.copy_(model.view(torch.int16)).bitwise_left_shift_(16).add_(main.to(torch.int32))

    def write(self, value: torch.Tensor, main: torch.Tensor | None, model: torch.Tensor) -> Finite:
        bits = value.view(torch.int32)
        low = bits.to(torch.int16)
        if main is not None:
            main.copy_(low)
        if model.dtype is not torch.bfloat16:
            return round_main(value, model)
        model.view(torch.int16).copy_((bits - low) >> 16)
        return all_finite(model)

    def from_model(self, model: torch.Tensor, main: torch.Tensor) -> None:
        main.zero_()


@dataclass(frozen=True)
class Bounded(Representation):
    """A floating main param, and a model tensor that is near it, within the error of a format.

    Attributes:
        why: what makes them differ, for messages.
        relative: largest difference, as a part of the larger one of the two.
        absolute: the same of values near zero, as a part of the largest one in a tile.
        saturates: the largest values may have been cut off.
        finer: the main params are the weights, of which the model tensor is a coarse copy.
    """

    why: str
    relative: float
    absolute: float
    saturates: bool = False
    finer: bool = False
    apart = False

    @property
    def known(self) -> bool:
        """Whether there is a bound; without one, any main param passes."""
        return math.isfinite(self.relative)

    def differ(self, main: torch.Tensor, model: torch.Tensor) -> Finite:
        if not self.known:
            return False
        wrong = ~self.close(main, model).all()
        return bool(wrong) if main.device.type == "cpu" else wrong

    def close(self, main: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        """Which elements can belong together."""
        main, model = main.float(), model.float()
        size = torch.maximum(main.abs(), model.abs())
        largest = size.amax(-1, keepdim=True) if size.numel() else size
        near = (main - model).abs() <= self.relative * size + self.absolute * largest
        near |= main == model  # infinite ones
        if self.saturates and size.numel():
            top = model.abs() == model.abs().amax(-1, keepdim=True)
            near |= top & (main.sign() == model.sign()) & (main.abs() >= model.abs())
        return near


ROUNDED = Representation()
REMAINDER = Remainder()


def round_main(main: torch.Tensor, model: torch.Tensor) -> Finite:
    """Round a merged main param to its model tensor, as Megatron copies mains to weights.

    Returns:
        whether no finite value became an infinite one; on a CPU at once, on CUDA as a tensor.
    """
    model.copy_(main)
    if torch.finfo(model.dtype).max >= torch.finfo(main.dtype).max:
        return True
    return all_finite(model)


def differ(left: torch.Tensor, right: torch.Tensor) -> Finite:
    """Whether any bit differs; on a CPU at once, on CUDA as a tensor."""
    left, right = left.view(torch.uint8), right.view(torch.uint8)
    return not torch.equal(left, right) if left.device.type == "cpu" else (left != right).any()
