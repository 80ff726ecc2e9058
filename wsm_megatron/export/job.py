"""``export``: from a checkpoint to a published folder, on one rank or many."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.execution.rank import ProgressFactory
from wsm_megatron.export.options import ExportConfig
from wsm_megatron.export.plan import CheckpointExport, ExportPlan, make_plan
from wsm_megatron.export.rank import Written, check_read, run_rank
from wsm_megatron.export.side_files import write_beside
from wsm_megatron.export.target import Target
from wsm_megatron.process.signals import ending_later
from wsm_megatron.storage.fingerprint import check_unchanged
from wsm_megatron.storage.retry import check_storage
from wsm_megatron.storage.visibility import wait_for_directory, wait_for_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        family: None where the names are Megatron's.
        tensors: how many there are. nbytes: of them on disk.
        already: it was there before; nothing was done.
    """

    path: Path
    family: str | None
    tensors: int
    nbytes: int
    seconds: float
    already: bool = False

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"path": str(self.path)}


def export(
    config: ExportConfig,
    execution: ExecutionOptions = ExecutionOptions(),
    progress: ProgressFactory | None = None,
) -> ExportReport:
    """Write a checkpoint's weights for others, and publish them.

    Collective: under ``torchrun`` or ``srun`` every rank calls it with the same options, and all
    see the checkpoint and the target. Each writes files of its own; what is in them does not depend
    on the number of ranks. No model is built: memory is a few tiles a thread, and where a family
    stores a tensor transposed, that tensor of one layer and expert.

    Raises:
        UsageError: the model is of no family here, args lack something, or a tensor has no place.
        MergeError: the checkpoint is damaged, or the target cannot be written. Nothing is
            published.
    """
    started = time.monotonic()
    with (
        job_ranks() as ranks,
        ranks.watching(check_storage),
        Target(config.save) as target,
        ranks.watching(target.check),
    ):
        plans: list[CheckpointExport] = []

        def begin() -> Path | None:
            plans.append(make_plan(config))
            return target.begin(plans[0].record, plans[0].nbytes, ranks.check)

        directory = ranks.broadcast(begin, "planning")
        if directory is not None:
            _write(plans, directory, target, ranks, execution, progress)
        facts = ranks.broadcast(lambda: facts_of(plans[0]), "reporting")
        return ExportReport(
            path=config.save,
            **facts,
            seconds=time.monotonic() - started,
            already=directory is None,
        )


def facts_of(plan: ExportPlan) -> dict[str, Any]:
    """What a report says of the export itself."""
    return {
        "family": plan.record["family"],
        "tensors": plan.tensors,
        "nbytes": plan.nbytes,
    }


def _write(
    plans: list[CheckpointExport],
    directory: Path,
    target: Target,
    ranks: Ranks,
    execution: ExecutionOptions,
    progress: ProgressFactory | None,
) -> None:
    """Collective. ``plans``: one, on rank 0."""
    layout, shards = ranks.scatter(lambda rank: plans[0].share(rank, ranks.size), "planning")
    wait_for_directory(directory, ranks.check)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    shown = nullcontext(lambda _: None) if progress is None else progress(ranks.rank, total)
    with shown as moved:
        written = run_rank(layout, shards, directory, ranks, execution, moved)
    of_ranks = ranks.gather(written)
    with ranks.together("publishing"):
        if ranks.rank == 0:
            _publish(plans[0], directory, target, of_ranks, ranks)


def _publish(
    plan: CheckpointExport, directory: Path, target: Target, of_ranks: list[Written], ranks: Ranks
) -> None:
    files: Files = {}
    for one in of_ranks:
        files |= one.files
    wait_for_files(directory, {name: size for name, (size, _) in files.items()}, ranks.check)
    check_read(plan.layout, [one.ledger for one in of_ranks])
    check_unchanged(plan.layout.path, plan.before)
    files |= write_rest(plan, directory)
    with ending_later("what was made is published"):
        target.commit(plan.record, files)
    logger.info("published %s", target.path)


def write_rest(plan: ExportPlan, directory: Path) -> Files:
    """Write what an export has beside its tensors, durably."""
    files = {name: write_file(directory / name, data) for name, data in plan.index().items()}
    return files | write_beside(directory, plan.config, plan.tokenizer)
