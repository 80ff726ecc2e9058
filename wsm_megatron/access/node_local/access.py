"""Ranks see different files, as on node-local storage: each reads what it sees.

What a rank reads is checked where it was read: no other may see it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wsm_megatron.access.node_local.assignment import TaskAssignment
from wsm_megatron.access.node_local.pipeline import Digests, run_pipeline
from wsm_megatron.access.node_local.planning import prepare_node_local
from wsm_megatron.access.node_local.schedule import bytes_sent
from wsm_megatron.access.node_local.shares import Assignment, rank_plans_of
from wsm_megatron.access.node_local.transport import Transport, open_transport
from wsm_megatron.access.protocol import Distribution, Estimate
from wsm_megatron.access.source_check import check_source
from wsm_megatron.checkpoint.reader import Ledger
from wsm_megatron.comm.communicator import Ranks
from wsm_megatron.comm.launcher import local_rank
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.errors import UsageError
from wsm_megatron.execution.device import choose_device
from wsm_megatron.execution.rank import ProgressFactory, RankResult, RankWork, run_rank
from wsm_megatron.execution.targets import Destination
from wsm_megatron.execution.timing import Phases
from wsm_megatron.execution.value_checks import wrong_main
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.merge_set import MergeSet
from wsm_megatron.planning.output_paths import check_outputs
from wsm_megatron.storage.change_watch import ChangeWatch
from wsm_megatron.storage.visibility import wait_for_directory, wait_for_files


class NodeLocal:
    """:class:`.Access` of ranks that see different files."""

    def __init__(self, merges: MergeSet, execution: ExecutionOptions, ranks: Ranks):
        self._merges, self._execution, self._ranks = merges, execution, ranks
        self._assignment = Assignment((), (), (), ())
        self._transport: Transport | None = None
        self._digests = Digests()

    def check_options(self) -> None:
        with self._ranks.together("checking the options"):
            if self._merges.shared.load is None:
                raise UsageError("--node-local finds sources in a run directory: give --load")
            check_outputs(self._merges, self._execution)

    def prepare(self) -> Job:
        job, self._assignment = prepare_node_local(self._merges, self._execution, self._ranks)
        return job

    def only(self, job: Job, outputs: Sequence[int]) -> Job:
        newest = {job.outputs[k].newest for k in outputs}
        self._assignment = self._assignment.only(job.used_by(outputs), newest)
        return job.only(outputs)

    def estimate(self, job: Job) -> Estimate:
        sent = bytes_sent(self._assignment.held, job.merges)
        return Estimate(job.bytes_to_read(), job.bytes_to_write(), sent)

    def distribute(self, job: Job) -> Distribution:
        rank_plans = rank_plans_of(job, self._assignment)
        return Distribution(job, rank_plans[self._ranks.rank], rank_plans)

    @contextmanager
    def watching(self, job: Job) -> Iterator[None]:
        with (
            ChangeWatch({s.path: s.fingerprint for s in job.sources if s.fingerprint}) as watch,
            self._ranks.watching(watch.check),
        ):
            yield

    def run(
        self,
        work: Distribution,
        destinations: Sequence[Destination],
        progress: ProgressFactory | None,
        phases: Phases,
    ) -> RankResult:
        ranks, assignment = self._ranks, self._assignment
        check_shared(destinations[0].directory, ranks)

        def pipeline(own: RankWork) -> None:
            steps, checks = assignment.steps(ranks.rank), assignment.checks(ranks.rank)
            self._digests = run_pipeline(own, assignment.held, steps, checks, self._transport)

        with ranks.together("merging"):
            self._transport = _connect(self._execution, assignment.held, ranks)
            return run_rank(
                work.job, ranks, work.rank_plan, destinations, progress, phases, before=pipeline
            )

    def verify(self, job: Job, result: RankResult) -> None:
        of_ranks = self._ranks.all_gather((result.ledgers, self._digests))
        with self._ranks.together("checking the sources"):
            for j, source in enumerate(job.sources):
                ledgers = [by_source[j] for by_source, _ in of_ranks]
                check_source(source, [_own_records(ledgers, self._ranks.rank)])
            _compare(job, self._assignment.held, [digests for _, digests in of_ranks])

    def abandon(self) -> None:
        if self._transport is not None:
            self._transport.abandon()


def check_shared(directory: Path, ranks: Ranks) -> None:
    """All ranks see the directory that rank 0 has made. Collective.

    Raises:
        StorageError: one does not.
    """
    name = ranks.broadcast(lambda: _probe(directory), "preparing the target")
    with ranks.together("preparing the target"):
        wait_for_directory(directory, ranks.check)
        wait_for_files(directory, {name: 0}, ranks.check)
    if ranks.rank == 0:
        (directory / name).unlink()


def _probe(directory: Path) -> str:
    probe = directory / f"seen-{uuid.uuid4().hex}"
    probe.touch()
    return probe.name


def _connect(
    execution: ExecutionOptions, held: Sequence[TaskAssignment], ranks: Ranks
) -> Transport | None:
    """Connect the ranks where sums go from one to another. Collective.

    The connections stay until all ranks are done: closing one breaks the others'.
    """
    if not any(one.travels for one in held):
        return None
    if execution.device != "cuda":  # a GPU that only some ranks have or take connects no others
        return open_transport(ranks)
    device = choose_device("cuda", 0, 0, 0, 0, local_rank())
    return open_transport(ranks, device.torch_device)


def _own_records(ledgers: Sequence[Ledger], rank: int) -> Ledger:
    """Records of which this rank is the first that has read any, with the parts
    that all ranks read."""
    own: Ledger = {}
    for location in ledgers[rank]:
        if not any(location in ledger for ledger in ledgers[:rank]):
            own[location] = [one for ledger in ledgers for one in ledger.get(location, ())]
    return own


def _compare(job: Job, held: Sequence[TaskAssignment], digests: Sequence[Digests]) -> None:
    """Raise ``MergeError`` where main params are of other weights than their model."""
    models = {place: crc for one in digests for place, crc in one.models.items()}
    for one in digests:
        for (number, j), crc in one.mains.items():
            if models[number, j] != crc:
                raise wrong_main(held[number].task, job.sources[j].layout)
