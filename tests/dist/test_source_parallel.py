"""Merges of checkpoints that only some ranks can see, against the reference and ordinary merges."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.flat_run import bucket_key, write_checkpoint
from tests.mcore import run_ranks
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import ExecutionOptions, MergeConfig, MergeReport, merge
from wsm_megatron.checkpoint.layout import read_layout

WEIGHTS = (0.07, 0.21, 0.31, 0.41)
NODE_LOCAL = ExecutionOptions(node_local=True, threads=2)

Sees = Callable[[int, int, str], bool]
"""Whether a rank sees a file of a checkpoint: rank, iteration, name."""


def spread(run: str | Path, to: Path, ranks: int, sees: Sees) -> list[Path]:
    """A directory for every rank with the files that it sees, as node-local disks would have."""
    roots = [to / f"node{rank}" / "run" for rank in range(ranks)]
    for rank, root in enumerate(roots):
        for iteration in runs.ITERATIONS:
            folder = runs.checkpoint(run, iteration)
            for file in sorted(folder.iterdir()):
                if sees(rank, iteration, file.name):
                    copy = root / folder.name / file.name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
    return roots


def whole_checkpoints(*nodes: int) -> Sees:
    """Every checkpoint whole on one node: ``nodes`` by source."""
    return lambda rank, iteration, name: nodes[runs.ITERATIONS.index(iteration)] == rank


def own_files(rank: int, iteration: int, name: str) -> bool:
    """Files on the node of the rank that wrote them, metadata on the first, as Megatron saves."""
    return rank == (int(name[2]) if name.endswith(".distcp") else 0)


def shuffled(ranks: int, first: int = 0) -> Sees:
    """Every file of every checkpoint on another node; metadata too."""

    def sees(rank: int, iteration: int, name: str) -> bool:
        shift = first + iteration // 2
        if not name.endswith(".distcp"):
            return rank == shift % ranks
        return rank == (2 * int(name[2]) + int(name[4]) + shift) % ranks

    return sees


def by_writer(rank: int, iteration: int, name: str) -> bool:
    """The two files of a Megatron rank on two nodes: some main params apart from their model."""
    return rank == (int(name[4]) if name.endswith(".distcp") else 0)


def ones(roots: list[Path], save: Path, **options: Any) -> list[MergeConfig]:
    """A config for every rank; what is not given is ``WEIGHTS``."""
    options = {"weights": WEIGHTS, **options}
    return [MergeConfig(load=root, save=save, **options) for root in roots]


def merge_all(jobs: list[list[MergeConfig]], folder: Path) -> list[MergeReport | str]:
    """What rank 0 reports of each job, or the messages of all ranks where they raised."""
    results = run_ranks(
        _merge_own, len(jobs[0]), folder, jobs=jobs, cuda_standin=False, timeout=200
    )
    outcomes = list(zip(*results, strict=True))
    for outcome in outcomes:
        assert len({isinstance(one, str) for one in outcome}) == 1, outcome
    return [one[0] if isinstance(one[0], MergeReport) else "\n".join(one) for one in outcomes]


def _merge_own(jobs: list[list[MergeConfig]]) -> list[MergeReport | str]:
    import torch.distributed as dist

    from wsm_megatron.access.node_local import assignment

    assignment.TRAVEL_ELEMENTS = 2000  # several messages a chunk
    outcomes: list[MergeReport | str] = []
    for configs in jobs:
        try:
            outcomes.append(merge(configs[dist.get_rank()], NODE_LOCAL, _counted))
        except (ValueError, RuntimeError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return outcomes


@contextmanager
def _counted(rank: int, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that must come to its end, on every rank."""
    moves: list[int] = []
    yield moves.append
    assert sum(moves) == total, (rank, sum(moves), total)


def ordinary(run: str | Path, save: Path, **options: Any) -> MergeReport:
    load = RUNS / run
    return merge(MergeConfig(load=load, save=save, **{"weights": WEIGHTS, **options}))


def assert_equal(output: Path, expected: Path) -> None:
    """The same tensors, objects and side files, bit for bit; chunks may be cut otherwise."""
    merged, tensors = load_tensors(output), load_tensors(expected)
    assert set(merged) == set(tensors)
    for key, tensor in tensors.items():
        assert same_bits(merged[key], tensor), (output, key)
    assert set(read_layout(output).objects) == set(read_layout(expected).objects)
    beside = [
        {p.name for p in path.iterdir() if p.suffix != ".distcp"} for path in (output, expected)
    ]
    assert beside[0] == beside[1]


def test_weights_equal_the_reference(tmp_path: Path) -> None:
    for ranks, some in {
        2: [whole_checkpoints(0, 0, 1, 1), whole_checkpoints(1, 0, 1, 0), shuffled(2), own_files],
        3: [
            whole_checkpoints(2, 0, 0, 1),
            shuffled(3),
            shuffled(3, first=2),
            whole_checkpoints(2, 1, 0, 2),
        ],
    }.items():
        folders = [tmp_path / f"{ranks}-{k}" for k in range(len(some))]
        jobs = [
            ones(spread(runs.DENSE, folder, ranks, sees), folder / "out")
            for folder, sees in zip(folders, some, strict=True)
        ]
        sources = [load_tensors(runs.checkpoint(runs.DENSE, i)) for i in runs.ITERATIONS]
        for report in merge_all(jobs, tmp_path):
            assert isinstance(report, MergeReport), report
            merged = load_tensors(report.output)
            assert set(merged) == set(sources[0])
            for key, tensor in merged.items():
                total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
                assert same_bits(tensor, rounded(total, tensor.dtype)), (report.output, key)


CASES: list[tuple[str, Sees, dict[str, Any]]] = [
    (runs.FULLY, own_files, {"optimizer_state": "last"}),
    (runs.FULLY, shuffled(2), {"optimizer_state": "merge"}),
    (runs.FULLY, by_writer, {"optimizer_state": "last"}),
    (runs.FP32_PARAM, shuffled(2, first=1), {"optimizer_state": "last"}),
    (runs.FLAT, whole_checkpoints(0, 1, 1, 0), {"optimizer_state": "last"}),
    (runs.FLAT, whole_checkpoints(0, 0, 0, 1), {"optimizer_state": "merge"}),
    (runs.FLAT, shuffled(2), {}),
    (runs.MOE, shuffled(2), {"buffers": "last"}),
    (runs.MAIN, whole_checkpoints(1, 0, 1, 0), {"optimizer_state": "last"}),
    (runs.MAIN, own_files, {}),
    (runs.WRONG_MAINS, shuffled(2), {"optimizer_state": "last", "rebuild_main_params": True}),
    (runs.FULLY, whole_checkpoints(0, 1, 1, 0), {"optimizer_state": "merge", "copy": ("*mlp*",)}),
    (runs.FLAT, whole_checkpoints(0, 1, 0, 1), {"optimizer_state": "merge", "copy": ("*mlp*",)}),
    (
        runs.FULLY,
        own_files,
        {"optimizer_state": "last", "rebuild_main_params": True, "copy": ("*mlp*",)},
    ),
]


def test_every_layout_and_optimizer_state(tmp_path: Path) -> None:
    folders = [tmp_path / str(k) for k in range(len(CASES))]
    jobs = [
        ones(spread(run, folder, 2, sees), folder / "out", **options)
        for (run, sees, options), folder in zip(CASES, folders, strict=True)
    ]
    for (run, _, options), report, folder in zip(
        CASES, merge_all(jobs, tmp_path), folders, strict=True
    ):
        assert isinstance(report, MergeReport), report
        alone = ordinary(run, folder / "alone", **options)
        assert_equal(report.output, alone.output)
        for name in ("bytes_read", "coefficients", "resume"):
            assert getattr(report, name) == getattr(alone, name), (run, name)


def test_equal_weights_are_told_apart_by_what_other_ranks_see(tmp_path: Path) -> None:
    """Norms in flat buckets that are all ones in the newest source only, seen by rank 0."""
    run = tmp_path / "run"
    for j in range(4):
        spread_of = 2e-4 if j == 3 else 0.02  # less than bf16 resolves
        norms = [1 + spread_of * torch.linspace(-1, 1, 96).roll(7 * k + j) for k in range(3)]
        model = {f"norm{2 - k}": norm.bfloat16() for k, norm in enumerate(norms)}
        write_checkpoint(run, 2 * j + 2, model, {bucket_key(): norms})
    folder = tmp_path / "spread"
    roots = spread(run, folder, 2, whole_checkpoints(0, 1, 1, 0))
    job = ones(roots, folder / "out", optimizer_state="last")
    (report,) = merge_all([job], tmp_path)
    assert isinstance(report, MergeReport), report
    alone = ordinary(run, tmp_path / "alone", optimizer_state="last")
    assert_equal(report.output, alone.output)
    merged = load_tensors(report.output)
    for k in range(3):
        main = merged[bucket_key()][128 * k :][:96]
        assert same_bits(merged[f"norm{2 - k}"], main.bfloat16()), k


def test_many_merges_from_one_read(tmp_path: Path) -> None:
    """Decays, windows and sliding windows: sums of several merges go along each chain."""
    several = [
        {"decay": "mean,1-sqrt,ema", "window_iterations": (2, 4, 6)},
        {"decay": "mean,ema", "last": 2, "sliding_every": 2},
        {"decay": "1-sqrt", "window_tokens": (4 * 8 * 16,), "optimizer_state": "merge"},
    ]
    jobs, alone = [], []
    for k, given in enumerate(several):
        options = {"weights": None, "optimizer_state": "last", **given}
        for n, sees in enumerate((whole_checkpoints(0, 1, 2, 0), shuffled(3))):
            folder = tmp_path / f"{k}-{n}"
            jobs.append(ones(spread(runs.FULLY, folder, 3, sees), folder / "out", **options))
            alone.append((folder / "alone", options))
    for report, (save, options) in zip(merge_all(jobs, tmp_path), alone, strict=True):
        assert isinstance(report, MergeReport), report
        expected = ordinary(runs.FULLY, save, **options)
        assert len(report.merged) == len(expected.merged)
        assert report.bytes_read == expected.bytes_read
        for one, other in zip(report.merged, expected.merged, strict=True):
            assert_equal(one.output, other.output)


def test_sources_of_what_is_published_are_not_read(tmp_path: Path) -> None:
    """Of three windows the newest is there already, and so is what is copied from its end."""
    options = {"weights": None, "decay": "ema", "last": 2, "optimizer_state": "last"}
    for k, sees in enumerate((whole_checkpoints(0, 1, 1, 0), shuffled(2), by_writer)):
        folder = tmp_path / str(k)
        roots = spread(runs.FULLY, folder, 2, sees)
        given = [options, {**options, "sliding_every": 2}]
        _, report = merge_all([ones(roots, folder / "out", **some) for some in given], tmp_path)
        assert isinstance(report, MergeReport), report
        _, expected = [ordinary(runs.FULLY, folder / "alone", **some) for some in given]
        assert report.bytes_read == expected.bytes_read
        for one, other in zip(report.merged, expected.merged, strict=True):
            assert_equal(one.output, other.output)


def test_sources_of_other_layouts_are_cut(tmp_path: Path) -> None:
    """A task of the newest source needs chunks that no rank has all of."""
    run = runs.copy_run(runs.FP32_PARAM, tmp_path / "run")
    runs.rewrite(runs.checkpoint(run, 8), grid=runs.split_axis(0, 1))
    runs.rewrite(runs.checkpoint(run, 4), grid=runs.split_axis(1, 3))
    for state in ("merge", "drop"):
        folder = tmp_path / state
        roots = spread(run, folder, 2, own_files)
        (report,) = merge_all([ones(roots, folder / "out", optimizer_state=state)], tmp_path)
        assert isinstance(report, MergeReport), report
        alone = ordinary(run, folder / "alone", optimizer_state=state)
        assert_equal(report.output, alone.output)
        key = "decoder.layers.mlp.linear_fc1.weight"
        cut = len(read_layout(report.output).tensors[key].chunks)
        assert cut > len(read_layout(alone.output).tensors[key].chunks)


def test_side_files_and_provenance(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for iteration in runs.ITERATIONS:
        (runs.checkpoint(run, iteration) / "note.txt").write_text(str(iteration))
    roots = spread(run, tmp_path, 2, whole_checkpoints(0, 0, 1, 1))
    side = runs.checkpoint(roots[1], 8) / "tokenizer"
    side.mkdir()
    (side / "vocab.json").write_text("vocab")
    (report,) = merge_all([ones(roots, tmp_path / "out")], tmp_path)
    assert isinstance(report, MergeReport), report
    assert (report.output / "note.txt").read_text() == "8"
    assert (report.output / "tokenizer" / "vocab.json").read_text() == "vocab"
    alone = ordinary(run, tmp_path / "alone")
    described = [
        json.loads((path / "wsm_merge.json").read_text()) for path in (report.output, alone.output)
    ]
    for one in described:
        del one["files"], one["crc32"]
        for source in one["sources"]:
            del source["path"]
    assert described[0] == described[1]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["iter_0000008", "latest_checkpointed_iteration.txt"]


def refused(tmp_path: Path, name: str, roots: list[Path], **options: Any) -> list[MergeConfig]:
    return ones(roots, tmp_path / name / "out", **options)


def test_bad_sources_are_refused_by_all_ranks(tmp_path: Path) -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    places = {name: tmp_path / name for name in ("nan", "flipped", "mains", "metadata", "file",
              "stale", "short", "flat", "empty",
              "apart", "overflow", "integers")}  # fmt: skip
    half = whole_checkpoints(0, 1, 1, 0)

    with_nan = runs.copy_run(runs.DENSE, tmp_path / "with-nan")
    runs.rewrite(runs.checkpoint(with_nan, 4), change=lambda k, t: _with_nan(t) if k == key else t)
    nan = spread(with_nan, places["nan"], 2, half)

    flipped = spread(runs.DENSE, places["flipped"], 2, half)
    chunk = read_layout(runs.checkpoint(runs.DENSE, 6)).tensors[key].chunks[0]
    place = chunk.location.offset + chunk.location.length // 2
    runs.flip_byte(runs.checkpoint(flipped[1], 6) / chunk.location.file, place)

    mains = spread(runs.WRONG_MAINS, places["mains"], 2, shuffled(2))

    metadata = spread(runs.DENSE, places["metadata"], 2, own_files)
    (runs.checkpoint(metadata[0], 4) / ".metadata").unlink()

    file = spread(runs.DENSE, places["file"], 2, shuffled(2))
    for root in file:
        (runs.checkpoint(root, 6) / "__1_0.distcp").unlink(missing_ok=True)

    stale = spread(runs.DENSE, places["stale"], 2, own_files)
    old = runs.checkpoint(runs.DENSE, 4) / "__1_0.distcp"
    shutil.copyfile(old, runs.checkpoint(stale[0], 6) / "__1_0.distcp")

    short = spread(runs.DENSE, places["short"], 2, own_files)
    with (runs.checkpoint(short[1], 2) / "__1_1.distcp").open("r+b") as stream:
        stream.truncate(100)

    apart = spread(runs.FULLY, places["apart"], 2, by_writer)
    for name in ("__0_1.distcp", "__1_1.distcp"):  # of another iteration: each sound in itself
        old = runs.checkpoint(runs.FULLY, 2) / name
        shutil.copyfile(old, runs.checkpoint(apart[1], 4) / name)

    large = runs.copy_run(runs.FP32_PARAM, tmp_path / "large")
    for i in runs.ITERATIONS:  # finite in float32 and in bfloat16
        runs.rewrite(
            runs.checkpoint(large, i), change=lambda k, t: t + 1e5 if k.endswith(key) else t
        )
    overflow = spread(large, places["overflow"], 2, half)

    embedding = "embedding.word_embeddings.weight"
    quantised = runs.copy_run(runs.DENSE, tmp_path / "quantised")
    for i in runs.ITERATIONS:
        runs.rewrite(
            runs.checkpoint(quantised, i),
            change=lambda k, t: (t * 64).to(torch.int8) if k == embedding else t,
            rename=lambda k: f"{embedding}_scale" if k == "output_layer.weight" else k,
        )
    integers = spread(quantised, places["integers"], 2, half)

    flat = spread(runs.FLAT, places["flat"], 2, own_files)
    empty = [tmp_path / "nothing", tmp_path / "nowhere"]

    with_optimizer = {"optimizer_state": "last"}
    rebuilt = {**with_optimizer, "rebuild_main_params": True}
    jobs = {
        "holds NaN or Inf": refused(tmp_path, "nan", nan),
        "CRC-32 of .* does not match": refused(tmp_path, "flipped", flipped),
        "does not belong to the model tensor": refused(tmp_path, "mains", mains, **with_optimizer),
        "iter_0000004: the main param optimizer.state.param.* does not belong":
            refused(tmp_path, "apart", apart, **with_optimizer),
        f"{key}: the merged values overflow torch.float16":
            refused(tmp_path, "overflow", overflow, dtype="fp16", **rebuilt),
        f"{embedding} is torch.int8 and differs between": refused(tmp_path, "integers", integers),
        "no rank sees .metadata": refused(tmp_path, "metadata", metadata),
        r"no rank sees all files that .* needs \(__1_0.distcp: no rank\)":
            refused(tmp_path, "file", file),
        "__1_0.distcp is another file on rank 1 than on rank 0": refused(tmp_path, "stale", stale),
        "__1_1.distcp of rank 1 is truncated": refused(tmp_path, "short", short),
        "flat buckets .* no rank sees all files": refused(tmp_path, "flat", flat, **with_optimizer),
        "no rank sees an iter_XXXXXXX checkpoint": refused(tmp_path, "empty", empty),
    }  # fmt: skip
    outcomes = merge_all(list(jobs.values()), tmp_path)
    for words, message in zip(jobs, outcomes, strict=True):
        assert isinstance(message, str), words
        for line in message.splitlines():
            assert re.search(words, line), (words, line)
    for name, place in places.items():
        assert list((place / "out").glob("*")) == [], name


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = torch.nan
    return tensor


def test_a_merge_that_died_is_gone_on_with(tmp_path: Path) -> None:
    """What was written is not made again; what another rank's node has changed is."""
    roots = spread(runs.FULLY, tmp_path, 2, whole_checkpoints(0, 1, 0, 1))
    configs = ones(roots, tmp_path / "out", optimizer_state="last")
    results = run_ranks(
        _die_and_go_on, 2, tmp_path, configs=configs, cuda_standin=False, timeout=120
    )
    first, second, third = results[0]
    for one in second.ranks:
        assert {"waiting", "resuming"} <= set(one.phases) and "reducing" not in one.phases
    for one in third.ranks:
        assert {"waiting", "resuming", "reading", "reducing", "writing"} <= set(one.phases)
    alone = ordinary(runs.FULLY, tmp_path / "alone", optimizer_state="last")
    assert second.bytes_read < 0.1 * alone.bytes_read
    assert third.bytes_read == alone.bytes_read
    assert_equal(third.output, alone.output)
    assert "injected" in first


def _die_and_go_on(configs: list[MergeConfig]) -> list[Any]:
    """A merge that fails when all is written, the same again, and again with a changed source."""
    import os

    import torch.distributed as dist

    from wsm_megatron import publication
    from wsm_megatron.errors import PassingError

    config, original = configs[dist.get_rank()], publication.complete
    outcomes: list[Any] = []

    def fail(*_: Any) -> None:
        raise PassingError("injected")

    for change in (False, True):
        publication.complete = fail
        with pytest.raises(PassingError) as caught:
            merge(config, NODE_LOCAL)
        publication.complete = original
        dist.barrier()
        if change and dist.get_rank() == 1:
            os.utime(runs.checkpoint(config.load, 4) / "__0_0.distcp")
        dist.barrier()
        outcomes += [str(caught.value)] * (not change) + [merge(config, NODE_LOCAL)]
        dist.barrier()
        if not change and dist.get_rank() == 0:
            shutil.rmtree(config.save)
        dist.barrier()
    return outcomes
