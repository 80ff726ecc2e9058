"""What Megatron FSDP and torch FSDP2 need beyond the stand-in for CUDA, on gloo ranks."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def install() -> None:
    """Call once a rank, after the stand-in for CUDA."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"  # FSDP refuses 1
    torch.cuda.current_device = lambda: 0  # it is put into "cuda:0"
    torch.Tensor.record_stream = lambda *args: None  # type: ignore[method-assign,assignment]
    _replace_meshes()
    dist.ProcessGroupNCCL = type("ProcessGroupNCCL", (), {"Options": lambda *args, **kwargs: None})
    _make_all_states()
    _mend_megatron()


def _replace_meshes() -> None:
    """A mesh of type ``cuda`` is one of type ``cpu``."""
    init, from_group = DeviceMesh.__init__, DeviceMesh.from_group

    def on_cpu(device_type: str) -> str:
        return "cpu" if device_type == "cuda" else device_type

    def patched_init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, on_cpu(device_type), *args, **kwargs)

    def patched_from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, on_cpu(device_type), *args, **kwargs)

    DeviceMesh.__init__ = patched_init  # type: ignore[method-assign]
    DeviceMesh.from_group = staticmethod(patched_from_group)  # type: ignore[method-assign,assignment]


def _make_all_states() -> None:
    """As Transformer Engine's FusedAdam does, for params without a gradient (empty shards) too:
    ranks would else disagree about which state there is to save."""
    optimizer = importlib.import_module("apex.optimizers").FusedAdam
    step = optimizer.step

    @torch.no_grad()
    def patched(self: Any, closure: Any = None) -> None:
        for param in (param for group in self.param_groups for param in group["params"]):
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[param].setdefault(name, torch.zeros_like(param, dtype=torch.float32))
        step(self, closure)

    optimizer.step = patched


def _mend_megatron() -> None:
    """Two calls of core_v0.16.1 that its own methods do not take; without these torch FSDP2 takes
    no step and no ``torch_dcp`` checkpoint is loaded. Main still has the second."""
    base = importlib.import_module("megatron.core.distributed.data_parallel_base")._BaseDataParallel
    finish = base.finish_grad_sync
    base.finish_grad_sync = lambda self, *args, **kwargs: finish(self)
    chained = importlib.import_module("megatron.core.optimizer.optimizer").ChainedOptimizer
    chained.state_dict = lambda self, **options: self.chained_optimizers[0].state_dict(**options)
