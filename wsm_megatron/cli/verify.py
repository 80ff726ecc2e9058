"""``wsm verify``: check a checkpoint on disk, every byte."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.figures import size
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.errors import EXIT_FAILED, MergeError, UsageError
from wsm_megatron.inspection.lookup import checkpoints_at
from wsm_megatron.inspection.verify import SOURCES, VerifyReport, verify
from wsm_megatron.options import local_path, typed


def add_verify(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "verify", _verify, help)
    command.add_argument(
        "directory",
        type=typed(local_path),
        nargs="?",
        help="a checkpoint, a tracker (for what it names), a root or a folder of roots (for all in "
        "them)",
    )
    command.add_argument(
        "--sources",
        nargs="?",
        const="sample",
        metavar="all|sample",
        help="make the merge again from its sources and compare it bit for bit: some elements of "
        "every tensor, or all",
    )
    command.add_argument(
        "--sources-from",
        type=typed(local_path),
        metavar="RUN",
        help="the run directory where the sources are now (default: where they were merged from)",
    )
    command.add_argument("--allow-nonfinite", action="store_true", help="let NaN and Inf pass")


def _verify(arguments: argparse.Namespace) -> Answer:
    directory, sources = arguments.directory, arguments.sources
    if directory is None and sources not in (None, *SOURCES):  # `--sources DIRECTORY`
        directory, sources = Path(sources), "sample"
    if directory is None:
        raise UsageError("name a checkpoint, an iter_XXXXXXX directory, or a root of them")

    def checked(path: Path) -> VerifyReport:
        return verify(
            path,
            sources=sources or False,
            sources_from=arguments.sources_from,
            allow_nonfinite=arguments.allow_nonfinite,
            progress=partial(progress_bar, doing="reading"),
        )

    checkpoints = checkpoints_at(directory)
    if len(checkpoints) == 1:
        done = checked(checkpoints[0])
        return Answer(_verified(done), lambda: _data(done))
    return _verify_all(checkpoints, checked)


def _verify_all(checkpoints: Sequence[Path], checked: Callable[[Path], VerifyReport]) -> Answer:
    """Each of several, also after one that is not whole."""
    lines: list[str] = []
    data: list[dict[str, Any]] = []
    for path in checkpoints:
        try:
            done = checked(path)
        except (MergeError, UsageError) as error:
            lines.append(f"NOT WHOLE: {error}")
            data.append({"path": str(path), "problem": str(error)})
        else:
            lines += _verified(done)
            data.append(_data(done))
    wrong = sum("problem" in one for one in data)
    lines.append(f"{len(data) - wrong} of {len(data)} checkpoints are whole")
    return Answer(lines, lambda: {"checkpoints": data}, EXIT_FAILED if wrong else 0)


def _data(done: VerifyReport) -> dict[str, Any]:
    return {**asdict(done), "path": str(done.path)}


def _verified(done: VerifyReport) -> Iterator[str]:
    kind = "merged checkpoint" if done.merged else "checkpoint"
    yield (
        f"{done.path}: {kind} is whole: {done.tensors} tensors and {done.objects} objects, "
        f"{size(done.bytes_read)} read, checksums and values right"
    )
    if done.merged:
        yield f"{done.files} files are what the merge wrote"
    if done.unchecked:
        yield (
            f"not checked, as the wsm_merge.json of an earlier version does not list them: "
            f"{', '.join(done.unchecked)}"
        )
    if done.recomputed is not None:
        how_many = "all" if done.recomputed == "all" else "some of"
        yield (
            f"{how_many} its elements recomputed from the sources, {done.samples:,}: the same bits"
        )
