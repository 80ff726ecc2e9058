"""From what all ranks have written to checkpoints and exports under their names."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from wsm_megatron.checkpoint.layout import COMMON_FILE, MARKER_FILE, METADATA_FILE
from wsm_megatron.checkpoint.metadata_writer import write_marker, write_metadata
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import StagingDirectory
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.event_log import Events
from wsm_megatron.export.merged import MergedExports
from wsm_megatron.planning.job import Job, RankPlan
from wsm_megatron.planning.provenance import write_provenance
from wsm_megatron.planning.staging_key import placement, staging_key
from wsm_megatron.planning.targets import Claims
from wsm_megatron.process.signals import ending_later
from wsm_megatron.storage.visibility import wait_for_files

logger = logging.getLogger(__name__)


def staging_directories(
    job: Job, rank_plans: Sequence[RankPlan], claims: Claims
) -> list[StagingDirectory]:
    """Where each output is made, not created yet. On rank 0, which holds the targets' locks."""
    staging = []
    for k, output in enumerate(job.outputs):
        placed = placement(job, k, rank_plans)
        key, files = staging_key(job, output, placed), tuple(placed.sizes)
        lock = claims.lock(output)
        staging.append(StagingDirectory(output.root, output.iteration, key, files, lock))
    return staging


def publish(
    job: Job,
    ranks: Ranks,
    rank_plans: Sequence[RankPlan],
    staging: list[StagingDirectory],
    exports: MergedExports,
    of_ranks: list[list[Files]],
    events: Events,
) -> None:
    """Complete every output's directories, then give them their names. On rank 0.

    Args:
        of_ranks: ``[rank][output]``: the files that each rank has written.
    """
    seconds, metadata = [], dict[int, int]()
    for k, stage in enumerate(staging):
        started = time.monotonic()
        files: Files = {}
        for by_product in of_ranks:
            files.update(by_product[k])
        sizes = {name: size for name, (size, _) in files.items()}
        wait_for_files(stage.path, sizes, ranks.check)
        complete(job, k, rank_plans, stage.path, files)
        metadata[k] = files[METADATA_FILE][1]
        seconds.append(time.monotonic() - started)
    for k, output in enumerate(job.outputs):
        exports.complete(output, metadata.get(k), ranks.check)
    # all is done and checked: a signal shall not divide what belongs together
    with ending_later("what was made is published"):
        for stage, before in zip(staging, seconds, strict=True):
            started = time.monotonic()
            path = stage.commit()
            logger.info("published %s", path)
            took = before + time.monotonic() - started
            events.tell("published", path=str(path), publishing_seconds=took)
        for output in job.outputs:
            if (folder := exports.commit(output)) is not None:
                events.tell("published", path=str(folder))


def complete(
    job: Job, k: int, rank_plans: Sequence[RankPlan], directory: Path, files: Files
) -> None:
    """Write what an output has once, beside what ranks have written, and note it in ``files``."""
    output = job.outputs[k]
    placed = [
        one for rank, rank_plan in enumerate(rank_plans) for one in job.placed(k, rank, rank_plan)
    ]
    named, paths = job.on_disk(output, placed)
    files[METADATA_FILE] = write_metadata(directory, named, job.newest(output).mcore_data, paths)
    if output.common.file is not None:
        files[COMMON_FILE] = write_file(directory / COMMON_FILE, output.common.file)
    if (marker := job.marker(output)) is not None:
        files[MARKER_FILE] = write_marker(directory, marker)
    write_provenance(directory, output.provenance, files)
