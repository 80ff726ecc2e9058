"""Block means and moving averages in pretrain_gpt.py, against what the run saved of every step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.megatron_lm.checkout import Outcome, pretrain
from tests.megatron_lm.matrix.table import FULLY, SHARDED
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import verify
from wsm_megatron.checkpoint.keys import main_of
from wsm_megatron.schedule.decay import coefficients

FLAGS = (
    f"{SHARDED} {FULLY} --train-iters 8 --save-interval 1 --eval-interval 4 --eval-iters 2 "
    "--wsm-merge --wsm-merge-save-interval 4 --wsm-merge-eval"
)
BLOCKS = (
    "--wsm-merge-num 3 --wsm-merge-decay 1-sqrt --wsm-merge-interval 2 "
    "--wsm-merge-average-every 1 --wsm-merge-store disk"
)
MOVING = "--wsm-merge-half-life 3"


def _mains(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Main params by the keys of the model's tensors."""
    tensors = load_tensors(checkpoint)
    found = {model: tensors[key] for key in tensors if (model := main_of(key))}
    assert found
    return found


def _assert_main_params(run: Path, expected: dict[str, torch.Tensor]) -> None:
    merged = run / "wsm" / "iter_0000008"
    verify(merged)
    actual, tensors = _mains(merged), load_tensors(merged)
    assert actual.keys() == expected.keys()
    for key, main in expected.items():
        assert same_bits(actual[key].view(-1), main.view(-1)), key
        weights = tensors[key]
        assert same_bits(weights.view(-1), main.view(-1).to(weights.dtype)), key


def _steps(run: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {i: _mains(run / f"iter_{i:07d}") for i in range(1, 9)}


def _block_means(run: Path) -> dict[str, torch.Tensor]:
    """Blocks of two steps, up to 4, 6 and 8."""
    steps, weights = _steps(run), coefficients((4, 6, 8), "1-sqrt")

    def mean(key: str, newest: int) -> torch.Tensor:
        pair = [steps[i][key].double().numpy() for i in (newest - 1, newest)]
        return rounded((pair[0] + pair[1]) / 2, torch.float32)

    return {
        key: rounded(weighted_sum64(weights, [mean(key, i) for i in (4, 6, 8)]), torch.float32)
        for key in steps[8]
    }


def _moving_average(run: Path) -> dict[str, torch.Tensor]:
    """A sample of each step; in float32 where it was written, at 4."""
    steps = _steps(run)
    found: dict[str, torch.Tensor] = {}
    for key, first in steps[1].items():
        average, weight = first.double().numpy(), np.float64(1)
        for iteration in range(2, 9):
            weight = np.float64(2.0 ** (-1 / 3)) * weight + 1
            average = average + (steps[iteration][key].double().numpy() - average) / weight
            if iteration == 4:
                average = average.astype(np.float32).astype(np.float64)
        found[key] = rounded(average, torch.float32)
    return found


def _run(megatron: Path, run: Path, more: str, fault: str | None = None) -> Outcome:
    env = None if fault is None else {"FAULT": fault}
    outcome = pretrain(megatron, f"{FLAGS} --save {run} --load {run} {more}", env=env)
    assert (outcome.returncode != 0) == (fault is not None), outcome.log[-8000:]
    return outcome


@pytest.fixture(scope="module")
def plain(megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Losses without the plugin."""
    run = tmp_path_factory.mktemp("plain")
    flags = FLAGS.split(" --wsm-merge ")[0]
    return pretrain(megatron, f"{flags} --save {run}", plugin=False).losses


@pytest.mark.parametrize("options", [BLOCKS, MOVING], ids=["blocks", "moving"])
def test_it_is_the_merge_of_every_step(
    megatron: Path, tmp_path: Path, plain: list[str], options: str
) -> None:
    run = tmp_path / "run"
    outcome = _run(megatron, run, options)
    assert [loss for loss in outcome.losses if loss in plain] == plain and len(plain) >= 10
    assert len(outcome.merged_losses) >= 2
    _assert_main_params(run, _block_means(run) if options == BLOCKS else _moving_average(run))


def test_block_means_on_disk_survive_a_kill(megatron: Path, tmp_path: Path) -> None:
    """At the merge of 4; blocks that end in 2 and 4 are on disk."""
    run = tmp_path / "run"
    _run(megatron, run, BLOCKS, "0 SIGKILL driver emit 1")
    second = _run(megatron, run, BLOCKS)
    assert "window begins with iterations [2, 4]" in second.log
    _assert_main_params(run, _block_means(run))
    sources = json.loads((run / "wsm" / "iter_0000008" / "wsm_merge.json").read_text())["sources"]
    assert [s["mean"]["points"] for s in sources] == [2, 2, 2]


def test_a_moving_average_goes_on_in_another_layout(megatron: Path, tmp_path: Path) -> None:
    """Killed after the save of 5, without the merge of it: the sample is taken again."""
    run = tmp_path / "run"
    _run(megatron, run, MOVING, "1 SIGKILL driver Driver.stepped 5")
    same_vocabulary = "--make-vocab-size-divisible-by 64"  # 128 words with TP 2 as well
    second = _run(megatron, run, f"{MOVING} --tensor-model-parallel-size 2 {same_vocabulary}")
    assert "goes on from merged checkpoint 4 at iteration 5" in second.log
    _assert_main_params(run, _moving_average(run))
