"""The arithmetic of the stand-ins for what needs CUDA, against the documented bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.megatron_lm.standins.adam8bit import decode, encode
from tests.megatron_lm.standins.fp8_tensor import Float8Tensor, transpose
from tests.megatron_lm.standins.fused_adam import FusedAdam
from tests.reference import rebuilt, same_bits, split


def bits(*patterns: int) -> torch.Tensor:
    """Float32 of these bits."""
    signed = [p - (1 << 32) if p >> 31 else p for p in patterns]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("value", "weight", "remainder"),
    [
        (0x3F800000, 0x3F80, 0),
        (0x3F807FFF, 0x3F80, 0x7FFF),
        (0x3F808000, 0x3F81, -0x8000),  # a tie goes up in magnitude
        (0x3F80FFFF, 0x3F81, -1),
        (0xBF808001, 0xBF81, -0x7FFF),
        (0x3FFFC000, 0x4000, -0x4000),  # into the next power of two
        (0x80000000, 0x8000, 0),
    ],
)
def test_remainders(value: int, weight: int, remainder: int) -> None:
    """``multi_tensor_adam.cu``: the low 16 bits, and the high ones, plus one where those are
    negative."""
    weights, remainders = split(bits(value))
    assert weights.view(torch.int16).item() & 0xFFFF == weight and remainders.item() == remainder
    assert same_bits(rebuilt(weights, remainders), bits(value))


def stepped(**options: Any) -> tuple[FusedAdam, torch.Tensor]:
    """Three steps of the precision-aware optimizer on one bf16 shard."""
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 96).bfloat16())
    adam = FusedAdam([weights], lr=1e-2, master_weights=True, use_decoupled_grad=True, **options)
    for step in range(3):
        weights.decoupled_grad = torch.sin(torch.arange(96.0) + step)  # type: ignore[attr-defined]
        adam.step()
    return adam, weights


def test_remainders_hold_what_whole_main_params_would() -> None:
    adam, weights = stepped(store_param_remainders=True)
    whole, rounded = stepped()
    kept = adam.get_unscaled_state(weights, "master_param")
    assert kept.dtype is torch.int16
    value = whole.get_unscaled_state(rounded, "master_param")
    assert same_bits(rebuilt(weights.detach(), kept), value)
    assert same_bits(rounded.detach(), value.bfloat16())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2**-11), (torch.uint8, 2**-4)])
def test_scaled_state_is_near_what_was_set(dtype: torch.dtype, error: float) -> None:
    adam, weights = stepped(exp_avg_dtype=dtype)
    value = torch.linspace(-3e-7, 1e-7, 96)
    adam.set_scaled_state(weights, "exp_avg", value.clone())
    found = adam.get_unscaled_state(weights, "exp_avg")
    assert found.dtype is torch.float32
    assert ((found - value).abs() <= error * 3e-7).all() and not torch.equal(found, value)


def test_remainders_must_be_integers() -> None:
    adam, weights = stepped(store_param_remainders=True)
    with pytest.raises(AssertionError):
        adam.set_scaled_state(weights, "master_param", torch.zeros(96))


def test_e4m3_codes_and_a_scale_for_each_block() -> None:
    values = torch.zeros(130, 4)
    values[0] = torch.tensor([448.0, 1.0, -1.0, 1.0625])
    values[129] = torch.tensor([44.8, 0.1, 0.0, 0.0])
    made = Float8Tensor.of(values)
    assert made._rowwise_scale_inv.shape == (2, 1)
    assert made._rowwise_scale_inv[:, 0].tolist() == pytest.approx([1, 0.1])
    assert made._rowwise_data[0].tolist() == [0x7E, 0x38, 0xB8, 0x38]  # a tie goes to even
    assert made._rowwise_data[129].tolist() == [0x7E, 0x38, 0, 0]
    assert made._quantizer.amax.item() == 448


def test_a_weight_in_fp8_works_as_its_values() -> None:
    made = Float8Tensor.of(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    inputs = torch.ones(4, 16)
    assert torch.equal(inputs @ made.t(), inputs @ made.dequantize().t())
    transpose([made])
    assert made._columnwise_data is not None and made._columnwise_data.shape == (16, 8)


def test_8_bit_moments_are_codes() -> None:
    values = torch.tensor([0.0, 2.0**-20, -(2.0**-10), 1e-4])
    codes = encode(values)
    assert codes.dtype is torch.uint8 and torch.equal(decode(codes)[:3], values[:3])
    assert decode(codes)[3].item() == pytest.approx(1e-4, rel=2**-3)
