"""Roles of real keys."""

import pytest
import torch

from tests.reference import RUNS
from wsm_megatron.checkpoint.keys import (
    Role,
    is_flat_bucket,
    main_of,
    may_be_padding,
    object_role,
    state_roles,
    tensor_role,
)
from wsm_megatron.checkpoint.layout import read_layout

FLAT = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"


@pytest.mark.parametrize(
    "key, dtype, role",
    [
        ("decoder.layers.mlp.linear_fc1.weight", torch.bfloat16, Role.MODEL),
        ("model.decoder.layers.3.mlp.router.weight", torch.float32, Role.MODEL),
        ("decoder.layers.mlp.router.expert_bias", torch.float32, Role.BUFFER),
        ("optimizer.state.fp32_param.output_layer.weight", torch.float32, Role.MAIN),
        ("optimizer.state.param.output_layer.weight", torch.float32, Role.MAIN),
        ("optimizer.state.exp_avg.output_layer.weight", torch.float32, Role.MOMENT),
        (f"{FLAT}.bucket_idx_0.param", torch.float32, Role.MAIN),
        (f"chained_1.{FLAT}.bucket_idx_2.exp_avg_sq", torch.float32, Role.MOMENT),
        ("optimizer.state.momentum_buffer.output_layer.weight", torch.float32, Role.MOMENT),
        ("optimizer.state.state1.output_layer.weight", torch.uint8, Role.OPTIMIZER),
        (f"{FLAT}.bucket_idx_0.momentum_buffer", torch.float32, Role.MOMENT),
        ("optimizer.elsewhere", torch.float32, Role.UNKNOWN),
        ("position_ids", torch.int64, Role.COPY),
        ("decoder.weight", torch.complex64, Role.UNKNOWN),
        ("decoder.weight", torch.float8_e4m3fn, Role.UNKNOWN),
    ],
)
def test_tensor_roles(key, dtype, role):
    assert tensor_role(key, dtype) is role


@pytest.mark.parametrize(
    "key, role",
    [
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", Role.EXTRA),
        ("rng_state/shard_0.0_1.2", Role.RNG),
        ("common_state/shard_0_1", Role.COMMON),
        ("rerun_state_machine_state/shard_0_2", Role.COPY),
        ("tokenizer/shard_0_1", Role.COPY),
        ("optimizer.distributed.dp_group_idx_0.per_bucket_numel/shard_0_1", Role.OPTIMIZER),
        ("optimizer.distributed.dp_group_idx_0.grad_scaler/shard_0_1", Role.OPTIMIZER),
        ("something_new/shard_0_1", Role.UNKNOWN),
    ],
)
def test_object_roles(key, role):
    assert object_role(key) is role


def test_what_stands_beside_codes_in_a_flat_bucket_is_no_moment():
    kinds = {
        "param": torch.float32, "state1": torch.uint8, "extra": torch.float32,
    }  # fmt: skip
    bucket = {f"{FLAT}.bucket_idx_0.{name}": (dtype, (64,)) for name, dtype in kinds.items()}
    other = {f"{FLAT}.bucket_idx_1.{name}": (torch.float32, (64,)) for name in ("param", "extra")}
    roles = state_roles({**bucket, **other})
    assert roles == {f"{FLAT}.bucket_idx_0.{name}": Role.OPTIMIZER for name in ("state1", "extra")}
    assert state_roles({f"{FLAT}.bucket_idx_0.exp_avg": (torch.float32, (64,))}) == {
        f"{FLAT}.bucket_idx_0.exp_avg": Role.UNKNOWN
    }


def test_main_of():
    assert main_of("optimizer.state.param.a.b") == "a.b"
    assert main_of("chained_0.optimizer.state.fp32_param.a.b") == "a.b"
    assert main_of(f"{FLAT}.bucket_idx_0.param") is None
    assert main_of("optimizer.state.exp_avg.a.b") is None
    assert is_flat_bucket(f"{FLAT}.bucket_idx_0.param")


@pytest.mark.parametrize("run", sorted(path.name for path in RUNS.iterdir()))
def test_no_entry_of_a_real_checkpoint_is_unknown(run):
    for checkpoint in sorted((RUNS / run).glob("iter_*")):
        layout = read_layout(checkpoint)
        entries = {**layout.tensors, **layout.objects}
        assert len(entries) >= 17
        assert [key for key, entry in entries.items() if entry.role is Role.UNKNOWN] == []


def test_padding_is_the_gap_before_the_next_multiple_of_64():
    key = f"{FLAT}.bucket_idx_0.param"
    assert may_be_padding(key, 4128, 32)
    assert not may_be_padding(key, 4096, 32)  # a param of 32
    assert not may_be_padding(key, 4128, 33)  # reaches into the next param
    assert not may_be_padding("decoder.weight", 4128, 32)
