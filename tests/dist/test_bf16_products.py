"""bf16 products in float32, as ranks on a CPU without bf16 instructions compute them."""

from __future__ import annotations

import subprocess
import sys

_PRODUCTS = """
import torch
from examples.cpu_ranks import bf16_products

torch.manual_seed(1)
def factor(*shape):
    return torch.randn(shape).bfloat16().requires_grad_()

bf16_products.install()
for name, one, other in (
    ("matmul", factor(64, 96), factor(96, 32)),
    ("bmm", factor(3, 64, 96), factor(3, 96, 32)),
):
    product = getattr(torch, name)(one, other)
    assert product.dtype is torch.bfloat16
    got = torch.autograd.grad(product.sum(), (one, other))
    exact = [factor.detach().double().requires_grad_() for factor in (one, other)]
    wanted = getattr(torch, name)(*exact)
    torch.testing.assert_close(product.double(), wanted, rtol=2**-8, atol=1e-6)
    for mine, its in zip(got, torch.autograd.grad(wanted.sum(), exact)):
        assert mine.dtype is torch.bfloat16
        torch.testing.assert_close(mine.double(), its, rtol=2**-8, atol=1e-6)

# One rounding: what bf16 sums would lose is there.
ones, small = torch.ones(1, 1025).bfloat16(), torch.full((1025, 1), 2.0**-9).bfloat16()
small[0] = 1
assert (ones @ small).item() == 3.0
assert torch.matmul(torch.ones(2, 2), torch.ones(2, 2)).dtype is torch.float32
bias = torch.zeros(32).bfloat16()
assert torch.nn.functional.linear(factor(4, 8), factor(32, 8), bias).dtype is torch.bfloat16
assert torch.nn.functional.linear(factor(4, 8), factor(32, 8), None).dtype is torch.bfloat16
"""


def test_products_and_gradients_are_rounded_once() -> None:
    """In a process of its own: it replaces torch's functions."""
    subprocess.run([sys.executable, "-c", _PRODUCTS], check=True, timeout=300)
