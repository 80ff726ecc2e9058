"""``--local-ranks``: ranks that the command forks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.cli.main import main
from wsm_megatron.comm.local_ranks import run_forked
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE

WSM = [sys.executable, "-m", "wsm_megatron"]


def run_with_ranks(run: Path, out: Path, ranks: int, *more: str) -> subprocess.CompletedProcess:
    command = [*WSM, "merge", "--load", str(run), "--save", str(out), "--local-ranks", str(ranks)]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_checkpoint_as_without(tmp_path: Path, ranks: int) -> None:
    run = RUNS / runs.MOE
    done = run_with_ranks(run, tmp_path / "forked", ranks, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [one["rank"] for one in report["ranks"]] == list(range(ranks))
    assert main(["merge", "--load", str(run), "--save", str(tmp_path / "alone")]) == 0
    merged = load_tensors(tmp_path / "forked" / "iter_0000008")
    alone = load_tensors(tmp_path / "alone" / "iter_0000008")
    assert merged.keys() == alone.keys()
    assert all(merged[key].equal(tensor) for key, tensor in alone.items())


def test_an_error_ends_every_rank(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    path = runs.checkpoint(run, 6)
    where = read_layout(path).tensors["decoder.layers.mlp.linear_fc1.weight"].chunks[0].location
    runs.flip_byte(path / where.file, where.offset + where.length // 2)
    done = run_with_ranks(run, tmp_path / "out", 2)
    assert done.returncode == EXIT_FAILED
    assert done.stderr.count("iter_0000006") == 1 and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("iter_*"))


def test_wrong_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / "out")]
    assert main([*command, "--local-ranks", "0"]) == EXIT_USAGE
    assert "--local-ranks 0: at least one" in capfd.readouterr().err
    assert main([*command, "--local-ranks", "2", "--last", "1"]) == EXIT_USAGE
    assert capfd.readouterr().err == "wsm merge: --last 1: a merge needs at least two checkpoints\n"


def test_options_that_do_not_fit_the_run_are_told_once(tmp_path: Path) -> None:
    done = run_with_ranks(RUNS / runs.DENSE, tmp_path / "out", 3, "--last", "9")
    assert done.returncode == EXIT_USAGE
    (line,) = done.stderr.splitlines()
    assert line.startswith("ERROR: rank 0 failed in planning: --last 9: ")


def test_ranks_do_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "555"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"--local-ranks: this process is rank 1 of 4 .* already"):
        run_forked(2, lambda: 0)


def _killed() -> int:
    """Rank 1 dies; rank 0 would wait for ever."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


def _raises() -> int:
    raise RuntimeError(f"a defect on rank {os.environ['RANK']}")


def _stopped() -> int:
    """Ends with 7 by a signal that the parent, asked by rank 0, passes on to all ranks."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    if os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()


@pytest.mark.parametrize(
    "rank_main, status",
    [(lambda: 0, 0), (lambda: 3, 3), (_killed, 128 + signal.SIGKILL), (_raises, EXIT_FAILED)],
)
def test_exit_status(rank_main: Callable[[], int], status: int) -> None:
    assert run_forked(2, rank_main) == status


def test_signals_reach_the_ranks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_forked(1, _stopped) == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_whose_parent_has_died_does_not_start(tmp_path: Path) -> None:
    code = (
        "import os, signal, torch.distributed as dist\n"
        "from wsm_megatron.comm.local_ranks import run_forked\n"
        "dist.TCPStore = lambda *_, **__: os._exit(9)\n"
        f"run_forked(2, lambda: open({str(tmp_path / 'ran')!r}, 'w').write('x'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == 9  # its pipes are closed, so the ranks have ended too
    assert not (tmp_path / "ran").exists()
