"""Llama, Qwen2 and Qwen3: one decoder, with or without biases and norms of queries and keys."""

from __future__ import annotations

from wsm_megatron.export.families.common import (
    ATTENTION,
    DENSE_MLP,
    NORMS,
    QK_NORM,
    QKV_BIAS,
    TAKES,
    decoder_config,
    kinds,
    model_rows,
)
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Family

_TABLE = (*model_rows(), *NORMS, *ATTENTION, *DENSE_MLP)


def _llama(args: ModelArgs) -> dict[str, object]:
    return decoder_config(args) | {"mlp_bias": False}


def _qwen(args: ModelArgs) -> dict[str, object]:
    return decoder_config(args) | {"sliding_window": None, "use_sliding_window": False}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    table=_TABLE,
    takes=TAKES | {"qk_layernorm": False, "add_qkv_bias": False},
    config=_llama,
    kinds=kinds,
)
QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=(*_TABLE, *QKV_BIAS),
    takes=TAKES | {"qk_layernorm": False, "add_qkv_bias": True},
    config=_qwen,
    kinds=kinds,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(*_TABLE, *QK_NORM),
    takes=TAKES | {"qk_layernorm": True, "add_qkv_bias": False},
    config=_qwen,
    kinds=kinds,
)
