"""WSM against WSD: train, decay and merge; then make the page of it.

    python -m examples.wsm_vs_wsd run hour --out evidence-out
    python -m examples.wsm_vs_wsd page --out evidence-out

A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from examples.cpu_ranks import run_ranks
from examples.wsm_vs_wsd.plan import plan
from examples.wsm_vs_wsd.profile import PROFILES
from examples.wsm_vs_wsd.queue import Queue
from examples.wsm_vs_wsd.record import collect, record_run

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_DATA = Path(__file__).with_name("data")


def main() -> None:
    arguments = _parser().parse_args()
    arguments.does(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wsm_vs_wsd",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="work off the arms of a profile")
    run.add_argument("profile", choices=list(PROFILES))
    run.add_argument("--out", type=Path, required=True, help="results; what is there is not redone")
    run.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    run.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm after that")
    run.set_defaults(does=_run)
    work = commands.add_parser("work", help="one worker, which run starts")
    for name in ("profile", "out", "deadline", "number"):
        work.add_argument(name)
    work.set_defaults(does=_work)
    page = commands.add_parser("page", help="collect results, make tables, figures and the page")
    page.add_argument("--out", type=Path, help="of run; without it, the data that is committed")
    page.add_argument("--data", type=Path, default=_DATA / "hour.json", help="one file of them all")
    page.add_argument("--docs", type=Path, default=_DOCS, help="for evidence.md and its figures")
    page.set_defaults(does=_page)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    out, profile = arguments.out.absolute(), PROFILES[arguments.profile]
    record_run(out, profile)
    queue = Queue(out, plan(profile))
    deadline = time.time() + 60 * arguments.minutes
    command = [sys.executable, "-m", "examples.wsm_vs_wsd", "work", profile.name, str(out)]
    workers = [
        subprocess.Popen([*command, str(deadline), str(number)])
        for number in range(arguments.workers)
    ]
    try:
        failed = [worker for worker in workers if worker.wait() != 0]
    finally:
        for worker in workers:
            worker.terminate()
    left = [arm.name for arm in queue.arms if arm not in queue.done()]
    print(f"{len(queue.arms) - len(left)} of {len(queue.arms)} arms are done", flush=True)
    if failed:
        raise SystemExit("a worker failed: see its output above")


def _work(arguments: argparse.Namespace) -> None:
    """A rank of its own group, on one core."""
    from examples.wsm_vs_wsd.worker import work

    out = Path(arguments.out)
    run_ranks(
        work,
        1,
        out / "logs" / f"worker{arguments.number}",
        timeout=7 * 24 * 3600,
        echo=True,
        out=out,
        profile=arguments.profile,
        deadline=float(arguments.deadline),
        shows=arguments.number == "0",
    )


def _page(arguments: argparse.Namespace) -> None:
    from examples.wsm_vs_wsd.page import write_page

    data = arguments.data
    if arguments.out is not None:
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(collect(arguments.out), separators=(",", ":")) + "\n")
    print(write_page(json.loads(data.read_text()), arguments.docs))


if __name__ == "__main__":
    main()
