"""megatron-core's hybrid model on a CPU: torch stands in for mamba_ssm and Transformer Engine.

Of mamba_ssm a mixer in training needs two names: the gated norm, and convolution, scan and gate in
one. Neither has weights that the mixer does not hand it, but for the norm's.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``, without a gate of its own."""

    def __init__(
        self, size: int, eps: float, group_size: int, norm_before_gate: bool, **kwargs: Any
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return (groups * scale).flatten(-2) * self.weight


def split_conv1d_scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    decay: torch.Tensor,
    D: torch.Tensor,  # noqa: N803
    headdim: int,
    ngroups: int,
    **kwargs: Any,
) -> torch.Tensor:
    """``mamba_split_conv1d_scan_combined``: step by step, as Mamba-2 is defined.

    Args:
        projected: (batch, length, channels): gate, x, B, C and step.
    """
    heads = len(dt_bias)
    inner = heads * headdim
    state = (conv_weight.shape[0] - inner) // (2 * ngroups)
    gate, xbc, dt = projected.split([inner, conv_weight.shape[0], heads], dim=-1)
    width = conv_weight.shape[1]
    padded = functional.pad(xbc.transpose(1, 2), (width - 1, 0))
    conv = functional.conv1d(padded, conv_weight[:, None], conv_bias, groups=len(conv_weight))
    x, b, c = (
        functional.silu(conv)
        .transpose(1, 2)
        .split([inner, ngroups * state, ngroups * state], dim=-1)
    )
    x = x.unflatten(-1, (heads, headdim))
    b, c = (
        one.unflatten(-1, (ngroups, state)).repeat_interleave(heads // ngroups, dim=2)
        for one in (b, c)
    )
    step = functional.softplus(dt + dt_bias)
    hidden = torch.zeros(len(x), heads, headdim, state)
    outputs = []
    for t in range(x.shape[1]):
        kept = torch.exp(step[:, t] * decay)[..., None, None]
        added = (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        hidden = kept * hidden + added
        outputs.append((hidden * c[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1).flatten(2) * functional.silu(gate)


def _install() -> None:
    """Before megatron-core's mixer is imported, which looks for mamba_ssm then."""
    names = {
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_split_conv1d_scan_combined": split_conv1d_scan,
            "mamba_chunk_scan_combined": None,
        },
    }
    for module in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", *names):
        made = sys.modules.setdefault(module, types.ModuleType(module))
        made.__dict__.update(names.get(module, {}))


def build(config: Any, args: dict[str, Any]) -> torch.nn.Module:
    """A MambaModel of local layers, whose norms are torch's."""
    _install()
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm import mamba_block

    mamba_block.TENorm = WrappedTorchNorm
    layers = mamba_block.MambaStackSubmodules(
        mamba_layer=_mamba(), attention_layer=_attention(), mlp_layer=_mlp(), moe_layer=_experts()
    )
    return MambaModel(
        config,
        ModuleSpec(mamba_block.MambaStack, submodules=layers),
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        hybrid_override_pattern=args["hybrid_override_pattern"],
        parallel_output=False,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type="none",
    ).eval()


def _mamba() -> ModuleSpec:
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    parts = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(MambaMixer, submodules=mixer),
        mamba_bda=get_bias_dropout_add,
    )
    return ModuleSpec(MambaLayer, submodules=parts)


def _attention() -> ModuleSpec:
    parts = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    )
    causal = {"attn_mask_type": AttnMaskType.causal}
    layer = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(SelfAttention, causal, parts),
        self_attn_bda=get_bias_dropout_add,
    )
    return ModuleSpec(TransformerLayer, submodules=layer)


def _mlp() -> ModuleSpec:
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return _feed_forward(MLPLayer, ModuleSpec(MLP, submodules=parts))


def _experts() -> ModuleSpec:
    experts = get_moe_module_spec(use_te=False, num_experts=4, moe_grouped_gemm=False)
    return _feed_forward(TransformerLayer, experts)


def _feed_forward(module: type, mlp: ModuleSpec) -> ModuleSpec:
    layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm, mlp=mlp, mlp_bda=get_bias_dropout_add
    )
    return ModuleSpec(module, submodules=layer)
