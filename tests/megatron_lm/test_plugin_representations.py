"""``--wsm-merge`` with every way to keep main params: the merge is exact, the run is unchanged, and
one step with LR 0 after a resume moves nothing.

What CUDA would do is done by stand-ins (``standins/``): each says what it replaces.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.megatron_lm.checkout import Outcome, pretrain
from tests.megatron_lm.test_plugin_matrix import FULLY, SHARDED, TRAIN, UNTIED, WSM
from tests.reference import load_tensors, rebuilt, rounded, same_bits, split, weighted_sum64
from wsm_megatron import MergeConfig, merge
from wsm_megatron.checkpoint.keys import Role, main_of, state_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.schedule.decay import coefficients

AWARE = f"{SHARDED} --use-precision-aware-optimizer"
OFFLOAD = f"{AWARE} --optimizer-cpu-offload --optimizer-offload-fraction 0.5"
FP8 = f"{SHARDED} --fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather"
MUON = "EMERGING_OPTIMIZERS_DIR"
STEPS = f"{TRAIN} --min-lr 0"  # which a constant schedule ignores
LR_0 = (
    "--train-iters 9 --save-interval 1 --eval-iters 0 --override-opt-param-scheduler "
    "--lr-decay-style linear --lr-decay-iters 1 --lr-warmup-iters 0"
)


@dataclass(frozen=True)
class Kind:
    """A way to keep main params.

    Attributes:
        flags: of the launch. standins: that it needs.
        mains: ``whole`` (float32), ``remainders``, or ``near`` (float16: rounded again when kept).
        weights: ``rounded`` from the main params, or ``quantised``.
        state: what is done with moments. moments: the dtype in which they are kept.
        loads: from which core on Megatron loads its own checkpoints of it; None: not at all.
        offline: an offline merge of the run's checkpoints gives the same.
        smallest: elements of the smallest param; what follows it in a flat bucket is padding.
    """

    flags: str
    standins: str = ""
    mains: str = "whole"
    weights: str = "rounded"
    state: str = "last"
    moments: torch.dtype = torch.float32
    loads: tuple[int, int] | None = (0, 16)
    offline: bool = True
    smallest: int = 32
    env: tuple[tuple[str, str], ...] = ()


KINDS = {
    "remainders": Kind(
        f"{AWARE} {FULLY}",
        "fused_adam",
        mains="remainders",
        state="merge",
        loads=None,  # Transformer Engine wants int16 (Megatron-LM issue 4222)
    ),
    "remainders-flat": Kind(
        f"{AWARE} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
        "fused_adam",
        mains="remainders",
        loads=(0, 17),  # 0.16 hands what is no tensor to Transformer Engine
        offline=False,  # refused: nothing there says whose each remainder is
    ),
    "masters": Kind(
        f"{AWARE} {FULLY} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
        "fused_adam",
        state="merge",
        moments=torch.bfloat16,
        offline=False,  # which rounds moments to float32
        env=(("TE_VERSION", "2.0"),),
    ),
    "masters-fp16": Kind(
        f"{AWARE} {FULLY} --main-params-dtype fp16", "fused_adam", mains="near", offline=False
    ),
    "offloaded": Kind(
        f"{OFFLOAD} {FULLY}",
        "fused_adam,host_memory",
        state="merge",
        # its common state names classes: the stand-in's, and torch's, which are loaded if forced to
        offline=False,
        env=(("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"),),
    ),
    "inert": Kind(
        f"{FP8} {FULLY} --use-precision-aware-optimizer --exp-avg-dtype fp8",
        "fused_adam,fp8_tensor",
        weights="quantised",
    ),
    "fp8-weights": Kind(f"{FP8} {FULLY}", "fp8_tensor", weights="quantised", state="merge"),
    "fp8-weights-overlap": Kind(
        f"{FP8} --overlap-grad-reduce --overlap-param-gather", "fp8_tensor", weights="quantised"
    ),
    "adam8bit": Kind(SHARDED, "adam8bit", state="merge"),
    "sgd": Kind(
        f"{UNTIED} --optimizer sgd",
        state="merge",
        loads=None,  # it calls ``init_state_fn``, which SGD has not got
    ),
    "muon": Kind(f"{UNTIED} --optimizer muon", "emerging", state="merge"),
    "muon-layer-wise": Kind(f"{SHARDED} --optimizer muon", "emerging", state="merge"),
    "muon-layer-wise-overlap": Kind(
        f"{SHARDED} --optimizer muon --overlap-grad-reduce --overlap-param-gather", "emerging"
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, megatron: Path) -> Kind:
    """One of them, where this checkout has it."""
    return _kind(request.param, megatron)


def _kind(name: str, megatron: Path) -> Kind:
    found = KINDS[name]
    if found.standins == "emerging":
        if MUON not in os.environ:
            pytest.skip(f"{MUON} is not set")
        if _core(megatron) < (0, 20):
            pytest.skip("Emerging-Optimizers v0.4.0 fit main of August 2026")
    return found


def _loads(kind: Kind, megatron: Path) -> bool:
    return kind.loads is not None and _core(megatron) >= kind.loads


def _core(megatron: Path) -> tuple[int, int]:
    """Version of megatron-core; main of August 2026 is 0.20."""
    info = (megatron / "megatron" / "core" / "package_info.py").read_text()
    numbers = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)$", info, re.MULTILINE))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def launch(megatron: Path, kind: Kind, flags: str, plugin: bool) -> Outcome:
    env = dict(kind.env) | ({"STANDINS": kind.standins} if kind.standins else {})
    outcome = pretrain(megatron, f"{kind.flags} {flags}", plugin=plugin, env=env, timeout=900)
    assert outcome.returncode == 0, outcome.log[-8000:]
    return outcome


def test_merges_are_exact_and_the_run_is_unchanged(
    megatron: Path, tmp_path: Path, kind: Kind
) -> None:
    run = tmp_path / "run"
    flags = f"{STEPS} --save {run} {WSM} --wsm-merge-optimizer-state {kind.state}"
    merged = launch(megatron, kind, flags, plugin=True)
    plain = launch(megatron, kind, f"{STEPS} --save {tmp_path / 'plain'}", plugin=False)
    assert len(plain.losses) == 8 + 4 and merged.losses == plain.losses
    assert_same(run / "iter_0000008", tmp_path / "plain" / "iter_0000008", kind)
    assert sorted(p.name for p in (run / "wsm").glob("*iter_0*")) == [
        "iter_0000004",
        "iter_0000008",
    ]
    assert_is_merge(run, (2, 4), kind)
    assert_is_merge(run, (4, 6, 8), kind)
    if kind.offline:
        assert_is_offline_merge(run, tmp_path / "offline", kind)
    if _loads(kind, megatron):
        load = f"--load {run / 'wsm'} --save {tmp_path / 'after'}"
        launch(megatron, kind, f"{STEPS} {load} {LR_0}", plugin=False)
        assert_same_weights(run / "wsm" / "iter_0000008", tmp_path / "after" / "iter_0000009", kind)


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("masters", "memory"),
        ("remainders-flat", "disk"),
        ("offloaded", "disk"),
        ("fp8-weights", "memory"),
        ("muon-layer-wise", "memory"),
    ],
)
def test_the_window_goes_on_after_a_restart(
    megatron: Path, tmp_path: Path, name: str, store: str
) -> None:
    """Refilled by Megatron's own loads, or found on disk to be what was loaded."""
    kind, run = _kind(name, megatron), tmp_path / "run"
    if not _loads(kind, megatron):
        pytest.skip("this Megatron-LM does not load its own checkpoints of it")
    state = f"--wsm-merge-optimizer-state {kind.state} --wsm-merge-store {store}"
    flags = f"{STEPS} --save {run} --load {run} {WSM} {state}"
    launch(megatron, kind, f"{flags} --exit-interval 4", plugin=True)
    again = launch(megatron, kind, flags, plugin=True)
    assert "window begins with iterations [2, 4]" in again.log
    assert "is not what was loaded" not in again.log and "are not those of" not in again.log
    assert_is_merge(run, (4, 6, 8), kind)


def assert_same(left: Path, right: Path, kind: Kind) -> None:
    """All of two checkpoints, but padding."""
    one, other = load_tensors(left), load_tensors(right)
    assert set(one) == set(other)
    for key, tensor in one.items():
        _assert_same(tensor, other[key], key, kind)


def assert_is_merge(run: Path, iterations: tuple[int, ...], kind: Kind) -> None:
    """Against a float64 reference over the float32 values of the run's own checkpoints."""
    folder = f"iter_{iterations[-1]:07d}"
    by = coefficients([float(i) for i in iterations], "1-sqrt")
    sources = [load_tensors(run / f"iter_{i:07d}") for i in iterations]
    actual, entries = load_tensors(run / "wsm" / folder), read_layout(run / folder).tensors
    mains = {model: key for key in entries if (model := main_of(key))}
    assert set(actual) == set(entries)
    for key, tensor in actual.items():
        role = entries[key].role
        if role is Role.MODEL and key in mains:
            values = [_value(kind, source, key, mains[key]) for source in sources]
            merged = rounded(weighted_sum64(by, values), torch.float32)
            _assert_kept(kind, merged, tensor, actual[mains[key]], key)
        elif ".bucket_idx_" in key and role is not Role.MODEL:
            if tensor.dtype in (torch.int16, torch.uint8) and role is not Role.MAIN:
                _assert_same(tensor, sources[-1][key], key, kind)
            elif tensor.dtype is torch.float32 and (role is Role.MAIN or kind.state == "merge"):
                total = weighted_sum64(by, [source[key] for source in sources])
                _assert_same(tensor, rounded(total, torch.float32), key, kind)
        elif role is Role.MOMENT:
            total = weighted_sum64(by, [source[key] for source in sources])
            expected = rounded(total, torch.float32).to(kind.moments).float()
            wanted = expected if kind.state == "merge" else sources[-1][key]
            _assert_same(tensor, wanted, key, kind)


def _value(kind: Kind, source: dict[str, torch.Tensor], model: str, main: str) -> torch.Tensor:
    if kind.mains == "remainders":
        return rebuilt(source[model], source[main])
    return source[main]


def _assert_kept(
    kind: Kind, merged: torch.Tensor, model: torch.Tensor, main: torch.Tensor, key: str
) -> None:
    """Weights and main param of a merged float32 value."""
    if kind.mains == "remainders":
        weights, remainders = split(merged)
        assert same_bits(model, weights) and same_bits(main, remainders.float()), key
        return
    if kind.mains == "near":
        assert ((main - merged).abs() <= merged.abs().max() * 2**-11).all(), key
    else:
        assert same_bits(main, merged), key
    if kind.weights == "quantised" and "norm" not in key and "embedding" not in key:
        assert ((model.float() - merged).abs() <= merged.abs().max() * 2**-4).all(), key
    else:
        assert same_bits(model, merged.to(model.dtype)), key


def assert_is_offline_merge(run: Path, folder: Path, kind: Kind) -> None:
    config = MergeConfig(load=run, save=folder, last=3, decay="1-sqrt", optimizer_state=kind.state)
    offline = load_tensors(merge(config).output)
    actual = load_tensors(run / "wsm" / "iter_0000008")
    entries = read_layout(run / "iter_0000008").tensors
    by_key = any(map(main_of, entries))
    assert set(offline) == set(actual)
    for key, tensor in offline.items():
        quantised = kind.weights == "quantised" and entries[key].role is Role.MODEL
        flat = not by_key and entries[key].role is Role.MODEL  # the like may have each other's
        if not quantised and not flat:
            _assert_same(actual[key], tensor, key, kind)


def assert_same_weights(before: Path, after: Path, kind: Kind) -> None:
    """Main params and the model, where a step with LR 0 lies between."""
    one, other = load_tensors(before), load_tensors(after)
    entries = read_layout(before).tensors
    for key, tensor in one.items():
        if entries[key].role in (Role.MODEL, Role.MAIN):
            if kind.mains == "near":  # and the weights are rounded from what was kept
                assert (tensor - other[key]).abs().max() <= tensor.abs().max() * 2**-7, key
            else:
                _assert_same(other[key], tensor, key, kind)
    assert any(state_of(key) or ".bucket_idx_" in key for key in one)


def _assert_same(actual: torch.Tensor, expected: torch.Tensor, key: str, kind: Kind) -> None:
    """Equal but for padding in flat buckets, which is uninitialised memory."""
    assert actual.dtype is expected.dtype, key
    if not same_bits(actual, expected):
        assert ".bucket_idx_" in key, key
        differing = (actual.view(-1) != expected.view(-1)).nonzero().flatten()
        assert all(int(i) % 64 >= kind.smallest for i in differing), key
