"""One input, from its seed to what became of it. For a process that ends afterwards."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from tests.fuzz import oracle
from tests.fuzz.case import WEIGHTS, Case, make_case
from tests.fuzz.guard import ForbiddenError, Guard, limit, memory_used
from wsm_megatron.cli import inspect, merge, resume_check, verify  # noqa: F401 - before the fork
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_DOES_NOT_RESUME

Outcome = tuple[str, str]
"""What happened, in a word or two, and more about it. Words in capitals are violations."""

_LONGEST_MESSAGE = 3000


def run(seed: int, folder: Path, only: str = "") -> tuple[list[str], Outcome]:
    """The kinds of the input of a seed, and its outcome."""
    case = make_case(seed, folder, only)
    os.chdir(folder)
    guard = Guard(case.target, (folder / "log",))
    most = limit()
    try:
        outcome = _judge(case)
    except ForbiddenError:
        outcome = "DID SOMETHING", "forbidden"
    if memory_used() > most:
        outcome = "TOO MUCH MEMORY", f"{memory_used() / 2**20:.0f} MiB"
    if guard.seen:
        outcome = "DID SOMETHING", "; ".join(guard.seen)
    return case.kinds, outcome


def _judge(case: Case) -> Outcome:
    newest = case.target / "iter_0000008"
    load = ["--load", str(case.run), "--save", str(case.target), "--iterations", "6,8"]
    how = ["--weights", ",".join(map(str, WEIGHTS)), "--optimizer-state", case.optimizer_state]
    status, message = wsm("merge", *load, *how)
    problem = _unclean(status, message)
    if problem:
        return problem
    if status:
        left = (
            sorted(path.name for path in case.target.glob("**/*")) if case.target.exists() else []
        )
        if left:
            return "LEFT SOMETHING", f"{left} after: {message}"
    else:
        problem = _wrong(case, newest, rebuilt="rebuilt from the merged model" in message)
        if problem:
            return problem
        verified, said = wsm("verify", "--sources", str(newest))
        if verified:
            return "OWN MERGE REFUSED", f"{verified} {said}"
    for arguments in _also(case, merged=status == 0):
        problem = _unclean(*wsm(*arguments))
        if problem:
            return problem
    return ("merged", "") if status == 0 else ("refused", message)


def _also(case: Case, merged: bool) -> list[list[str]]:
    """Further commands that must end cleanly, whatever they find."""
    other = case.chance.choice(("inspect", "resume-check"))
    also = [[other, str(case.chance.choice((case.run, case.victim)))]]
    return also if merged or case.chance.random() < 0.3 else [["verify", str(case.victim)]]


def wsm(*arguments: str) -> tuple[int | str, str]:
    """Exit status of a command, or the traceback that ended it, and what went to stderr.

    2 is the status of a ``UsageError`` alone: any other error that is no ``MergeError`` ends in a
    traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    logging.getLogger("wsm_megatron").handlers.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return main(list(arguments)), err.getvalue()
        except SystemExit as ended:  # of argparse: the test's own arguments are wrong
            return f"SystemExit {ended.code}", err.getvalue()
        except Exception:
            return traceback.format_exc()[-1500:], err.getvalue()


def _unclean(status: int | str, message: str) -> Outcome | None:
    if isinstance(status, str):
        return ("OUT OF MEMORY" if "MemoryError" in status else "TRACEBACK"), status
    if "Traceback" in message or "Logging error" in message:
        return "TRACEBACK", message[-1500:]
    lines = [line for line in message.splitlines() if not line.startswith(("WARNING", "wsm: WARN"))]
    if status not in (0, 1, 2, EXIT_DOES_NOT_RESUME):
        return "STRANGE STATUS", f"{status} {message}"
    clean = len(lines) == 1 and len(message) <= _LONGEST_MESSAGE and lines[0].isprintable()
    return None if clean or status not in (1, 2) else ("UNCLEAN MESSAGE", message[:1500])


def _wrong(case: Case, output: Path, rebuilt: bool) -> Outcome | None:
    try:
        merged = oracle.load(output, lambda key: True)
    except (Exception, CheckpointException) as error:
        return "MERGE DOES NOT LOAD", f"{type(error).__name__}: {error}"
    try:
        expected = oracle.expected(case, rebuilt)
    except (Exception, CheckpointException) as error:
        return "MERGED WHAT TORCH REFUSES", f"{type(error).__name__}: {error}"[:1000]
    if merged.keys() != expected.keys():
        return "WRONG KEYS", str(sorted(merged.keys() ^ expected.keys()))
    wrong = [key for key, tensor in expected.items() if not oracle.same(merged[key], tensor)]
    if wrong:
        return "WRONG BITS", ", ".join(wrong)
    for key, data in oracle.objects(output).items():
        if not oracle.loads(data):
            return "BROKEN BYTES", key
    return None


def in_fork(seed: int, folder: Path, only: str, pipe: int) -> None:
    """Write the outcome to ``pipe`` and end."""
    torch.set_num_threads(1)  # torch's pool, made anew after a fork, is not safe to make in threads
    try:
        kinds, outcome = run(seed, folder, only)
    except BaseException:
        kinds, outcome = [], ("BROKEN TEST", traceback.format_exc()[-2000:])
    text = "\0".join([",".join(kinds), *outcome])
    os.write(pipe, text.encode("utf-8", "backslashreplace")[:60000])
    sys.stdout.flush()
    os._exit(0)
