"""What a checkpoint says of its model: Megatron-LM's ``args``, or Megatron-Bridge's run config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.common_state import attributes
from wsm_megatron.checkpoint.run_config import read_run_config

_ACTIVATIONS = {"silu": "swiglu", "quick_gelu": "quick_geglu", "squared_relu": "squared_relu"}
"""What Megatron-LM calls a model of this activation; the first two where it is gated."""


def recorded_args(checkpoint: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hyperparameters under Megatron-LM's names; none where the checkpoint has none.

    Args:
        state: its common state.

    Raises:
        MergeError: Bridge's run config is damaged.
    """
    if args := attributes(state.get("args")):
        return args
    model = read_run_config(checkpoint).get("model")
    return {} if model is None else of_bridge(model)


def of_bridge(model: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's args of a ``GPTModelProvider`` of Bridge, as ``run_config.yaml`` has it.

    Most fields have the names of ``TransformerConfig``, as the args do.
    """
    args = {name: value for name, value in model.items() if not isinstance(value, dict)}
    args |= _activation(model)
    shared = model.get("share_embeddings_and_output_weights")
    args |= {
        "group_query_attention": model.get("num_query_groups") is not None,
        "is_hybrid_model": bool(
            model.get("hybrid_override_pattern") or model.get("hybrid_layer_pattern")
        ),
        "max_position_embeddings": model.get("seq_length"),
        "num_experts": model.get("num_moe_experts"),
        "untie_embeddings_and_output_weights": None if shared is None else not shared,
        "use_rope_scaling": model.get("rope_scaling"),
    }
    return args


def _activation(model: Mapping[str, Any]) -> dict[str, bool]:
    function = model.get("activation_func")
    target = str(function.get("_target_")) if isinstance(function, dict) else ""
    name = _ACTIVATIONS.get(target.rpartition(".")[2])
    gated = bool(model.get("gated_linear_unit"))
    return {one: one == name and gated == (one != "squared_relu") for one in _ACTIVATIONS.values()}
