"""What merged weights overwrite comes back, whatever holds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.megatron_lm.standins.fp8_tensor import Float8Tensor, transpose
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.stash import Stash
from wsm_megatron.plugin.values import Plain


def stash_of(chunk: torch.nn.Module, *tensors: torch.Tensor) -> Stash:
    def shard(tensor: torch.Tensor) -> Shard:
        size = tensor.numel()
        value, device = Plain(lambda: tensor), tensor.device
        return Shard(name="main.x", value=value, device=device, numel=size, start=0, stop=size)

    stash = Stash()
    stash.fill([chunk], [shard(tensor) for tensor in tensors])
    return stash


def test_weights_and_main_params() -> None:
    chunk = torch.nn.Linear(3, 2)
    main = torch.tensor([1.0, -0.0, float("nan")])
    before = [tensor.detach().clone() for tensor in (*chunk.parameters(), main)]
    stash = stash_of(chunk, main)
    with torch.no_grad():
        for tensor in (*chunk.parameters(), main):
            tensor.fill_(7)
    stash.put_back()
    for tensor, saved in zip((*chunk.parameters(), main), before, strict=True):
        assert torch.equal(tensor.detach().view(torch.int32), saved.view(torch.int32))


def test_codes_scales_and_caches_of_a_quantised_weight() -> None:
    chunk = torch.nn.Linear(16, 8, bias=False)
    weight: Any = torch.nn.Parameter(Float8Tensor.of(torch.randn(8, 16)))
    chunk.weight = weight
    transpose([weight])
    weight.main_grad = torch.zeros(8, 16)
    names = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data")
    held = {name: getattr(weight, name) for name in names} | {"amax": weight._quantizer.amax}
    before = {name: tensor.clone() for name, tensor in held.items()}
    stash = stash_of(chunk)
    weight.data.copy_(torch.randn(8, 16) * 99)
    weight._columnwise_data = None
    weight.main_grad.fill_(1)
    stash.put_back()
    for name in names:
        assert getattr(weight, name) is held[name], name
    for name, tensor in held.items():
        assert torch.equal(tensor, before[name]), name
    assert (weight.main_grad == 1).all(), "no part of the weight"


def test_a_cache_that_was_not_there_is_dropped_again() -> None:
    chunk = torch.nn.Linear(16, 8, bias=False)
    weight: Any = torch.nn.Parameter(Float8Tensor.of(torch.randn(8, 16)))
    chunk.weight = weight
    stash = stash_of(chunk)
    transpose([weight])
    stash.put_back()
    assert weight._columnwise_data is None


def test_amax_histories_of_delayed_scaling() -> None:
    """An evaluation adds to them."""
    chunk: Any = torch.nn.Linear(2, 2)
    forward = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))
    chunk.fp8_meta = {"scaling_fwd": forward, "recipe": object(), "num_gemms": 1}
    stash = stash_of(chunk)
    forward.amax_history[0] = 5
    forward.scale.mul_(2)
    stash.put_back()
    assert (forward.amax_history == 0).all() and (forward.scale == 1).all()
