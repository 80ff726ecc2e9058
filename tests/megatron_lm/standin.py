"""What Megatron-LM's training loop needs of CUDA beyond megatron-core, answered by the CPU."""

from __future__ import annotations

import builtins
import sys
import types
import typing
from typing import Any

import torch

from examples.cpu_ranks import cuda_standin, fused_adam

_ZERO_STATS = (
    "reserved_bytes.all.current",
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "allocation.all.current",
)


def install() -> None:
    """Call once a process, before anything of megatron is imported."""
    cuda_standin.install()
    _replace_device_queries()
    _replace_generators()
    _replace_modules()
    builtins.te_general_gemm = None  # type: ignore[attr-defined]  # 0.16 reads it without TE
    if not hasattr(typing, "override"):  # main asks for Python 3.12
        typing.override = lambda function: function  # type: ignore[attr-defined]


def _replace_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.is_initialized = lambda: True
    cuda.get_device_name = lambda *args: "cpu"
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1
    )
    cuda.mem_get_info = lambda *args: (1 << 34, 1 << 34)
    cuda.memory_stats = lambda *args: dict.fromkeys(_ZERO_STATS, 0)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
        "utilization",
    ):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    for name in ("ipc_collect", "set_stream", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.nvtx.mark = lambda *args: None


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _replace_generators() -> None:
    cuda: Any = torch.cuda
    cuda.default_generators = _Generators()
    cuda.manual_seed_all = cuda.manual_seed


class _FusedAdam(fused_adam.FusedAdam):
    """Takes the options for CUDA graphs that main passes on."""

    def __init__(self, params: Any, capturable: bool = False, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)


def _replace_modules() -> None:
    kernels: Any = sys.modules["megatron.core.transformer.custom_layers.batch_invariant_kernels"]
    kernels.__getattr__ = _function_of_kernels  # main imports more names from it
    optimizers: Any = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedSGD = _FusedAdam, torch.optim.SGD
    sys.modules[optimizers.__name__] = optimizers
    fused: Any = types.ModuleType("megatron.legacy.fused_kernels")  # would call nvcc
    fused.load = lambda *args: None
    sys.modules[fused.__name__] = fused


def _function_of_kernels(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: None
