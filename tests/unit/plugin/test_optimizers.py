"""Which optimizer state is a moment, and how a main param is told from another weight's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.megatron_lm.standins.fp8_tensor import Float8Tensor
from tests.reference import same_bits, split
from wsm_megatron.optimizer.precision import FP16_MAINS, quantised_as
from wsm_megatron.optimizer.representation import REMAINDER, ROUNDED, Representation
from wsm_megatron.plugin.optimizers import MainParam
from wsm_megatron.plugin.values import Copied, Plain, Remainders, Scaled, Value

SHAPE = (8, 32)


def main_param(
    state: dict[str, Any] | None = None,
    weights: torch.Tensor | None = None,
    value: Value | None = None,
    kind: Representation = ROUNDED,
    **options: Any,
) -> MainParam:
    """Of ones, by an optimizer with this state."""
    main = torch.ones(SHAPE)
    param: Any = torch.ones(SHAPE, dtype=torch.bfloat16) if weights is None else weights
    steps: Any = SimpleNamespace(state={main: state} if state else {}, defaults=options)
    value = Plain(lambda: main) if value is None else value
    return MainParam(param=param, value=value, stepped=main, steps=steps, kind=kind)


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"step": torch.tensor(3.0), "exp_avg": torch.zeros(SHAPE)}, ["exp_avg"]),
        ({"momentum_buffer": torch.zeros(SHAPE)}, ["momentum_buffer"]),
        ({"momentum_buffer": None}, []),
        (
            {"exp_avg_slow": torch.zeros(SHAPE), "exp_avg_fast": torch.zeros(SHAPE)},
            ["fast", "slow"],
        ),
        ({"exp_avg": torch.zeros(SHAPE), "L": torch.eye(8), "R": torch.eye(32)}, ["exp_avg"]),
        ({"exp_avg": torch.zeros(SHAPE), "master_param": torch.zeros(SHAPE)}, ["exp_avg"]),
        ({"exp_avg": torch.zeros(SHAPE, dtype=torch.bfloat16)}, ["exp_avg"]),
        (
            {
                "state1": torch.zeros(SHAPE, dtype=torch.uint8),
                "absmax1": torch.zeros(1),
                "qmap1": torch.zeros(SHAPE),  # a code book may be of the param's shape
            },
            [],
        ),
    ],
)
def test_moments_are_floating_state_of_the_params_shape(
    state: dict[str, Any], names: list[str]
) -> None:
    found = list(main_param(state).moments())
    assert [name.removeprefix("exp_avg_") for name in found] == names
    assert main_param(state).has_state


def test_before_the_first_step_there_are_none() -> None:
    assert not main_param().has_state and main_param().moments() == {}
    assert not main_param(momentum=0.9).has_state and main_param(momentum=0).has_state


def test_a_rounded_main_param_is_compared_bit_by_bit() -> None:
    weights = torch.ones(SHAPE, dtype=torch.bfloat16)
    assert not main_param(weights=weights).is_of_other_weights()
    weights[0, 0] = 1 + 2**-7
    assert main_param(weights=weights).is_of_other_weights()


def test_quantised_weights_are_compared_within_their_formats_error() -> None:
    kind = quantised_as({"fp8_param_gather": True, "fp8_recipe": "blockwise"})
    assert kind is not None
    near = Float8Tensor.of(torch.full(SHAPE, 1.03, dtype=torch.bfloat16))
    assert not main_param(weights=near, kind=kind).is_of_other_weights()
    far = Float8Tensor.of(torch.full(SHAPE, 1.5, dtype=torch.bfloat16))
    assert main_param(weights=far, kind=kind).is_of_other_weights()


def test_any_remainders_fit_and_what_is_not_there_yet_fits() -> None:
    weights = torch.full(SHAPE, 9, dtype=torch.bfloat16)
    remainders = Remainders(list, weights)
    assert not main_param(weights=weights, value=remainders, kind=REMAINDER).is_of_other_weights()
    adam: Any = SimpleNamespace(state={})
    missing = Copied(Scaled(adam, weights, "master_param"), weights=weights)
    assert not main_param(weights=weights, value=missing, kind=FP16_MAINS).is_of_other_weights()


def test_a_part_of_remainders_is_written_with_its_weights() -> None:
    value = torch.randn(64, generator=torch.Generator().manual_seed(1))
    weights, remainders = split(value)
    main = Remainders(lambda: [remainders], weights)
    merged = value[16:32] * 3
    assert main.write(merged, 16)
    expected = torch.cat([value[:16], merged, value[32:]])
    assert same_bits(main.read(), expected)
    assert all(
        same_bits(*pair) for pair in zip((weights, remainders), split(expected), strict=True)
    )


@pytest.mark.parametrize("kept", ["remainders", "masters"])
def test_a_merge_that_overflows_the_weights_is_noticed(kept: str) -> None:
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    weights, low = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16)
    main = torch.zeros(4)
    value: Value = Remainders(lambda: [low], weights)
    if kept == "masters":
        value = Copied(Plain(lambda: main), weights=weights)
    assert not value.write(largest)
