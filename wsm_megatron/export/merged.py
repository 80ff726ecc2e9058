"""Exports of merges, made in the pass that merges: planned before, published after, by rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.staging_dir import leftovers
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.errors import UsageError
from wsm_megatron.execution.targets import CheckpointDirectory, Destination
from wsm_megatron.export.job import ExportReport, facts_of, write_rest
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.export.plan import METADATA_CRC, ExportPlan, merged_model, plan_of
from wsm_megatron.export.shard_file import ShardFile
from wsm_megatron.export.sink import ExportDirectory, WithExport
from wsm_megatron.export.spread import Spread, spreads_of, turned_places
from wsm_megatron.export.target import Target
from wsm_megatron.export.turn import Turned
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.output_paths import check_export
from wsm_megatron.planning.tasks import Task
from wsm_megatron.storage.space import allocated, check_space
from wsm_megatron.storage.visibility import wait_for_files

logger = logging.getLogger(__name__)


@dataclass
class _Export:
    """One export.

    Attributes:
        spreads: where tensors go, by key. directory: not yet published; None while nobody makes it.
        files: what is written, by name: bytes and CRC-32.
    """

    config: ExportConfig
    plan: ExportPlan
    spreads: dict[str, Spread]
    target: Target
    directory: Path | None = None
    files: Files = field(default_factory=dict)
    published: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return {shard.name: shard.size for shard in self.plan.shards}

    def create_files(self) -> None:
        """Make its files, of their size: what is not written of them are holes."""
        assert self.directory is not None
        for shard in self.plan.shards:
            file = ShardFile(self.directory / shard.name, shard.size)
            file.write(0, memoryview(shard.header))
            self.files[shard.name] = file.close()

    def add(self, shared: Files) -> None:
        """Take in what a rank has written, as of :class:`.Closed`."""
        for name, (nbytes, crc) in shared.items():
            before, share = self.files[name]
            self.files[name] = before + nbytes, share ^ crc


class MergedExports:
    """The exports of a job's merges, by the merges' paths. For rank 0; elsewhere there are none.

    A context manager, which gives up what is not published. Without ``--export`` it does nothing.

    Args:
        root: of the merges, under which their exports are named as they are.
    """

    def __init__(self, options: MergeExport, root: Path):
        self._options, self._root = options, root
        self._exports: dict[Path, _Export] = {}

    @property
    def wanted(self) -> bool:
        return self._options.export is not None

    @property
    def only(self) -> bool:
        """No checkpoint is published."""
        return self._options.export_only

    def __enter__(self) -> MergedExports:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._exports.values():
            one.target.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raise ``MergeError`` once a lock was seen to be another's. Does not wait."""
        for one in tuple(self._exports.values()):
            one.target.check()

    def check_options(self, merges: MergeSet, execution: ExecutionOptions) -> None:
        """Raise ``UsageError`` for what does not go together, and for exports into the run."""
        if not self.wanted:
            return
        if self.only and execution.node_local:
            raise UsageError(
                "--export-only does not work with --node-local: leave it out, and remove the "
                "merges once they are exported"
            )
        root = self._options.root(self._root)
        for one in merges.merges:
            folder = root / one.save.relative_to(self._root)
            check_export(merges, folder, f"--export-save {root}: {folder}")

    def plan(self, job: Job) -> Job:
        """Plan every export, before anything is done; the job, as far as it is needed then.

        Raises:
            UsageError: as :func:`.plan_of`; or something else is where an export would be.
        """
        if not self.wanted:
            return job
        planned: dict[int, tuple[ExportPlan, dict[str, Spread]]] = {}
        for output in job.outputs:
            config = self._options.of(output.path, self._root)
            if output.newest not in planned:  # what it holds depends on nothing else
                plan = plan_of(merged_model(job, output), config)
                planned[output.newest] = plan, spreads_of(plan.shards)
            plan, spreads = planned[output.newest]
            facts: dict[str, Any] = {
                "source": None if self.only else str(output.path.resolve()),
                "iteration": output.iteration,
                "merge": output.provenance,
            }
            plan = replace(plan, record=plan.record | facts)
            one = _Export(config, plan, spreads, Target(config.save))
            one.target.holds(one.plan.record)
            self._exports[output.path] = one
        if not self.only:
            return job
        return job.of_weights({key for one in self._exports.values() for key in one.spreads})

    def planned(self) -> list[tuple[Path, ExportPlan]]:
        """Where exports go, and what they hold; in the order of the merges."""
        return [(one.config.save, one.plan) for one in self._exports.values()]

    def take(self, job: Job, missing: Sequence[int], check: Callable[[], None]) -> list[int]:
        """Begin the exports of merges that are made now, in folders that are not published.

        Args:
            missing: outputs that are not there, by number; where no checkpoint is wanted, all.
            check: called while this waits for another that makes the same.

        Returns:
            outputs that there is something to do for.

        Raises:
            UsageError: something else is there. MergeError: there is no space, or no permission.
        """
        outputs = {k: job.outputs[k] for k in missing if job.outputs[k].path in self._exports}
        self._check_space(job, outputs)
        # In one order, whatever the job's, and after all merges: no two jobs wait for each other.
        for output in sorted(outputs.values(), key=lambda output: str(output.path.resolve())):
            one = self._exports[output.path]
            one.directory = one.target.begin(one.plan.record, one.plan.nbytes, check)
            if one.directory is not None:
                one.create_files()
        return [k for k in missing if not self.only or self._making(job.outputs[k]) is not None]

    def _check_space(self, job: Job, outputs: dict[int, OutputCheckpoint]) -> None:
        """Exports and the merges that they are of, together."""
        stored, needed = job.stored_bytes(), dict[Path, int]()
        for k, output in outputs.items():
            one = self._exports[output.path]
            if not one.target.holds(one.plan.record):
                needed[one.config.save] = one.plan.nbytes
            if not self.only:
                needed[output.path] = stored[k]
        check_space(needed, {path: sum(map(allocated, leftovers(path))) for path in needed})

    def _making(self, output: OutputCheckpoint) -> _Export | None:
        one = self._exports.get(output.path)
        return None if one is None or one.directory is None else one

    def destination(
        self,
        output: OutputCheckpoint,
        checkpoint: CheckpointDirectory | None,
        written: Sequence[Task],
    ) -> Destination:
        """Where a rank puts an output.

        Args:
            checkpoint: None where none is wanted.
            written: tasks whose chunks the rank stores.
        """
        one = self._making(output)
        if one is None:
            assert checkpoint is not None
            return checkpoint
        assert one.directory is not None
        keys = dict.fromkeys(made.key for task in written for made in task.recipe.outputs)
        spreads = {key: one.spreads[key] for key in keys if key in one.spreads}
        export = ExportDirectory(one.directory, one.sizes, spreads)
        return export if checkpoint is None else WithExport(checkpoint, export)

    def add(self, output: OutputCheckpoint, shared: Files) -> None:
        """Take in what a rank has written of an output's export."""
        if (one := self._making(output)) is not None:
            one.add(shared)

    def to_turn(self, rank: int, ranks: int) -> Turned:
        """A rank's files with places that are still to be turned."""
        found = [
            (one.directory / name, (one.sizes[name], places))
            for one in self._exports.values()
            if one.directory is not None
            for name, places in turned_places(one.spreads.values()).items()
        ]
        return dict(sorted(found, key=lambda pair: pair[0])[rank::ranks])

    def add_turned(self, written: dict[Path, Files]) -> None:
        """Take in what a rank has turned."""
        for one in self._exports.values():
            if one.directory in written:
                one.add(written[one.directory])

    def complete(
        self, output: OutputCheckpoint, metadata_crc: int | None, check: Callable[[], None]
    ) -> None:
        """Check what all ranks have written, and write what lies beside it.

        Args:
            metadata_crc: of the checkpoint's ``.metadata``.
        """
        one = self._making(output)
        if one is None:
            return
        assert one.directory is not None
        whole = {name: nbytes for name, (nbytes, _) in one.files.items()}
        assert whole == one.sizes, f"{one.config.save}: {whole} of {one.sizes}"
        wait_for_files(one.directory, one.sizes, check)
        one.files |= write_rest(one.plan, one.directory)
        if metadata_crc is not None:
            one.plan.record[METADATA_CRC] = f"{metadata_crc:08x}"

    def commit(self, output: OutputCheckpoint) -> Path | None:
        """Publish an output's export, where there is one."""
        one = self._making(output)
        if one is None:
            return None
        one.target.commit(one.plan.record, one.files)
        one.published = True
        logger.info("published %s", one.config.save)
        return one.config.save

    def reports(self, seconds: float) -> dict[Path, ExportReport | ExportConfig]:
        """By merge: what was exported, or was there; of a merge that was there without an export,
        what is still to be done."""
        return {path: self._report(one, seconds) for path, one in self._exports.items()}

    def _report(self, one: _Export, seconds: float) -> ExportReport | ExportConfig:
        if not one.published and not self.only:
            return one.config
        facts, took = facts_of(one.plan), seconds if one.published else 0.0
        return ExportReport(one.config.save, **facts, seconds=took, already=not one.published)
