"""``pretrain_gpt.py`` resumes from merged checkpoints, with the flags that the merge prints.

The runs are trained with ``--min-lr 0``, which a constant LR ignores, so that a launch can ask
for LR 0: Megatron takes ``--lr`` and ``--min-lr`` of loaded optimizer state from the checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import runs
from tests.dist.test_resume_mcore import same_weights, undo_mains
from tests.megatron_lm.checkout import Outcome, pretrain
from tests.megatron_lm.matrix.table import BY_NAME
from tests.reference import RUNS
from wsm_megatron import MergeConfig, merge
from wsm_megatron.checkpoint.common_state import load_common, read_common
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.planning.launch_flags import (
    CONTINUE,
    DECAY,
    EVALUATE,
    FINETUNE,
    launches,
    position_of,
)

STEPS = "--train-iters 8 --min-lr 0 --save-interval 2 --eval-interval 100 --eval-iters 1"
LR_0 = (
    "--train-iters 7 --override-opt_param-scheduler --lr-decay-style linear --lr-decay-iters 1 "
    "--lr-warmup-iters 0"
)
_STEP = re.compile(r"iteration +(\d+)/.*?consumed samples: +(\d+).*?learning rate: (\S+)")


def steps(outcome: Outcome) -> list[tuple[int, int, float]]:
    """Iteration, consumed samples, and the LR of the next step, as printed after each step."""
    assert outcome.returncode == 0, outcome.log[-8000:]
    return [(int(i), int(n), float(lr)) for i, n, lr in _STEP.findall(outcome.log)]


def launch(megatron: Path, flags: str) -> Outcome:
    return pretrain(megatron, flags, plugin=False, timeout=900)


@pytest.fixture(scope="module")
def trained(megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by layout, trained when first asked for: iterations 2, 4, 6 of 8."""
    return _Runs(megatron, tmp_path_factory.mktemp("resume"))


class _Runs(dict[str, Path]):
    def __init__(self, megatron: Path, folder: Path):
        super().__init__()
        self._megatron, self._folder = megatron, folder

    def __missing__(self, name: str) -> Path:
        run = self._folder / name
        flags = f"{BY_NAME[name].flags} {STEPS} --exit-interval 6 --save {run}"
        outcome = launch(self._megatron, flags)
        assert outcome.returncode == 0, outcome.log[-8000:]
        self[name] = run
        return run


def merged(run: Path, save: Path, optimizer_state: str) -> Path:
    """The merge's root."""
    if not save.exists():
        config = MergeConfig(load=run, save=save, decay="mean", optimizer_state=optimizer_state)
        merge(config)
    return save


def test_unmerged_main_params_undo_the_merge(
    megatron: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The negative of what every row of the table promises (``test_matrix.py``)."""
    run = trained["dp2"]
    root = merged(run, tmp_path / "merged", "last")
    undo_mains(root / "iter_0000006", run / "iter_0000006")
    assert not check_resume(root).resumes
    flags = f"{BY_NAME['dp2'].flags} {STEPS} --load {root} --save {tmp_path / 'after'} {LR_0}"
    assert steps(launch(megatron, flags)) == [(7, 56, 0.0)]
    after = tmp_path / "after" / "iter_0000007"
    assert same_weights(root / "iter_0000006", after)
    assert same_weights(run / "iter_0000006", after) == []


ANNEAL = [(7, 56, 5.0e-4), (8, 64, 2.928932e-4), (9, 72, 1.339746e-4), (10, 80, 0.0)]


@pytest.mark.parametrize("state, goal, more, expected", [
    ("last", CONTINUE, "", [(7, 56, 1e-3), (8, 64, 1e-3)]),
    ("merge", CONTINUE, "", [(7, 56, 1e-3), (8, 64, 1e-3)]),
    ("last", DECAY, "", ANNEAL),
    ("drop", CONTINUE, "", [(7, 56, 1e-3), (8, 64, 1e-3)]),
    ("drop", DECAY, "", ANNEAL),
    ("last", FINETUNE, "--train-iters 2 --lr-decay-iters 8", [(1, 8, 5e-4), (2, 16, 1e-3)]),
    ("drop", FINETUNE, "--train-iters 2 --lr-decay-iters 8", [(1, 8, 5e-4), (2, 16, 1e-3)]),
    ("last", EVALUATE, "", []),
    ("drop", EVALUATE, "", []),
])  # fmt: skip
def test_the_flags_that_the_merge_prints(
    megatron: Path, trained: dict[str, Path], tmp_path: Path,
    state: str, goal: str, more: str, expected: list[tuple[int, int, float]],
) -> None:  # fmt: skip
    """Iteration, samples and LR of every row of the table in docs/resume.md."""
    root = merged(trained["dp2"], tmp_path / "merged", state)
    common = load_common(*read_common(root / "iter_0000006"))
    found = launches(optimizer=state != "drop", position=position_of(common), decay_steps=4)
    (flags,) = [" ".join(one.flags) for one in found if one.goal == goal]
    outcome = launch(megatron, f"{BY_NAME['dp2'].flags} {STEPS} --load {root} {flags} {more}")
    assert steps(outcome) == expected
    assert "successfully loaded checkpoint" in outcome.log
    if goal == EVALUATE:
        assert "validation loss" in outcome.log


def test_dropped_state_without_the_flag(
    megatron: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    root = merged(trained["dp2"], tmp_path / "merged", "drop")
    outcome = launch(megatron, f"{BY_NAME['dp2'].flags} {STEPS} --load {root}")
    assert outcome.returncode != 0
    assert "KeyError: 'optimizer'" in outcome.log
    assert any("KeyError 'optimizer'" in problem for problem in check_resume(root).problems)


def test_dropped_state_without_the_warm_up_flag(
    megatron: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The trap: the LR warms up again."""
    root = merged(trained["dp2"], tmp_path / "merged", "drop")
    flags = f"{BY_NAME['dp2'].flags} {STEPS} --load {root} --no-load-optim --no-load-rng"
    outcome = launch(megatron, flags)
    assert steps(outcome) == [(7, 56, 5e-4), (8, 64, 1e-3)]


def test_a_new_lr_with_loaded_state(
    megatron: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The trap: core 0.16 keeps the checkpoint's LR in silence, main refuses to start."""
    root = merged(trained["dp2"], tmp_path / "merged", "last")
    flags = f"{STEPS} --load {root} --override-opt_param-scheduler --lr 5e-4"
    outcome = launch(megatron, f"{BY_NAME['dp2'].flags} {flags}")
    if outcome.returncode == 0:
        assert steps(outcome) == [(7, 56, 1e-3), (8, 64, 1e-3)]
    else:
        assert "KeyError" in outcome.log


def test_another_number_of_iterations(
    megatron: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The trap: the scheduler compares it with the checkpoint's; with the override it goes on."""
    root = merged(trained["dp2"], tmp_path / "merged", "last")
    flags = f"{BY_NAME['dp2'].flags} {STEPS} --load {root} --train-iters 7"
    refused = launch(megatron, flags)
    assert refused.returncode != 0 and "number of iterations" in refused.log
    outcome = launch(megatron, f"{flags} --override-opt_param-scheduler")
    assert steps(outcome) == [(7, 56, 1e-3)]


@pytest.mark.parametrize("fixture", [runs.FLAT, runs.MAIN])
def test_checkpoints_of_the_other_format(megatron: Path, tmp_path: Path, fixture: str) -> None:
    """common.pt is read by every version, whatever version the sources were saved by."""
    config = MergeConfig(
        load=RUNS / fixture, save=tmp_path / "old", to=6, optimizer_state="last", format="0.16"
    )
    merge(config)
    flags = f"{BY_NAME['dp2'].flags} --train-iters 8 --eval-interval 100 --eval-iters 1"
    outcome = launch(megatron, f"{flags} --load {tmp_path / 'old'}")
    assert steps(outcome) == [(7, 56, 1e-3), (8, 64, 1e-3)]


def test_the_new_format_needs_a_new_megatron(megatron: Path, tmp_path: Path) -> None:
    config = MergeConfig(
        load=RUNS / runs.FLAT, save=tmp_path / "new", to=6, optimizer_state="last", format="0.19"
    )
    merge(config)
    flags = f"{BY_NAME['dp2'].flags} --train-iters 8 --eval-interval 100 --eval-iters 1"
    outcome = launch(megatron, f"{flags} --load {tmp_path / 'new'}")
    if _reads_new_format(megatron):
        assert steps(outcome) == [(7, 56, 1e-3), (8, 64, 1e-3)]
    else:
        assert outcome.returncode != 0 and "common.pt" in outcome.log


def _reads_new_format(megatron: Path) -> bool:
    serialization = megatron / "megatron" / "core" / "dist_checkpointing" / "serialization.py"
    return '"common_state"' in serialization.read_text()
