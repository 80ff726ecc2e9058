"""Stands in for Transformer Engine's norm and attention where Megatron's own layers refuse.

Kept: shapes, parameters and who holds them, the communication around them, gradients that are
deterministic. Not kept: under context parallelism a rank attends to its own tokens only, so the
losses are not those of the whole sequence. Merging does not look at losses.

- RMSNorm under sequence parallelism: torch's, with parameters marked as Megatron's are.
- Attention under context parallelism, and with keys and values of sizes of their own (multi-latent
  attention).
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def install() -> None:
    """Call after the stand-in for CUDA."""
    _allow_sequence_parallel_norms()
    _allow_attention()
    _name_engine_layers()


def _allow_sequence_parallel_norms() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    def patched(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        norm = make(cls, _with(config, sequence_parallel=False), *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = patched


def _allow_attention() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    init, forward = DotProductAttention.__init__, DotProductAttention.forward

    def patched_init(
        self: Any, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        init(self, _with(config, context_parallel_size=1), *args, **kwargs)
        if v_channels is not None:
            heads = self.num_attention_heads_per_partition
            self.hidden_size_per_partition = heads * v_channels

    def patched_forward(
        self: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(attention_mask, torch.Tensor):
            attention_mask = attention_mask[..., : query.shape[0], : key.shape[0]]
        return forward(self, query, key, value, attention_mask, *args, **kwargs)

    DotProductAttention.__init__ = patched_init
    DotProductAttention.forward = patched_forward


def _name_engine_layers() -> None:
    """Multi-latent attention asks whether its layers are of classes that are none here."""
    from megatron.core.transformer import multi_latent_attention as module

    for name, value in list(vars(module).items()):
        if name.startswith("TE") and not isinstance(value, type):
            setattr(module, name, type(name, (), {}))


def _with(config: Any, **changes: Any) -> Any:
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
