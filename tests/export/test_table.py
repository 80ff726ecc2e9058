"""From args and a checkpoint's layout to tensors: what is there goes somewhere, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.export.models import MODELS, family
from tests.export.test_export import load
from tests.reference import RUNS, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, UsageError, merge
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import Chunk, Location, TensorEntry
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.export.families import FAMILIES, choose
from wsm_megatron.export.job import export
from wsm_megatron.export.model_args import ModelArgs, model_args
from wsm_megatron.export.names import parts_of
from wsm_megatron.export.options import ExportConfig
from wsm_megatron.export.shards import make_shards, shares
from wsm_megatron.export.table import Piece, Tensor, tensors_of

GLM_OR_LING = {"glm4_moe-qk_norm"}


def entry(key: str, *shape: int) -> TensorEntry:
    chunk = Chunk((0,) * len(shape), shape, Location("a", 0, 0))
    return TensorEntry(key, Role.MODEL, torch.bfloat16, shape, (chunk,))


def entries(*more: TensorEntry, without: str = "") -> dict[str, TensorEntry]:
    """A Qwen3 of one layer, of 2 heads of 2 channels and 6 tokens."""
    layer = "decoder.layers."
    all_of = (
        entry("embedding.word_embeddings.weight", 8, 4),
        entry("decoder.final_layernorm.weight", 4),
        entry("output_layer.weight", 8, 4),
        entry(layer + "self_attention.linear_qkv.layer_norm_weight", 1, 4),
        entry(layer + "self_attention.linear_qkv.weight", 1, 12, 4),
        entry(layer + "self_attention.linear_proj.weight", 1, 4, 4),
        entry(layer + "self_attention.q_layernorm.weight", 1, 2),
        entry(layer + "self_attention.k_layernorm.weight", 1, 2),
        entry(layer + "mlp.linear_fc1.layer_norm_weight", 1, 4),
        entry(layer + "mlp.linear_fc1.weight", 1, 6, 4),
        entry(layer + "mlp.linear_fc2.weight", 1, 4, 3),
        *more,
    )
    return {one.key: one for one in all_of if one.key != without}


ARGS = MODELS["qwen3"] | {
    "num_layers": 1,
    "num_attention_heads": 2,
    "group_query_attention": False,
    "kv_channels": 2,
    "vocab_size": 6,
}


def of_qwen3(found: dict[str, TensorEntry], **args: Any) -> list[Tensor]:
    return tensors_of(FAMILIES["qwen3"], ModelArgs(ARGS | args, "CKPT"), found, None)


def test_a_whole_model() -> None:
    shapes = {tensor.name: tensor.shape for tensor in of_qwen3(entries())}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (6, 4)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (4, 4)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (4, 3)
    assert len(shapes) == 14


@pytest.mark.parametrize(
    "found, args, words",
    [
        (
            entries(entry("vision.weight", 3)),
            {},
            "qwen3 has a place for vision.weight; --leave-out",
        ),
        (
            entries(without="decoder.layers.mlp.linear_fc2.weight"),
            {},
            "model.layers.0.mlp.down_proj.weight is made of layers.0.mlp.linear_fc2.weight, which",
        ),
        (entries(), {"num_layers": 2}, "is made of layers.1.self_attention"),
        (
            entries(entry("decoder.layers.0.mlp.linear_fc2.weight", 4, 3)),
            {},
            "are both layers.0.mlp.linear_fc2.weight",
        ),
        (entries(), {"vocab_size": None}, "give --tokenizer DIR or --arg vocab_size=N"),
        (entries(), {"num_layers": None}, "do not say num_layers"),
    ],
)
def test_what_does_not_fit_is_named(
    found: dict[str, TensorEntry], args: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match="CKPT|are both") as error:
        of_qwen3(found, **args)
    assert words in str(error.value)


LAYERS = "decoder.layers."
NORMED_AFTER = (
    entry(LAYERS + "self_attention.linear_proj.post_layernorm.weight", 1, 4),
    entry(LAYERS + "mlp.linear_fc2.post_layernorm.weight", 1, 4),
)
OVER_ALL_HEADS = entry(LAYERS + "self_attention.q_layernorm.weight", 1, 4)


@pytest.mark.parametrize(
    "found, words",
    [
        (
            entries(OVER_ALL_HEADS),
            "CKPT: decoder.layers.self_attention.q_layernorm.weight: a norm of queries or keys of "
            "shape (4,), where a head has 2 channels",
        ),
        (
            entries(*NORMED_AFTER),
            "no table of qwen3 has a place for decoder.layers.mlp.linear_fc2.post_layernorm.weight",
        ),
        (
            entries(*NORMED_AFTER, without="decoder.layers.mlp.linear_fc1.layer_norm_weight"),
            "post_attention_layernorm.weight is made of layers.0.mlp.linear_fc1.layer_norm_weight",
        ),
    ],
)
def test_norms_as_olmo_has_them_are_refused_by_key(
    found: dict[str, TensorEntry], words: str
) -> None:
    """Megatron-core builds none; a fork of it might."""
    with pytest.raises(UsageError) as error:
        of_qwen3(found)
    assert words in str(error.value)


def test_more_layers_than_the_args_say_are_refused() -> None:
    two = {
        key: replace(one, shape=(2, *one.shape[1:])) if "layers" in key else one
        for key, one in entries().items()
    }
    with pytest.raises(
        UsageError, match="does not go into qwen3 whole: no chunks hold the element"
    ):
        of_qwen3(two)


@pytest.mark.parametrize("name", MODELS)
def test_args_say_which_family(name: str) -> None:
    args = ModelArgs(MODELS[name])
    if name in GLM_OR_LING | {"bailing_moe_v2"}:
        with pytest.raises(UsageError, match="fit glm4_moe and bailing_moe_v2: give --family"):
            choose(args, None)
    else:
        assert choose(args, None).name == family(name)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalization": "LayerNorm"}, "nearest is llama, but for normalization is LayerNorm"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True, not False"),
        ({"window_size": (3, 0)}, "window_size is (3, 0), not None"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is 1"),
        ({"position_embedding_type": "none"}, "position_embedding_type is none, not rope"),
        ({"layernorm_zero_centered_gamma": True, "apply_layernorm_1p": None}, "apply_layernorm_1p"),
    ],
)
def test_what_a_family_cannot_express_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        choose(ModelArgs(MODELS["llama"] | changes), None)
    assert words in str(error.value) and "--format safetensors" in str(error.value)


def test_groups_of_experts_that_are_ranked_otherwise_are_refused() -> None:
    args = MODELS["deepseek_v3"] | {"moe_router_topk": 6}
    with pytest.raises(UsageError, match="moe_router_topk / moe_router_group_topk other than 2"):
        choose(ModelArgs(args), "deepseek_v3")


def test_what_args_do_not_say_is_asked_for_and_may_be_given() -> None:
    recorded = {k: v for k, v in MODELS["llama"].items() if k != "rotary_base"}
    silent = ModelArgs(recorded, "CKPT")
    with pytest.raises(UsageError, match="CKPT: .* rotary_base.* --arg rotary_base=VALUE"):
        choose(silent, None).config(silent)
    said = model_args(recorded, ["rotary-base=500", "norm_epsilon=0.5"], "CKPT", None)
    config = choose(said, None).config(said)
    assert config["rope_theta"] == 500 and config["rms_norm_eps"] == 0.5


@pytest.mark.parametrize(
    "values, given, of_tokenizer, size",
    [
        ({"vocab_size": 10}, (), None, 10),
        ({"vocab_size": 10, "tokenizer_type": "NullTokenizer"}, (), None, 11),
        ({"vocab_size": 10}, (), 12, 12),
        ({"vocab_size": 10}, ("vocab_size=14",), 12, 14),
    ],
)
def test_the_vocabulary_is_what_the_nearest_source_says(
    values: dict[str, Any], given: tuple[str, ...], of_tokenizer: int | None, size: int
) -> None:
    assert model_args(values, given, "CKPT", of_tokenizer).vocab_size == size


def test_layers_and_experts_have_one_name_however_they_are_stacked() -> None:
    stacked = [
        entry("decoder.layers.mlp.experts.experts.linear_fc2.weight", 2, 3, 4, 5),
        entry("mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight", 3, 4, 5),
        entry("mtp.layers.0.enorm.weight", 4),
    ]
    apart = [
        *(
            entry(f"model.decoder.layers.{n}.mlp.experts.experts.{e}.linear_fc2.weight", 4, 5)
            for n in range(2)
            for e in range(3)
        ),
        entry("mtp.layers.0.mtp_model_layer.mlp.experts.experts.linear_fc2.weight", 3, 4, 5),
        entry("model0.mtp.layers.0.enorm.weight", 4),
    ]
    one, other = parts_of(stacked, 2), parts_of(apart, 2)
    assert one.keys() == other.keys()
    assert one["layers.2.enorm.weight"].key == "mtp.layers.0.enorm.weight"
    assert one["layers.1.mlp.experts.2.linear_fc2.weight"].place(Region((1, 0), (2, 5))) == Region(
        (1, 2, 1, 0), (1, 1, 2, 5)
    )


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    limit=st.integers(1, 60),
    ranks=st.integers(1, 4),
)
def test_files_hold_every_tensor_once_within_their_size(
    sizes: list[int], limit: int, ranks: int
) -> None:
    tensors = [
        Tensor(
            f"t{n}",
            torch.float32 if n % 3 else torch.bfloat16,
            (size,),
            (Piece("k", Region((0,), (size,))),),
        )
        for n, size in enumerate(sizes)
    ]
    shards = make_shards(tensors, limit)
    assert sorted(t.name for shard in shards for t in shard.tensors) == sorted(
        t.name for t in tensors
    )
    for shard in shards:
        nbytes = [tensor.nbytes for tensor in shard.tensors]
        assert sum(nbytes) <= limit or len(nbytes) == 1
        ends = [a + n for a, n in zip(shard.offsets, nbytes, strict=True)]
        assert list(shard.offsets) == [len(shard.header), *ends[:-1]]
        for tensor, offset in zip(shard.tensors, shard.offsets, strict=True):
            assert offset % tensor.dtype.itemsize == 0
    of_ranks = [shard.name for own in shares(shards, ranks) for shard in own]
    assert sorted(of_ranks) == sorted(shard.name for shard in shards)


def test_the_export_of_a_merge_is_the_merge_of_exports(tmp_path: Path) -> None:
    weights = (0.2, 0.3, 0.5)
    config = MergeConfig(load=RUNS / runs.MAIN, save=tmp_path / "merged", weights=weights, last=3)
    report = merge(config)
    merged = load(export(ExportConfig(load=report.output, save=tmp_path / "hf")).path)
    sources = [
        load(export(ExportConfig(load=runs.checkpoint(runs.MAIN, i), save=tmp_path / str(i))).path)
        for i in report.iterations
    ]
    for name, tensor in merged.items():
        total = weighted_sum64(weights, [source[name] for source in sources])
        assert same_bits(tensor, rounded(total, torch.bfloat16)), name
