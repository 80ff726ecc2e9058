"""What ranks are given of a job: enough for their tasks, and no more."""

from __future__ import annotations

import pickle

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.scatter import JobSlices, outline
from wsm_megatron.planning.tasks import Rule


@pytest.fixture(params=[(runs.FULLY, "last"), (runs.FLAT, "merge"), (runs.MOE, "drop")])
def job(request, tmp_path) -> Job:
    run, state = request.param
    config = MergeConfig(
        load=RUNS / run,
        save=tmp_path,
        optimizer_state=state,
        decay="mean,ema",
        last=2,
        sliding_every=4,
    )
    return prepare_job(config)


@pytest.mark.parametrize("ranks", [2, 5])
def test_every_task_finds_its_chunks(job, ranks):
    parts = job.rank_plans(ranks)
    slices = JobSlices(job, parts)
    newest = {output.source_indices[-1] for output in job.outputs}
    assert slices.of(0) == (job, parts[0])
    for rank in range(1, ranks):
        own, part = slices.of(rank)
        assert part == parts[rank] and own.plan.tasks == tuple(part.tasks)
        assert own.outputs == job.outputs
        used = set()
        for j, source in enumerate(own.sources):
            reader = CheckpointReader(source.layout)
            whole = CheckpointReader(job.sources[j].layout)
            for task in part.tasks:
                if task.recipe.rule is Rule.COPY and j not in newest:
                    continue
                for key in task.recipe.inputs:
                    region = task.part(key, task.region)
                    found = reader.region_reader(
                        key, region
                    )._pieces  # raises where a chunk is missing
                    used |= {(j, key, piece.chunk) for piece in found}
                    assert [p.chunk for p in found] == [
                        p.chunk for p in whole.region_reader(key, region)._pieces
                    ]
            reader.close()
            whole.close()
        given = {
            (j, key, chunk)
            for j, source in enumerate(own.sources)
            for key, entry in source.layout.tensors.items()
            for chunk in entry.chunks
        }
        assert given == used


def test_an_outline_is_small(job):
    small = outline(job)
    assert not any(source.layout.tensors or source.layout.objects for source in small.sources)
    assert small.plan.tasks == () and small.outputs == job.outputs
    assert [s.fingerprint for s in small.sources] == [s.fingerprint for s in job.sources]
    assert b"Chunk" in pickle.dumps(job)
    assert b"Chunk" not in pickle.dumps(small) and b"Task" not in pickle.dumps(small)
