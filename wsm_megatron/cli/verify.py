"""``wsm verify``: check a checkpoint on disk, every byte."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.figures import size
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.verify import SOURCES, VerifyReport, verify
from wsm_megatron.options import local_path, typed


def add_verify(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "verify", _verify, help)
    command.add_argument("directory", type=typed(local_path), nargs="?")
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
        raise UsageError("name the checkpoint, an iter_XXXXXXX directory")
    done = verify(
        directory,
        sources=sources or False,
        sources_from=arguments.sources_from,
        allow_nonfinite=arguments.allow_nonfinite,
    )
    return Answer(_verified(done), lambda: {**asdict(done), "path": str(done.path)})


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
