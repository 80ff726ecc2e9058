"""Answer megatron-core's CUDA calls on the CPU.

megatron-core 0.16 takes a CUDA device for granted: it allocates on ``torch.cuda.current_device()``,
recognises dtypes by strings such as ``torch.cuda.BFloat16Tensor``, and orders work by streams.
``install()`` replaces those names, in the calling process only, before megatron is imported.
Never import this in a process that should see a real GPU.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TYPE_STRINGS = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def install() -> None:
    """Replace what megatron-core needs of CUDA; call once a process, before importing megatron."""
    _switch_off_compile()
    _replace_device_functions()
    _replace_streams()
    _replace_rng()
    _replace_optional_modules()
    _DeviceToCpu().__enter__()


def _switch_off_compile() -> None:
    """Nothing here is worth compiling."""
    namespace: Any = torch
    namespace.compile = lambda model=None, **kwargs: model if model is not None else lambda fn: fn


class _DeviceToCpu(TorchFunctionMode):
    """``device="cuda"`` means the CPU; ``Tensor.type()`` claims CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _TYPE_STRINGS.get(name, name)
        if func is torch.Tensor.to:
            if kwargs.get("non_blocking"):  # between device and host it would be a copy
                kwargs["copy"] = True
            args = (args[0], *(_CPU if _is_cuda(arg) else arg for arg in args[1:]))
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _nothing() -> Callable[..., None]:
    """A new function for a call that only matters on a device.

    New each time: torch's Dynamo, once imported, refuses one function under two names.
    """
    return lambda *args, **kwargs: None


def _replace_device_functions() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: _CPU  # not 0: _DeviceToCpu is off inside backward passes
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda._lazy_call = lambda call, **kwargs: call()
    for name in ("set_device", "synchronize", "empty_cache", "_lazy_init"):
        setattr(cuda, name, _nothing())
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _nothing())


class _Stream:
    """A stream or event on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = _nothing()

    def record_event(self, *args: Any) -> _Stream:
        return self


def _replace_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *args: _Stream()
    cuda.default_stream = lambda *args: _Stream()
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.device = lambda *args: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False


def _replace_rng() -> None:
    """The "CUDA" generator is the CPU's default generator."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    bindings: Any = torch._C
    bindings._cuda_setRNGState = torch.set_rng_state  # megatron-core's own way around set_rng_state


def _replace_optional_modules() -> None:
    from examples.cpu_ranks import fused_adam

    # NVIDIA's Apex; `import apex` itself still fails, so no other part of it is looked for.
    sys.modules["apex.optimizers"] = fused_adam
    kernels: Any = types.ModuleType(
        "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    )
    kernels.is_batch_invariant_mode_enabled = lambda: False
    sys.modules[kernels.__name__] = kernels  # imports triton, which a CPU build of torch lacks
