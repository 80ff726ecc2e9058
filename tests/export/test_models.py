"""The same logits: megatron-core's of the checkpoint, transformers' of its export."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import runs
from tests.export.models import MODELS, VOCABULARY, family
from tests.mcore import run_ranks
from tests.reference import load_tensors
from wsm_megatron.cli.main import main
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig

TOLERANCE = 5e-5
"""Largest difference of two float32 logits, whose standard deviation is near 1.7."""
NOT_IN_TRANSFORMERS = {"bailing_moe_v2"}
FAMILY = {"glm4_moe-qk_norm": "glm4_moe"}
"""Of models that two families could express."""
ONE_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Saved:
    """A run of every model, and megatron-core's logits."""

    runs: Path
    logits: dict[str, torch.Tensor]

    def run(self, name: str) -> Path:
        return self.runs / name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokens: torch.Tensor) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    (logits,) = run_ranks(_save, 1, folder, root=folder / "runs", models=MODELS, tokens=tokens)
    return Saved(folder / "runs", logits)


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
    name: str, saved: Saved, tokens: torch.Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = exported(saved.run(name), tmp_path / name, family=FAMILY.get(name))
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert model.config.model_type == family(name)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    extra = f"model.layers.{MODELS[name]['num_layers']}."  # MTP's, which transformers does not use
    assert all(key.startswith(extra) for key in found["unexpected_keys"])
    with torch.no_grad():
        ours = model.eval()(tokens).logits
    assert_same(ours, saved.logits[name][..., :VOCABULARY])


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_ling_computes_what_glm4_does_under_other_names(
    saved: Saved, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Ling's code is in no package; GLM-4's computes the same from renamed weights.

    Names are those of Ling-V2's converter; Q, K and V lie there one after another.
    """
    transformers = pytest.importorskip("transformers")
    args = MODELS["bailing_moe_v2"]
    run = saved.run("bailing_moe_v2")
    ling = load_file(exported(run, tmp_path / "ling", family="bailing_moe_v2") / ONE_FILE)
    folder = exported(run, tmp_path / "glm", family="glm4_moe")
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in ling.items():
        if name.startswith(f"model.layers.{args['num_layers']}."):
            continue
        if name.endswith("query_key_value.weight"):
            heads, groups, dim = (
                args[n] for n in ("num_attention_heads", "num_query_groups", "kv_channels")
            )
            parts = tensor.split([heads * dim, groups * dim, groups * dim])
            at = name.replace("attention.query_key_value", "self_attn.{}_proj")
            renamed |= {at.format(x): part.clone() for x, part in zip("qkv", parts, strict=True)}
            continue
        for one, other in (
            ("word_embeddings", "embed_tokens"),
            ("attention.dense", "self_attn.o_proj"),
            ("attention.query_layernorm", "self_attn.q_norm"),
            ("attention.key_layernorm", "self_attn.k_norm"),
            ("gate.expert_bias", "gate.e_score_correction_bias"),
        ):
            name = name.replace(one, other)
        renamed[name] = tensor
    save_file(renamed, folder / ONE_FILE, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = model.eval()(tokens).logits
    assert_same(ours, saved.logits["bailing_moe_v2"][..., :VOCABULARY])


@pytest.mark.parametrize("name", MODELS)
def test_every_element_goes_to_one_place(name: str, saved: Saved, tmp_path: Path) -> None:
    """No element is lost and none is there twice: the values, sorted, are the same."""
    folder = exported(saved.run(name), tmp_path / name, family=FAMILY.get(name, family(name)))
    again = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
    found = [t for key, t in load_file(folder / ONE_FILE).items() if not again.fullmatch(key)]
    expected = []
    for key, tensor in load_tensors(saved.run(name) / "iter_0000001").items():
        padded = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        expected.append(tensor[:VOCABULARY] if padded else tensor)
    assert torch.equal(_sorted(found), _sorted(expected))


def _sorted(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors]).sort().values


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_layers_of_mtp_have_embedding_and_head_again(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    tensors = load_file(exported(saved.run(name), tmp_path / name, family=name) / ONE_FILE)
    at = f"model.layers.{MODELS[name]['num_layers']}."
    assert torch.equal(tensors[at + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[at + "shared_head.head.weight"], tensors["lm_head.weight"])
    own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    assert all(at + one in tensors for one in own)


SHARED_OUT = {
    "llama/tp2": {"tensor_model_parallel_size": 2},
    "qwen2/tp2": {"tensor_model_parallel_size": 2},
    "qwen3/pp2": {"pipeline_model_parallel_size": 2},
    "qwen3_moe/pp2": {"pipeline_model_parallel_size": 2},
    "mixtral/ep2": {"expert_model_parallel_size": 2},
    "gpt_oss/ep2": {"expert_model_parallel_size": 2},
    "bailing_moe_v2/ep2": {"expert_model_parallel_size": 2},
    "deepseek_v3/ep2": {"expert_model_parallel_size": 2},
}


def test_an_export_does_not_depend_on_how_ranks_shared_the_model(
    saved: Saved, tmp_path: Path
) -> None:
    """TP, PP and EP cut tensors differently; the export's weights are the same to the last bit."""
    models = {name: MODELS[family(name)] | sizes for name, sizes in SHARED_OUT.items()}
    run_ranks(_reshard, 2, tmp_path, root=saved.runs, again=tmp_path / "runs", models=models)
    for name in models:
        of = name.partition("/")[0]
        cut = exported(tmp_path / "runs" / name, tmp_path / "cut" / name, family=of)
        whole = exported(saved.run(of), tmp_path / "whole" / name, family=of)
        assert (cut / ONE_FILE).read_bytes() == (whole / ONE_FILE).read_bytes(), name
    _assert_same_in_the_pass_that_merges(tmp_path, saved, "gpt_oss/ep2", "2")
    _assert_same_in_the_pass_that_merges(tmp_path, saved, "llama/tp2", "2")


def _assert_same_in_the_pass_that_merges(
    tmp_path: Path, saved: Saved, name: str, ranks: str
) -> None:
    """Of a merge of a checkpoint that ranks have shared out with one that they have not."""
    of = name.partition("/")[0]
    cut = tmp_path / "runs" / name / "iter_0000001"
    older = shutil.copytree(saved.run(of) / cut.name, tmp_path / "older" / name / "iter_0000000")
    runs.rewrite(older, lambda key, tensor: tensor * 0.5)
    runs.restate(older, lambda state: state.update(iteration=0))
    flags = ["--source", str(older), "--source", str(cut), "--decay", "mean", "--export", "hf"]
    flags += ["--family", of, "--export-dtype", "fp32", "--local-ranks", ranks]
    for more in ([], ["--export-only"]):
        root = tmp_path / "merged" / name / ("only" if more else "both")
        assert main(["merge", *flags, "--save", str(root), *more]) == 0
    both, only = (tmp_path / "merged" / name / one for one in ("both", "only"))
    config = ExportConfig(
        load=both / cut.name, save=tmp_path / "again" / name, family=of, export_dtype="fp32"
    )
    expected = (export(config).path / ONE_FILE).read_bytes()
    for root in (both, only):
        assert (root / "hf" / cut.name / ONE_FILE).read_bytes() == expected, name


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_pass_that_merges_turns_and_copies_as_an_export_does(
    name: str, ranks: str, saved: Saved, tmp_path: Path
) -> None:
    """Transposed experts, cut into several tasks; embedding and head, which MTP has again."""
    shutil.copytree(saved.run(name), tmp_path / "runs" / name)
    runs.rewrite(tmp_path / "runs" / name / "iter_0000001", grid=runs.split_axis(3, 2))
    _assert_same_in_the_pass_that_merges(tmp_path, saved, name, ranks)


def _reshard(root: Path, again: Path, models: dict[str, dict[str, Any]]) -> None:
    from tests.export.bed import reshard_all

    reshard_all(root, again, models)
