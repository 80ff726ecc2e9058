"""Train, merge with ``wsm merge``, load everything with megatron-core, compare."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.cpu_ranks import run_ranks
from examples.demo.ranks import held_out_losses, train_and_save
from examples.demo.report import Merge, Results, plot, table

_RANKS = 2
_DECAYS = "mean,1-sqrt,ema"
_LAST = 4
"""Checkpoints to merge; windows that reach back into the fast early phase lose."""


def main() -> None:
    arguments = _parser().parse_args()
    out: Path = arguments.out
    if out.exists():
        shutil.rmtree(out)
    started = time.monotonic()
    iterations = _train(out, arguments.steps, arguments.save_interval)
    trained = time.monotonic()
    merges = _merge(out, sliding_every=_LAST * arguments.save_interval)
    merged = time.monotonic()
    results = _evaluate(out, iterations, merges)
    evaluated = time.monotonic()

    print("\n".join(("", *table(results), "")))
    plot(results, out / "losses.png")
    _write_json(results, out / "losses.json")
    print(
        f"{trained - started:.0f} s training, {merged - trained:.0f} s making {len(merges)} merges,"
        f" {evaluated - merged:.0f} s evaluating; see {out / 'losses.png'}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="replaced if it exists")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-interval", type=int, default=50)
    return parser


def _train(out: Path, steps: int, save_interval: int) -> list[int]:
    """The iterations of the run's checkpoints."""
    run_ranks(
        train_and_save,
        _RANKS,
        out / "logs",
        timeout=3600,
        echo=True,
        root=out / "run",
        steps=steps,
        save_interval=save_interval,
    )
    return list(range(save_interval, steps + 1, save_interval))


def _merge(out: Path, sliding_every: int) -> list[Merge]:
    """Every decay at the end of the run, and earlier on, as if the run had been stopped there."""
    command = ["wsm", "merge", "--load", str(out / "run"), "--save", str(out / "merged")]
    command += ["--last", str(_LAST), "--decay", _DECAYS, "--sliding-every", str(sliding_every)]
    print("$", *command, flush=True)
    console_script = Path(sys.executable).with_name("wsm")
    done = subprocess.run(
        [console_script, *command[1:], "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{len(report['merged'])} merges in {report['seconds']:.1f} s:"
        f" {report['bytes_read'] / 1e6:.0f} MB read, {report['bytes_written'] / 1e6:.0f} MB written"
    )
    return [
        Merge(
            decay=Path(merge["output"]).parent.name,
            num=len(merge["iterations"]),
            iteration=merge["iterations"][-1],
            root=Path(merge["output"]).parent,
        )
        for merge in report["merged"]
    ]


def _evaluate(out: Path, iterations: list[int], merges: list[Merge]) -> Results:
    checkpoints = [(out / "run", iteration) for iteration in iterations]
    checkpoints += [(merge.root, merge.iteration) for merge in merges]
    losses = run_ranks(
        held_out_losses, _RANKS, out / "logs", timeout=3600, echo=True, checkpoints=checkpoints
    )[0]
    return Results(
        trained=dict(zip(iterations, losses, strict=False)),
        merged=dict(zip(merges, losses[len(iterations) :], strict=True)),
    )


def _write_json(results: Results, path: Path) -> None:
    merged = [
        {"decay": merge.decay, "num": merge.num, "iteration": merge.iteration, "loss": loss}
        for merge, loss in results.merged.items()
    ]
    path.write_text(json.dumps({"trained": results.trained, "merged": merged}, indent=1))


if __name__ == "__main__":
    main()
