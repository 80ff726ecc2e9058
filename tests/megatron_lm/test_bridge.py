"""The callback in Megatron-Bridge's own ``pretrain()``: exact merges, and losses as without it.

Runs where ``MEGATRON_BRIDGE_DIR`` names a checkout of Megatron-Bridge and ``MEGATRON_LM_DIR`` the
Megatron-LM that it pins, and the interpreter has what Bridge imports (``omegaconf``, ``peft``,
``hydra-core``, ``transformers``, ``diffusers``, ``datasets``, ``rich``, ``tensorboard``,
``wandb``); ``standins/bridge.py`` says what stands in for the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_lm.checkout import Outcome, environment, launch
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.schedule.decay import coefficients

pytestmark = pytest.mark.skipif(
    "MEGATRON_BRIDGE_DIR" not in os.environ, reason="MEGATRON_BRIDGE_DIR is not set"
)

WSM = {"num": 3, "decay": "1-sqrt", "save_interval": 4, "eval": True}
RUN = Path(__file__).parent / "bridge_run.py"


def bridge(megatron: Path, **options: Any) -> Outcome:
    source = Path(os.environ["MEGATRON_BRIDGE_DIR"]) / "src"
    paths = f"{environment(megatron)['PYTHONPATH']}{os.pathsep}{source}"
    options = {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
    env = {"PYTHONPATH": paths, "STANDINS": "bridge"}
    outcome = launch(megatron, [str(RUN), json.dumps(options)], env=env)
    assert outcome.returncode == 0, outcome.log[-8000:]
    return outcome


@pytest.mark.parametrize("how", [{}, {"async": True}, {"overlap": True}], ids=str)
def test_a_run_with_the_callback(megatron: Path, tmp_path: Path, how: dict[str, bool]) -> None:
    run = tmp_path / "run"
    merged = bridge(megatron, save=run, iters=8, wsm=WSM, **how)
    plain = bridge(megatron, save=tmp_path / "plain", iters=8, **how)
    assert len(plain.losses) == 8 + 4
    assert merged.losses == plain.losses
    last = ["wsm iteration 8 on validation set", "wsm iteration 8 on test set"]
    assert merged.merged_losses[-2:] == last
    if "async" not in how:  # what is not durable yet is not evaluated yet
        assert merged.merged_losses[:-2] == ["wsm iteration 4", "wsm iteration 8"]
    for iterations in ((2, 4), (4, 6, 8)):
        _assert_is_merge(run, iterations)
    assert (run / "wsm" / "latest_checkpointed_iteration.txt").read_text() == "8"
    check_resume(run / "wsm" / "iter_0000008")


def _assert_is_merge(run: Path, iterations: tuple[int, ...]) -> None:
    """Main params and weights against a float64 reference over the run's checkpoints."""
    name = f"iter_{iterations[-1]:07d}"
    weights = coefficients([float(i) for i in iterations], "1-sqrt")
    sources = [load_tensors(run / f"iter_{i:07d}") for i in iterations]
    actual = load_tensors(run / "wsm" / name)
    mains = {main_of(key): key for key in actual if main_of(key)}
    assert set(actual) == set(sources[-1])
    assert len(mains) == 9
    for key, main in mains.items():
        total = weighted_sum64(weights, [tensors[main] for tensors in sources])
        assert same_bits(actual[main], rounded(total, torch.float32)), main
        assert same_bits(actual[key], rounded(total, torch.bfloat16)), key
    verify(run / "wsm" / name, sources=True)


def test_the_window_is_filled_again_and_training_goes_on_from_a_merge(
    megatron: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    bridge(megatron, save=run, iters=6, wsm={"num": 3})
    again = bridge(megatron, save=run, load=run, iters=8, wsm={"num": 3, "decay": "1-sqrt"})
    assert "window begins with iterations [2, 4, 6]" in again.log
    whole = bridge(megatron, save=tmp_path / "whole", iters=8)
    assert again.losses == [line for line in whole.losses if _iteration(line) > 6]
    _assert_is_merge(run, (4, 6, 8))

    offline = merge(
        MergeConfig(
            load=run, save=tmp_path / "offline", last=3, decay="1-sqrt", optimizer_state="last"
        )
    )
    (merged,) = offline.merged
    assert merged.decay.unit == "tokens"
    other, kept = load_tensors(merged.output), load_tensors(run / "wsm" / "iter_0000008")
    assert set(other) == set(kept)
    assert all(same_bits(tensor, kept[key]) for key, tensor in other.items())

    # An LR of 0 would be another param group to Megatron; this one moves no weight.
    resumed = bridge(megatron, save=tmp_path / "next", load=run / "wsm", iters=10, warmup=10**12)
    assert [_iteration(line) for line in resumed.losses][:2] == [9, 10]
    after = load_tensors(tmp_path / "next" / "iter_0000010")
    for key in kept:
        if not key.startswith("optimizer."):
            assert same_bits(kept[key], after[key]), key


def test_what_cannot_work_in_a_run_is_refused_when_training_starts(
    megatron: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="is not a multiple of --save-interval 2"):
        bridge(megatron, save=tmp_path / "run", iters=4, wsm={"num": 2, "save_interval": 3})


def _iteration(line: str) -> int:
    return int("".join(c for c in line.removeprefix("iteration").split()[0] if c.isdigit()))
