"""An export has the names and the values that Megatron-Bridge would publish.

Runs where ``test_bridge.py`` does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.export.models import MODELS, VOCABULARY
from tests.mcore import run_ranks
from tests.megatron_lm.checkout import environment, launch
from tests.reference import load_tensors, same_bits
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig

pytestmark = pytest.mark.skipif(
    "MEGATRON_BRIDGE_DIR" not in os.environ, reason="MEGATRON_BRIDGE_DIR is not set"
)

BRIDGES = {
    "llama": "megatron.bridge.models.llama.llama_bridge.LlamaBridge",
    "qwen3": "megatron.bridge.models.qwen.qwen3_bridge.Qwen3Bridge",
    "qwen3_moe": "megatron.bridge.models.qwen.qwen3_moe_bridge.Qwen3MoEBridge",
    "deepseek_v3": "megatron.bridge.models.deepseek.deepseek_v3_bridge.DeepSeekV3Bridge",
}
ALL_EXPERTS = {"qwen3_moe": {"moe_layer_freq": [1, 1]}}
"""Bridge has no dense layers in this family."""
COPIES = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
"""Of embedding and head, which MTP's layers share; published models have them again."""


def _save(root: Path, models: dict[str, dict[str, Any]]) -> None:
    from tests.export.bed import save_all

    save_all(root, models, torch.zeros(1, 4, dtype=torch.long))


def test_names_and_values_are_those_that_bridge_publishes(megatron: Path, tmp_path: Path) -> None:
    models = {name: MODELS[name] | ALL_EXPERTS.get(name, {}) for name in BRIDGES}
    run_ranks(_save, 1, tmp_path, root=tmp_path / "runs", models=models)
    asked, ours = {}, {}
    for name, bridge in BRIDGES.items():
        checkpoint = tmp_path / "runs" / name / "iter_0000001"
        config = ExportConfig(
            load=checkpoint, save=tmp_path / name, family=name, export_dtype="fp32"
        )
        found = load_file(export(config).path / "model.safetensors")
        ours[bridge] = {key: one for key, one in found.items() if not COPIES.fullmatch(key)}
        asked[bridge] = {
            "heads": {
                "num_attention_heads": models[name]["num_attention_heads"],
                "num_query_groups": models[name]["num_query_groups"],
                "kv_channels": models[name]["kv_channels"],
                "hidden_size": models[name]["hidden_size"],
            },
            "config": {
                "num_hidden_layers": models[name]["num_layers"],
                "num_nextn_predict_layers": models[name].get("mtp_num_layers", 0),
            },
            "tensors": parameters(load_tensors(checkpoint)),
        }
    theirs = _published(megatron, tmp_path, asked)
    for bridge, tensors in theirs.items():
        assert tensors.keys() == ours[bridge].keys(), bridge
        for key, tensor in tensors.items():
            vocabulary = key in ("model.embed_tokens.weight", "lm_head.weight")
            expected = tensor[:VOCABULARY] if vocabulary else tensor
            assert same_bits(ours[bridge][key], expected.contiguous()), (bridge, key)


def parameters(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names that Megatron's modules have: a tensor a layer, and a tensor an expert."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        layers = {key: tensor}
        if (match := re.fullmatch(r"decoder\.layers\.(\D.*)", key)) is not None:
            layers = {f"decoder.layers.{n}.{match[1]}": one for n, one in enumerate(tensor)}
        for name, one in layers.items():
            name = name.replace("transformer_layer.", "mtp_model_layer.")
            # Local layers save a norm of theirs under the name that a fused layer gives it.
            name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            match = re.fullmatch(r"(.*\.mlp\.experts\.)experts\.(\D.*)", name)
            if match is None:
                found[name] = one
            else:
                found |= {f"{match[1]}{match[2]}{n}": expert for n, expert in enumerate(one)}
    return {name: tensor.clone() for name, tensor in found.items()}


def _published(megatron: Path, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """By Bridge's classes, in a process that has its Megatron."""
    torch.save(asked, folder / "asked")
    source = Path(os.environ["MEGATRON_BRIDGE_DIR"]) / "src"
    paths = f"{environment(megatron)['PYTHONPATH']}{os.pathsep}{source}"
    script = [str(Path(__file__).parent / "bridge_names.py")]
    script += [str(folder / "asked"), str(folder / "published")]
    env = {"PYTHONPATH": paths, "STANDINS": "bridge"}
    outcome = launch(megatron, script, nproc=1, env=env)
    assert outcome.returncode == 0, outcome.log[-8000:]
    return torch.load(folder / "published")
