"""The same logits: megatron-core's of the checkpoint, transformers' of its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.models import MODELS, VOCABULARY, family
from tests.mcore import run_ranks
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig

TOLERANCE = 5e-5
"""Largest difference of two float32 logits, whose standard deviation is near 1.7."""
NOT_IN_TRANSFORMERS = {"bailing_moe_v2"}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, tokens: torch.Tensor
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Every model's run directory under one folder, and megatron-core's logits."""
    folder = tmp_path_factory.mktemp("saved")
    (logits,) = run_ranks(_save, 1, folder, root=folder / "runs", models=MODELS, tokens=tokens)
    return folder / "runs", logits


def _save(root: Path, models: dict[str, dict[str, Any]], tokens: torch.Tensor) -> dict[str, Any]:
    from tests.export.bed import save_all

    return save_all(root, models, tokens)


def exported(run: Path, save: Path, **more: Any) -> Path:
    config = ExportConfig(load=run / "iter_0000001", save=save, export_dtype="fp32", **more)
    return export(config).path


@pytest.mark.parametrize(
    "name", [name for name in MODELS if family(name) not in NOT_IN_TRANSFORMERS]
)
def test_transformers_computes_the_same_logits(
    name: str,
    saved: tuple[Path, dict[str, torch.Tensor]],
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    runs, logits = saved
    more = {"family": "glm4_moe"} if name == "glm4_moe-qk_norm" else {}
    folder = exported(runs / name, tmp_path / name, **more)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert model.config.model_type == family(name)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    extra = f"model.layers.{MODELS[name]['num_layers']}."  # MTP's, which transformers does not use
    assert all(key.startswith(extra) for key in found["unexpected_keys"])
    with torch.no_grad():
        ours = model.eval()(tokens).logits
    theirs = logits[name][..., :VOCABULARY]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
