"""Runs that are killed, signalled or out of space, and what the next start makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.megatron_lm.checkout import Outcome, pretrain
from tests.megatron_lm.matrix.cell import WSM
from tests.megatron_lm.matrix.promises import assert_merged
from tests.megatron_lm.matrix.table import SHARDED, TRAIN
from wsm_megatron import verify

FLAGS = f"{SHARDED} {TRAIN}"


@pytest.fixture(scope="module")
def plain_losses(megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Training losses without the plugin, by the iteration of the restart: with mock data they are
    not those of a run that was never interrupted."""
    root = tmp_path_factory.mktemp("plain")
    pretrain(megatron, f"{FLAGS} --save {root / 'run'}", plugin=False)
    losses: dict[int, list[str]] = {8: []}
    for iteration in (2, 4):
        run = root / f"from{iteration}"
        name = f"iter_{iteration:07d}"
        shutil.copytree(root / "run" / name, run / name)
        (run / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        outcome = pretrain(megatron, f"{FLAGS} --save {run} --load {run}", plugin=False)
        losses[iteration] = _training_losses(outcome)
    return losses


def _training_losses(outcome: Outcome) -> list[str]:
    return [loss for loss in outcome.losses if "lm loss:" in loss]


@pytest.mark.parametrize(
    ("fault", "store", "published"),
    [
        ("1 SIGKILL store save_file 2", "disk", 0),  # iteration 4 half copied, not yet saved
        ("0 SIGKILL driver emit 1", "memory", 0),
        ("1 SIGKILL emit checksums 1", "memory", 0),  # merged checkpoint whole, not yet published
        ("0 SIGKILL emit write_tracker 1", "disk", 1),  # published, tracker not yet moved
        ("0 SIGKILL driver emit 2", "memory", 1),  # at the end of training
    ],
)
def test_a_killed_run_continues(
    megatron: Path,
    tmp_path: Path,
    plain_losses: dict[int, list[str]],
    fault: str,
    store: str,
    published: int,
) -> None:
    run = tmp_path / "run"
    flags = f"{FLAGS} --save {run} --load {run} {WSM} --wsm-merge-store {store}"
    first = pretrain(megatron, flags, env={"FAULT": fault})
    assert first.returncode != 0 and "SIGKILL" in first.log, first.log[-8000:]
    merged = list((run / "wsm").glob("iter_*"))
    for checkpoint in merged:
        verify(checkpoint, allow_nonfinite=True)
    assert len(merged) == published
    second = pretrain(megatron, flags)
    assert second.returncode == 0, second.log[-8000:]
    assert_merged(run, (4, 6, 8))
    assert (run / "wsm" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert not list((run / "wsm").glob(".*"))
    training = _training_losses(second)
    assert training == plain_losses[8 - len(training)]


def test_sigusr2_asks_for_a_merged_checkpoint(megatron: Path, tmp_path: Path) -> None:
    """One rank gets it after iteration 3; the merge comes with the snapshot of iteration 4."""
    run = tmp_path / "run"
    flags = f"{FLAGS} --save {run} --wsm-merge --wsm-merge-num 2"
    outcome = pretrain(megatron, flags, env={"FAULT": "1 SIGUSR2 driver Driver.stepped 3"})
    assert outcome.returncode == 0, outcome.log[-8000:]
    merged = sorted(p.name for p in (run / "wsm").glob("iter_*"))
    assert merged == ["iter_0000004", "iter_0000008"]
    assert_merged(run, (2, 4), "linear")


def test_snapshots_may_come_between_saves(megatron: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = f"{FLAGS} --save {run} --wsm-merge --wsm-merge-window-iters 4 --wsm-merge-interval 1"
    outcome = pretrain(megatron, f"{flags} --wsm-merge-start-iter 6 --wsm-merge-store disk")
    assert outcome.returncode == 0, outcome.log[-8000:]
    assert "merged [6, 7, 8] into" in outcome.log
    assert sorted(p.name for p in (run / "wsm_shards").iterdir()) == [
        "iter_0000006",
        "iter_0000007",
        "iter_0000008",
    ]


def test_tokens_are_counted_at_the_length_they_were_trained_with(
    megatron: Path, tmp_path: Path
) -> None:
    """8 samples an iteration, of 16 tokens up to iteration 4, of 32 from there on."""
    run = tmp_path / "run"
    flags = f"{FLAGS} --save {run} --load {run} --wsm-merge --wsm-merge-num 4"
    longer = "--seq-length 32 --max-position-embeddings 32"
    for extra in ("--exit-interval 4", longer):
        outcome = pretrain(megatron, f"{flags} {extra}")
        assert outcome.returncode == 0, outcome.log[-8000:]
    merged = json.loads((run / "wsm" / "iter_0000008" / "wsm_merge.json").read_text())
    assert [source["iteration"] for source in merged["sources"]] == [2, 4, 6, 8]
    assert (merged["positions"], merged["unit"]) == ([256, 512, 1024, 1536], "tokens")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--wsm-merge-num 3", "without effect: --wsm-merge is not given"),
        ("--wsm-merge --wsm-merge-num 3 --lr-decay-style cosine", "cosine decays the LR"),
        ("--wsm-merge --wsm-merge-num 99999999", "snapshots needs"),
    ],
)
def test_wrong_flags_are_refused_before_training(
    megatron: Path, tmp_path: Path, flags: str, message: str
) -> None:
    outcome = pretrain(megatron, f"{FLAGS} --save {tmp_path / 'run'} {flags}")
    assert outcome.returncode != 0 and outcome.losses == []
    assert message in outcome.log
