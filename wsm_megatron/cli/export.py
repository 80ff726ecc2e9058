"""``wsm export``: a checkpoint's weights for others."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from wsm_megatron.cli.command import Answer, LocalLaunch, add
from wsm_megatron.cli.figures import size
from wsm_megatron.cli.progress import progress_bar
from wsm_megatron.cli.ranks import on_ranks
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.config import JOB, ExecutionOptions
from wsm_megatron.errors import UsageError
from wsm_megatron.export.job import ExportReport, export
from wsm_megatron.export.options import EXPORT, ExportConfig
from wsm_megatron.options import add_flags, given_flags, local_path, typed

EXPORT_OPTIONS = tuple(one for one in ExportConfig.options() if one.name != "load")
JOB_OPTIONS = (
    *(one for one in ExecutionOptions.options() if one.name in ("threads", "memory", "retries")),
    *LocalLaunch.options(),
)
"""How the job runs: what an export has to do with of a merge's options."""


def add_export(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "export", _export, help)
    command.add_argument(
        "checkpoint", type=typed(local_path), help="an iter_XXXXXXX folder, merged or not"
    )
    add_flags(command.add_argument_group(EXPORT), EXPORT_OPTIONS)
    add_flags(command.add_argument_group(JOB), JOB_OPTIONS)


def _export(arguments: argparse.Namespace) -> Answer:
    given = given_flags(arguments, (*EXPORT_OPTIONS, *JOB_OPTIONS))
    if "save" not in given.values:
        raise UsageError("give --save, the folder that the export becomes")
    config = ExportConfig(load=arguments.checkpoint, **given.of(ExportConfig))
    execution = ExecutionOptions(**given.of(ExecutionOptions))

    def on_rank(ranks: Ranks) -> Answer:
        done = export(config, execution, partial(progress_bar, doing="exporting"))
        return Answer(exported(done), done.as_data) if ranks.rank == 0 else Answer()

    return on_ranks(arguments, LocalLaunch(**given.of(LocalLaunch)), on_rank)


def exported(done: ExportReport) -> Iterator[str]:
    what = f"{done.tensors} tensors, {size(done.nbytes)}"
    family = "Megatron's names" if done.family is None else done.family
    was = "was exported before" if done.already else f"exported in {done.seconds:.2f} s"
    yield f"{was}: {done.path} ({family}, {what})"
