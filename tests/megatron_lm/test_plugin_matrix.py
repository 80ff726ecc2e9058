"""``--wsm-merge`` on pretrain_gpt.py under every layout: exact merges, and losses as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.megatron_lm.checkout import Outcome, pretrain
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.keys import Role, main_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.schedule.decay import coefficients

UNTIED = "--untie-embeddings-and-output-weights"
SHARDED = f"{UNTIED} --use-distributed-optimizer"
FULLY = "--dist-ckpt-optim-fully-reshardable"
MOE = (
    "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3 "
    "--moe-token-dispatcher-type allgather"
)
LAYOUTS = {
    "dp2": SHARDED,
    "dp2-fully_reshardable": f"{SHARDED} {FULLY}",
    "dp2-replicated": UNTIED,
    "dp2-overlap": f"{SHARDED} --overlap-grad-reduce --overlap-param-gather",
    "tp2": f"{UNTIED} --tensor-model-parallel-size 2",
    "pp2": f"{SHARDED} {FULLY} --pipeline-model-parallel-size 2",
    "pp2-tied": "--use-distributed-optimizer --pipeline-model-parallel-size 2",
    "moe-ep2": f"{SHARDED} {MOE}",
    "moe-ep2-fully_reshardable": f"{SHARDED} {FULLY} {MOE}",
    "async": f"{SHARDED} --async-save --use-persistent-ckpt-worker",
}
TRAIN = "--train-iters 8 --save-interval 2 --eval-interval 4 --eval-iters 2"
WSM = (
    "--wsm-merge --wsm-merge-num 3 --wsm-merge-decay 1-sqrt --wsm-merge-save-interval 4 "
    "--wsm-merge-eval"
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_with_the_plugin(megatron: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    flags = f"{LAYOUTS[name]} {TRAIN}"
    arguments = (megatron / "megatron" / "training" / "arguments.py").read_text()
    if name == "async" and "async_strategy" in arguments:  # main asks for NVRx otherwise
        flags += " --async-strategy mcore"
    merged = pretrain(megatron, f"{flags} --save {run} {WSM}")
    plain = pretrain(megatron, f"{flags} --save {tmp_path / 'plain'}", plugin=False)
    _assert_same_losses(merged, plain)
    evaluated = [
        "wsm iteration 4",
        "wsm iteration 8",
        "wsm iteration 8 on validation set",
        "wsm iteration 8 on test set",
    ]
    if name == "async":  # what is not durable yet is not evaluated yet
        assert merged.merged_losses[-2:] == evaluated[-2:]
    else:
        assert merged.merged_losses == evaluated
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert (run / "wsm" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert sorted(p.name for p in (run / "wsm").glob("*iter_0*")) == [
        "iter_0000004",
        "iter_0000008",
    ]
    assert_is_merge(run, (2, 4))
    assert_is_merge(run, (4, 6, 8))
    verify(run / "wsm" / "iter_0000008", allow_nonfinite=True)
    _assert_is_offline_merge(run, tmp_path / "offline")


def _assert_same_losses(merged: Outcome, plain: Outcome) -> None:
    assert merged.returncode == 0, merged.log[-8000:]
    assert plain.returncode == 0, plain.log[-8000:]
    assert len(plain.losses) == 8 + 4
    assert merged.losses == plain.losses


def assert_is_merge(run: Path, iterations: tuple[int, ...], decay: str = "1-sqrt") -> None:
    """Main params, weights and buffers against a float64 reference over the run's checkpoints."""
    folder = f"iter_{iterations[-1]:07d}"
    weights = coefficients([float(i) for i in iterations], decay)
    sources = [load_tensors(run / f"iter_{i:07d}") for i in iterations]
    actual = load_tensors(run / "wsm" / folder)
    entries = read_layout(run / folder).tensors
    mains = {main_of(key): key for key in entries if main_of(key)}
    assert set(actual) == set(entries)
    for key, tensor in actual.items():
        role, source = entries[key].role, mains.get(key, key)
        total = weighted_sum64(weights, [tensors[source] for tensors in sources])
        if role is Role.MOMENT:
            _assert_same_bucket(tensor, sources[-1][key], key)
        elif ".bucket_idx_" in key:
            _assert_same_bucket(tensor, rounded(total, torch.float32), key)
        elif role is Role.MODEL and not mains:
            # Flat buckets on disk: the reference has but the bf16 weights, rounded already.
            largest = torch.stack([t[key].double().abs() for t in sources]).amax(0)
            assert ((tensor.double() - torch.from_numpy(total)).abs() <= largest * 2**-7).all(), key
        else:
            expected = rounded(total, sources[-1][source].dtype).to(tensor.dtype)
            assert same_bits(tensor, expected), key


def _assert_is_offline_merge(run: Path, folder: Path) -> None:
    config = MergeConfig(load=run, save=folder, last=3, decay="1-sqrt", optimizer_state="last")
    offline = load_tensors(merge(config).output)
    actual = load_tensors(run / "wsm" / "iter_0000008")
    assert set(offline) == set(actual)
    by_key = any(main_of(key) for key in actual)
    for key, tensor in offline.items():
        if ".bucket_idx_" in key:
            _assert_same_bucket(actual[key], tensor, key)
        elif by_key or key.endswith("expert_bias"):
            assert same_bits(actual[key], tensor), key
    if by_key:
        verify(run / "wsm" / "iter_0000008", sources=True)


def _assert_same_bucket(actual: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    """Equal but for padding after norms of 32 elements, which is uninitialised memory."""
    differing = (actual.view(-1) != expected.view(-1)).nonzero().flatten()
    padded = ".bucket_idx_" in key
    assert all(padded and int(i) % 64 >= 32 for i in differing), key
