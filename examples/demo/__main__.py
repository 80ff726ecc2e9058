"""Merge a shipped run; then train one, merge it, load everything with megatron-core, compare."""

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
_SHIPPED = Path(__file__).parents[2] / "tests/data/runs/mcore0.16-moe-ep2-dp_reshardable"
"""A tiny MoE's run, written by megatron-core with EP2."""


def main() -> None:
    arguments = _parser().parse_args()
    out: Path = arguments.out
    if out.exists():
        shutil.rmtree(out)
    _merge_shipped(out)
    print(
        f"\nNow a run of its own: {arguments.steps} steps on {_RANKS} CPU ranks, merges of it, and "
        "their held-out losses: 1 to 4 minutes",
        flush=True,
    )
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
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-interval", type=int, default=20)
    return parser


def _merge_shipped(out: Path) -> None:
    """What a merge looks like, in seconds."""
    _wsm("merge", "--load", _shown(_SHIPPED), "--save", out / "first", "--last", 3)
    _wsm("verify", out / "first")


def _shown(path: Path) -> Path:
    """As short as it can be."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _wsm(*arguments: object, json_report: bool = False) -> str:
    """Run the command line and show the command; what it printed, if a report is wanted."""
    words = [str(argument) for argument in arguments]
    print("$ wsm", *words, flush=True)
    console_script = Path(sys.executable).with_name("wsm")
    if not json_report:
        subprocess.run([console_script, *words], check=True)
        return ""
    done = subprocess.run(
        [console_script, *words, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


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
    what = ("--load", out / "run", "--save", out / "merged", "--last", _LAST, "--decay", _DECAYS)
    printed = _wsm("merge", *what, "--sliding-every", sliding_every, json_report=True)
    report = json.loads(printed.splitlines()[-1])
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
