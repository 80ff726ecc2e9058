"""Restarts from non-persistent checkpoints: the window is the run's, and the run goes on as it was.

``local`` needs ``pip install nvidia-resiliency-ext``.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from tests.megatron_lm.checkout import Outcome, pretrain
from tests.megatron_lm.matrix.promises import assert_merged
from tests.megatron_lm.matrix.table import FULLY, SHARDED

TRAIN = "--train-iters 8 --eval-interval 100 --eval-iters 1"
WSM = "--wsm-merge --wsm-merge-num 3 --wsm-merge-decay 1-sqrt"
LOCAL = pytest.param(
    "local",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("nvidia_resiliency_ext") is None,
        reason="nvidia-resiliency-ext is not installed",
    ),
)


def _flags(folder: Path, kind: str, save_interval: int) -> str:
    run = folder / "run"
    flags = f"{SHARDED} {TRAIN} --save-interval {save_interval} --save {run} --load {run}"
    if kind != "local":  # which refuses that
        flags += f" {FULLY}"
    if kind == "none":
        return flags
    flags += f" --non-persistent-ckpt-type {kind} --non-persistent-save-interval 5"
    if kind == "local":
        flags += f" --non-persistent-local-ckpt-dir {folder / 'local'}"
        flags += " --non-persistent-local-ckpt-algo atomic"
    return flags


def _restarted(
    megatron: Path, folder: Path, kind: str, save_interval: int, extra: str = WSM
) -> tuple[Outcome, Outcome]:
    """A run stopped at iteration 5 and started again, with the plugin and, from a copy, without."""
    first = pretrain(
        megatron, f"{_flags(folder / 'a', kind, save_interval)} {WSM} --exit-interval 5"
    )
    assert first.returncode == 0, first.log[-8000:]
    shutil.copytree(folder / "a", folder / "b", symlinks=True)
    merged = pretrain(megatron, f"{_flags(folder / 'a', kind, save_interval)} {extra}")
    plain = pretrain(megatron, _flags(folder / "b", kind, save_interval), plugin=False)
    assert merged.returncode == 0, merged.log[-8000:]
    assert plain.returncode == 0, plain.log[-8000:]
    assert plain.losses and merged.losses == plain.losses
    return merged, plain


@pytest.mark.parametrize("kind", ["none", "global", LOCAL])
def test_the_window_is_refilled_with_what_is_wanted(
    megatron: Path, tmp_path: Path, kind: str
) -> None:
    merged, _ = _restarted(megatron, tmp_path, kind, 2)
    assert (tmp_path / "a" / "run" / "iter_0000005").exists() == (kind == "none")
    assert "window begins with iterations [2, 4]" in merged.log, "not what the exit saved"
    assert_merged(tmp_path / "a" / "run", (4, 6, 8))


@pytest.mark.parametrize("kind", ["global", LOCAL])
def test_a_run_with_nothing_but_a_non_persistent_checkpoint_starts(
    megatron: Path, tmp_path: Path, kind: str
) -> None:
    merged, _ = _restarted(megatron, tmp_path, kind, 7)
    assert "window begins with iterations []" in merged.log
    assert_merged(tmp_path / "a" / "run", (7, 8))


def test_a_keep_that_only_a_non_persistent_checkpoint_remembers(
    megatron: Path, tmp_path: Path
) -> None:
    """Kept every iteration: the restart's own is taken from what was loaded."""
    merged, _ = _restarted(megatron, tmp_path, "global", 2, f"{WSM} --wsm-merge-interval 1")
    assert "window begins with iterations [2, 4, 5]" in merged.log
    assert "merged [6, 7, 8] into" in merged.log


def test_a_folder_that_holds_another_iteration_is_left_out(megatron: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = f"{SHARDED} {FULLY} {TRAIN} --save-interval 2 --save {run} --load {run} {WSM}"
    first = pretrain(megatron, f"{flags} --exit-interval 6")
    assert first.returncode == 0, first.log[-8000:]
    shutil.rmtree(run / "iter_0000004")
    shutil.copytree(run / "iter_0000002", run / "iter_0000004")
    second = pretrain(megatron, flags)
    assert second.returncode == 0, second.log[-8000:]
    assert f"window without iteration 4: in {run}, its state says iteration 2" in second.log
    assert "window begins with iterations [2, 6]" in second.log
    assert_merged(run, (2, 6, 8))
