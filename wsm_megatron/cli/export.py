"""Flags of ``wsm export``."""

from __future__ import annotations

import argparse

from wsm_megatron.cli.ranks import LocalLaunch
from wsm_megatron.config import JOB, ExecutionOptions
from wsm_megatron.errors import UsageError
from wsm_megatron.export.options import EXPORT, ExportConfig
from wsm_megatron.options import add_flags, given_flags, local_path, typed

EXPORT_OPTIONS = tuple(one for one in ExportConfig.options() if one.name != "load")
JOB_OPTIONS = (
    *(one for one in ExecutionOptions.options() if one.name in ("threads", "memory", "retries")),
    *LocalLaunch.options(),
)
"""How the job runs: what an export has to do with of a merge's options."""


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    command.add_argument(
        "checkpoint", type=typed(local_path), help="an iter_XXXXXXX folder, merged or not"
    )
    add_flags(command.add_argument_group(EXPORT), EXPORT_OPTIONS)
    add_flags(command.add_argument_group(JOB), JOB_OPTIONS)


def export_options(
    arguments: argparse.Namespace,
) -> tuple[ExportConfig, ExecutionOptions, int | None]:
    """What is exported, how the job runs, and how many ranks are started for it here."""
    given = given_flags(arguments, (*EXPORT_OPTIONS, *JOB_OPTIONS))
    if "save" not in given.values:
        raise UsageError("give --save, the folder that the export becomes")
    return (
        ExportConfig(load=arguments.checkpoint, **given.of(ExportConfig)),
        ExecutionOptions(**given.of(ExecutionOptions)),
        LocalLaunch(**given.of(LocalLaunch)).local_ranks,
    )
