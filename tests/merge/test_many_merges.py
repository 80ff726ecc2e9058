"""Several merges from one read of the sources."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import pytest

from tests import runs
from tests.merge.test_continued import stop_merge
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import ExecutionOptions, MergeConfig, merge, verify
from wsm_megatron.checkpoint.layout import COMMON_KEY, read_layout
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.storage import files
from wsm_megatron.storage.files import SourceFiles


def config(tmp_path, run=runs.FULLY, **options):
    return MergeConfig(load=RUNS / run, save=tmp_path / "out", **options)


def assert_each_equals_its_own_merge(report, tmp_path, run=runs.FULLY, **options):
    """Every output has the bits of a merge made alone."""
    for k, one in enumerate(report.merged):
        save = tmp_path / "alone" / str(k)
        weights = {"weights": one.coefficients, "iterations": one.iterations}
        alone = merge(MergeConfig(load=RUNS / run, save=save, **weights, **options))
        merged, expected = load_tensors(one.output), load_tensors(alone.output)
        assert set(merged) == set(expected)
        for key, tensor in expected.items():
            assert same_bits(merged[key], tensor), (one.output, key)
        verify(one.output, sources=True)


@pytest.mark.parametrize("optimizer_state", ["drop", "last"])
def test_decays_times_windows(tmp_path, optimizer_state):
    options = {"optimizer_state": optimizer_state}
    report = merge(config(tmp_path, decay="mean,1-sqrt", window_iterations=(2, 4, 6), **options))
    roots = [str(one.output.parent.relative_to(tmp_path / "out")) for one in report.merged]
    assert roots == [
        f"{decay}-{window}-iterations" for window in (2, 4, 6) for decay in ("mean", "1-sqrt")
    ]
    assert [one.iterations for one in report.merged[::2]] == [(6, 8), (4, 6, 8), (2, 4, 6, 8)]
    for one in report.merged:
        assert one.output.name == "iter_0000008"
        assert (one.output.parent / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert_each_equals_its_own_merge(report, tmp_path, **options)


def test_sliding_windows(tmp_path):
    report = merge(config(tmp_path, decay="ema", last=2, sliding_every=2))
    assert [one.iterations for one in report.merged] == [(2, 4), (4, 6), (6, 8)]
    names = sorted(path.name for path in (tmp_path / "out").glob("iter_*"))
    assert names == ["iter_0000004", "iter_0000006", "iter_0000008"]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert_each_equals_its_own_merge(report, tmp_path)


class Watched:
    """A merge, the bytes that its ranks read of every file, and what its progress said.

    Attributes:
        total: bytes that progress was to count. moved: those that it did.
    """

    def __init__(self, wanted, execution, make=merge):
        self._reads, self._moves = [], []
        self.report = make(wanted, execution, self._progress)
        self.moved = sum(self._moves)

    @contextmanager
    def _progress(self, rank, total):
        """Planning and publishing, which read some metadata and samples, are not inside."""
        self.total, read, log = total, SourceFiles.read, self._reads

        def logged(opened, name, position, out, what):
            log.append((opened.path, name, position, position + len(out)))
            read(opened, name, position, out, what)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_reads", None)  # one by one
            patch.setattr(SourceFiles, "read", logged)
            yield self._moves.append

    def read_once(self):
        """All bytes that were read; none of them was twice."""
        for (*file, _, end), (*next_file, begin, _) in pairwise(sorted(self._reads)):
            assert file != next_file or end <= begin, (file, begin)
        return sum(end - begin for *_, begin, end in self._reads)


def counted(report, copied):
    """Bytes to read and to write, from the layouts of the sources and of the merges alone.

    Entries whose key holds a word of ``copied``, and all objects, are read of newest sources only.
    """
    source_indices = {i for one in report.merged for i in one.iterations}
    newest = {one.iterations[-1] for one in report.merged}
    read, written = Counter(), 0
    for one in report.merged:
        layout = read_layout(one.output)
        for key, entry in layout.entries.items():
            written += entry.nbytes
            if key == COMMON_KEY:
                continue
            is_copied = key in layout.objects or any(word in key for word in copied)
            for iteration in newest if is_copied else source_indices:
                read[key, iteration] = entry.nbytes
    return sum(read.values()), written


MOMENTS = ("exp_avg", "exp_avg_sq")
SLIDING = {"decay": "mean,1-sqrt", "window_iterations": (2, 4), "sliding_every": 2}
MANY = [
    (runs.FULLY, {**SLIDING, "optimizer_state": "last"}, MOMENTS),
    (runs.FLAT, {**SLIDING, "optimizer_state": "last"}, MOMENTS),
    (runs.MAIN, {**SLIDING, "optimizer_state": "last"}, MOMENTS),
    (runs.MOE, {**SLIDING, "buffers": "last"}, ("expert_bias", "local_tokens_per_expert")),
    (runs.FULLY, {"decay": "mean,ema,cosine", "optimizer_state": "last"}, MOMENTS),
    (runs.FULLY, {"decay": "mean,ema", "last": 2, "sliding_every": 2}, ()),
    (runs.FP32_PARAM, {**SLIDING, "optimizer_state": "merge"}, ()),
]


@pytest.mark.parametrize(
    "run, options, copied, node_local", [(*one, False) for one in MANY] + [(*MANY[0], True)]
)
def test_every_source_byte_is_read_once(tmp_path, run, options, copied, node_local):
    """Planned, read, shown and reported: one number, which the layouts alone give too."""
    wanted = config(tmp_path, run, **options)
    planned = prepare_job(wanted).bytes_to_read()
    done = Watched(wanted, ExecutionOptions(node_local=node_local))
    assert len(done.report.merged) > 2
    read, written = counted(done.report, copied)
    assert done.read_once() == done.report.bytes_read == planned == read
    assert done.moved == done.total == read + written


@pytest.mark.parametrize("parallel", [False, True])
def test_newest_sources_of_other_layouts_are_read_once(tmp_path, parallel):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    runs.rewrite(runs.checkpoint(run, 6), grid=runs.split_axis(0, 3), reverse=True)
    options = {**SLIDING, "optimizer_state": "last"}
    done = Watched(config(tmp_path, run, **options), ExecutionOptions(node_local=parallel))
    read, written = counted(done.report, MOMENTS)
    assert done.read_once() == done.report.bytes_read == read
    assert done.moved == done.total == read + written
    assert_each_equals_its_own_merge(done.report, tmp_path, run, optimizer_state="last")


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("chunks", [3, 50, 110])
def test_a_resumed_merge_reads_once_what_was_left(tmp_path, monkeypatch, chunks, parallel):
    wanted = config(tmp_path, **SLIDING, optimizer_state="last")
    execution = ExecutionOptions(threads=1, node_local=parallel)
    stop_merge(monkeypatch, wanted, chunks, execution)
    done = Watched(wanted, execution)
    read, written = counted(done.report, MOMENTS)
    assert done.read_once() == done.report.bytes_read
    assert done.report.bytes_read < read
    assert done.moved == done.total == read + written
    assert_each_equals_its_own_merge(done.report, tmp_path, optimizer_state="last")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sliding_every": 2}, "needs --last or --window-iterations"),
        ({"sliding_every": 0, "last": 2}, "at least 1"),
        ({"sliding_every": 2, "last": 2, "output_iteration": 5}, "no --output-iteration"),
        ({"decay": "mean,mean"}, "named twice"),
        ({"window_iterations": (2, 2)}, "named twice"),
        ({"window_iterations": (2, 4), "window_tokens": (5,)}, "contradict"),
    ],
)
def test_bad_combinations(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        merge(config(tmp_path, **options))


def test_a_target_that_exists_stops_all_of_them(tmp_path):
    (tmp_path / "out" / "iter_0000006").mkdir(parents=True)
    with pytest.raises(ValueError, match="iter_0000006 exists"):
        merge(config(tmp_path, last=2, sliding_every=2))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["iter_0000006"]


def test_a_node_local_merge_of_one_rank_is_an_ordinary_merge(tmp_path):
    options = {"decay": "mean,ema", "last": 2, "sliding_every": 2, "optimizer_state": "last"}
    report = merge(config(tmp_path, **options), ExecutionOptions(node_local=True))
    assert_each_equals_its_own_merge(report, tmp_path, optimizer_state="last")


@pytest.mark.parametrize("run", [runs.FLAT, runs.MAIN])
def test_a_merge_alone_has_the_bytes_that_it_has_among_others(tmp_path, run):
    """All files: the common state is a pickle, which could tell what was pickled before."""
    options = {"load": RUNS / run, "optimizer_state": "last"}
    alone = merge(MergeConfig(save=tmp_path / "alone", decay="ema", **options)).output
    merge(MergeConfig(save=tmp_path / "all", decay="mean,ema,linear", **options))
    names = sorted(path.name for path in alone.iterdir())
    among = tmp_path / "all" / "ema" / alone.name
    assert sorted(path.name for path in among.iterdir()) == names
    for name in names:
        assert (alone / name).read_bytes() == (among / name).read_bytes(), name
