"""Stands in for Transformer Engine's FP8 weights (``--fp8-param-gather``, blockwise recipe).

Kept of the real ones: a weight is a tensor subclass whose values are E4M3 codes and a float32 scale
for each block of 128 x 128; its codes lie in DDP's buffer; a copy into it quantises; the
distributed optimizer quantises shards of float32 main params with scales that the data-parallel
ranks agree on, and what is cached of the codes transposed is made anew after the all-gather; the
quantizer notes the largest value it saw (as delayed scaling does). Not kept: FP8 matrix products
(weights are dequantised to bf16 for them), scales rounded to powers of two, Transformer Engine's
own modules: the weights of Megatron's local linear layers are quantised as the model is wrapped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.utils._pytree import tree_map

_BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Quantizer:
    """``amax``: the largest value quantised, float32 of one element."""

    def __init__(self) -> None:
        self.amax = torch.zeros(1)


class Float8Tensor(torch.Tensor):
    """Codes, scales and, once asked for, the codes transposed; says that it is of another dtype."""

    _rowwise_data: torch.Tensor
    _rowwise_scale_inv: torch.Tensor
    _columnwise_data: torch.Tensor | None
    _quantizer: Quantizer

    @staticmethod
    def __new__(cls: Any, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device="cpu")
        made._rowwise_data, made._rowwise_scale_inv = codes, scales
        made._columnwise_data, made._quantizer = None, Quantizer()
        return made

    @classmethod
    def empty(cls, shape: Any, dtype: torch.dtype) -> Float8Tensor:
        """Zeros."""
        codes = torch.zeros(shape, dtype=torch.uint8)
        return cls(codes, torch.ones(_blocks(codes).shape), dtype)

    @classmethod
    def of(cls, values: torch.Tensor) -> Float8Tensor:
        """Quantised."""
        made = cls.empty(values.shape, values.dtype)
        made.copy_(values)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Tensor({self.dequantize()})"

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """Of the dtype it says."""
        return _values(self).to(self.dtype)

    def float(self) -> torch.Tensor:
        return _values(self)

    @classmethod
    def __torch_dispatch__(
        cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return _alias(args[0])
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            quantise(args[0], args[1].float() if isinstance(args[1], cls) else args[1])
            return args[0]
        plain = tree_map(lambda one: one.dequantize() if isinstance(one, cls) else one, args)
        return func(*plain, **(kwargs or {}))


def _alias(tensor: Float8Tensor) -> Float8Tensor:
    made = Float8Tensor(tensor._rowwise_data, tensor._rowwise_scale_inv, tensor.dtype)
    made._columnwise_data, made._quantizer = tensor._columnwise_data, tensor._quantizer
    return made


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """Zeros, one for each block of a tensor of two dimensions, or of one (a row)."""
    rows, columns = values.shape if values.dim() == 2 else (1, values.numel())
    return torch.zeros(-(-rows // _BLOCK), -(-columns // _BLOCK))


def _of_elements(tensor: Float8Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """A number for every element, of its block's."""
    rows, columns = tensor.shape if tensor.dim() == 2 else (1, tensor.numel())
    whole = blocks.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    return whole[:rows, :columns].contiguous().view(tensor.shape)


def _values(tensor: Float8Tensor) -> torch.Tensor:
    codes = tensor._rowwise_data.view(torch.float8_e4m3fn).float()
    return codes * _of_elements(tensor, tensor._rowwise_scale_inv)


def _largest(tensor: Float8Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of each block, of values of the tensor's shape."""
    rows, columns = tensor.shape if tensor.dim() == 2 else (1, tensor.numel())
    found = tensor._rowwise_scale_inv.new_zeros(tensor._rowwise_scale_inv.shape)
    flat = values.reshape(rows, columns).abs()
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            block = flat[row * _BLOCK :, column * _BLOCK :][:_BLOCK, :_BLOCK]
            found[row, column] = block.max()
    return found


def _set_scales(tensor: Float8Tensor, largest: torch.Tensor) -> None:
    tensor._rowwise_scale_inv.copy_(torch.where(largest > 0, largest / _LARGEST, 1.0))
    tensor._quantizer.amax.copy_(largest.max().view(1))
    tensor._columnwise_data = None


def _codes(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    scaled = (values / scales).clamp(-_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def quantise(tensor: Float8Tensor, values: torch.Tensor) -> None:
    """All of it, with scales of its own; from values rounded to the dtype that it says."""
    values = values.detach().to(tensor.dtype).float()
    _set_scales(tensor, _largest(tensor, values))
    tensor._rowwise_data.copy_(_codes(values, _of_elements(tensor, tensor._rowwise_scale_inv)))


def cast_master_weights(
    weights: list[Float8Tensor], mains: list[Any], starts: list[Any], group: Any, *_: Any
) -> None:
    """``cast_master_weights_to_fp8``: this rank's shards of main params, ``None`` where it has none
    of a weight. Collective over the group."""
    for tensor, main, start in zip(weights, mains, starts, strict=True):
        values = torch.zeros(tensor.numel())
        if main is not None:
            values[start : start + main.numel()] = main.to(tensor.dtype).float()
        largest = _largest(tensor, values.view(tensor.shape))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        _set_scales(tensor, largest)
        if main is not None:
            place = slice(start, start + main.numel())
            scales = _of_elements(tensor, tensor._rowwise_scale_inv).view(-1)[place]
            tensor._rowwise_data.view(-1)[place].copy_(_codes(values[place], scales))


def transpose(weights: list[Float8Tensor]) -> None:
    """``post_all_gather_processing``."""
    for tensor in weights:
        tensor._columnwise_data = tensor._rowwise_data.t().contiguous()


def _place(tensor: Float8Tensor, storage: torch.Tensor) -> None:
    """``replace_raw_data``: codes lie in DDP's buffer from now on."""
    storage.detach().copy_(tensor._rowwise_data)
    tensor._rowwise_data = storage


def install() -> None:
    """Put them where Megatron asks for Transformer Engine's."""
    from megatron.core import fp8_utils, utils
    from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import module

    utils._te_version = Version("2.2")  # where somebody asks: MoE with FP8
    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS, fp8_utils.FP8_TENSOR_CLASS = True, Float8Tensor
    fp8_utils.dequantize_fp8_tensor = lambda tensor: tensor.dequantize()
    fp8_utils._modify_underlying_storage_impl = _place
    fp8_utils._quantize_param_shard_impl = cast_master_weights
    fp8_utils._correct_amax_history_if_needed_impl = lambda model: None
    for user in (fp8_utils, distributed_data_parallel, param_and_grad_buffer):
        user.post_all_gather_processing = transpose
    param_and_grad_buffer.dist_all_gather_func = _gather_bytes
    wrap = module.Float16Module.__init__

    def wrapped(self: Any, config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        wrap(self, config, model, *args, **kwargs)
        for name, layer in model.named_modules():
            linear = isinstance(layer, ColumnParallelLinear | RowParallelLinear)
            if linear and "output_layer" not in name and layer.weight is not None:
                _quantise_weight(layer)

    module.Float16Module.__init__ = wrapped


def _quantise_weight(layer: Any) -> None:
    old = layer.weight
    initial = old.detach().clone()
    new: Any = torch.nn.Parameter(Float8Tensor.of(old.detach()))
    for name, value in vars(old).items():
        setattr(new, name, value)
    new.get_high_precision_init_val = lambda: initial
    new.clear_high_precision_init_val = lambda: None
    layer.weight = new


def _gather_bytes(output: torch.Tensor, own: torch.Tensor, **options: Any) -> Any:
    """Gloo takes a group of gathers for one dtype, which the buffers of codes and bf16 are not."""
    gather = dist.all_gather_into_tensor
    return gather(output.view(torch.uint8), own.view(torch.uint8), **options)
