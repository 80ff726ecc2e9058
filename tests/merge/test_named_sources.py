"""Sources by their paths: of several runs, of a run that went on elsewhere, ``release/``."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import ExecutionOptions, MergeConfig, UsageError, merge, verify
from wsm_megatron.checkpoint.common_state import read_summary
from wsm_megatron.checkpoint.run_directory import TRACKER_FILE
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.planning.provenance import read_provenance


def change(scale: float) -> Any:
    def changed(key: str, tensor: Any) -> Any:
        return (tensor * scale).to(tensor.dtype) if tensor.is_floating_point() else tensor

    return changed


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of one model, with checkpoints of the same iterations."""
    one = runs.copy_run(runs.DENSE, tmp_path / "one")
    other = runs.copy_run(runs.DENSE, tmp_path / "other")
    for iteration in runs.ITERATIONS:
        runs.rewrite(runs.checkpoint(other, iteration), change(1.5))
    return one, other


def merge_sources(tmp_path: Path, *sources: str, **options: Any) -> Any:
    return merge(MergeConfig(source=sources, save=tmp_path / "out", **options))


def assert_is_sum(output: Path, coefficients: list[float], sources: list[Path]) -> None:
    merged, read = load_tensors(output), [load_tensors(path) for path in sources]
    assert merged
    for key, tensor in merged.items():
        if tensor.is_floating_point():
            expected = weighted_sum64(coefficients, [one[key] for one in read])
            assert same_bits(tensor, rounded(expected, tensor.dtype)), key


def test_two_runs_with_weights(tmp_path: Path, two: tuple[Path, Path]) -> None:
    paths = [runs.checkpoint(run, 8) for run in two]
    done = merge_sources(tmp_path, f"{paths[0]}:0.25", f"{paths[1]}:3/4")
    assert (done.iterations, done.coefficients) == ((8, 8), (0.25, 0.75))
    assert_is_sum(done.output, [0.25, 0.75], paths)
    provenance = read_provenance(done.output)
    assert provenance is not None
    assert [one["path"] for one in provenance["sources"]] == list(map(str, paths))
    assert verify(done.output, sources="all").recomputed == "all"


def test_sources_are_put_oldest_first_with_their_weights(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    places = [(two[1], 8), (two[0], 2), (two[1], 4), (two[0], 4)]
    paths = [runs.checkpoint(*place) for place in places]
    named = [f"{path}:{weight}" for path, weight in zip(paths, (4, 1, 2, 3), strict=True)]
    done = merge_sources(tmp_path, *named, normalize=True)
    assert done.iterations == (2, 4, 4, 8)
    assert done.coefficients == (1 / 10, 2 / 10, 3 / 10, 4 / 10)
    assert_is_sum(done.output, [0.1, 0.2, 0.3, 0.4], [paths[j] for j in (1, 2, 3, 0)])


def test_a_run_that_went_on_elsewhere_is_one_run(tmp_path: Path) -> None:
    """The same bits as if it had never moved: positions in tokens, and a decay over them."""
    run = runs.copy_run(runs.FULLY, tmp_path / "one")
    later = tmp_path / "later"
    later.mkdir()
    for iteration in (6, 8):
        shutil.move(runs.checkpoint(run, iteration), later)
    (later / TRACKER_FILE).write_text("8")
    options: dict[str, Any] = {"decay": "1-sqrt", "optimizer_state": "last"}
    named = [later, *(runs.checkpoint(r, i) for r, i in ((run, 4), (later, 6), (run, 2)))]
    done = merge_sources(tmp_path, *map(str, named), **options)
    whole = merge(MergeConfig(load=RUNS / runs.FULLY, save=tmp_path / "whole", **options))
    assert done.coefficients == whole.coefficients and done.merged[0].decay.unit == "tokens"
    merged, expected = load_tensors(done.output), load_tensors(whole.output)
    assert merged.keys() == expected.keys()
    assert all(same_bits(merged[key], expected[key]) for key in expected)
    verify(done.output, sources=True)


def test_checkpoints_beside_each_other_have_a_mean_and_no_decay(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    named = [str(runs.checkpoint(run, i)) for i in (4, 8) for run in two]
    done = merge_sources(tmp_path, *named, decay="mean")
    assert done.coefficients == (0.25,) * 4
    assert_is_sum(done.output, [0.25] * 4, list(map(Path, named)))
    with pytest.raises(UsageError, match="has no order for them"):
        merge_sources(tmp_path / "x", *named, decay="ema")


@pytest.mark.parametrize("by_tracker", [False, True])
def test_a_release_is_a_source(tmp_path: Path, by_tracker: bool) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    released = tmp_path / "released"
    shutil.copytree(runs.checkpoint(run, 2), released / "release")
    runs.restate(released / "release", lambda state: state.update(iteration=0))
    (released / TRACKER_FILE).write_text("release")
    named = released if by_tracker else released / "release"
    done = merge_sources(tmp_path, f"{runs.checkpoint(run, 8)}:0.5", f"{named}:0.5")
    assert done.iterations == (0, 8) and done.output.name == "iter_0000008"
    assert_is_sum(done.output, [0.5, 0.5], [released / "release", runs.checkpoint(run, 8)])


def test_a_release_that_is_the_newest_source(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    released = [tmp_path / name / "release" for name in ("a", "b")]
    for path, iteration in zip(released, (4, 8), strict=True):
        shutil.copytree(runs.checkpoint(run, iteration), path)
        runs.restate(path, lambda state: state.update(iteration=0))
    done = merge_sources(tmp_path, *map(str, released), decay="mean")
    assert done.output.name == "iter_0000000" and read_summary(done.output).iteration == 0
    again = MergeConfig(
        source=tuple(map(str, released)), save=tmp_path / "o", decay="mean", output_iteration=7
    )
    assert merge(again).output.name == "iter_0000007"


def test_the_same_again_does_nothing_and_other_weights_are_refused(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    paths = [runs.checkpoint(run, 8) for run in two]
    merge_sources(tmp_path, f"{paths[0]}:0.5", f"{paths[1]}:0.5")
    again = merge_sources(tmp_path, f"{paths[0]}:0.5", f"{paths[1]}:0.5")
    assert again.bytes_written == 0
    with pytest.raises(UsageError, match="is left alone"):
        merge_sources(tmp_path, f"{paths[1]}:0.5", f"{paths[0]}:0.5")


Named = list[str]
BAD: dict[str, tuple[Any, str]] = {
    "weights of some": (lambda p: {"source": [f"{p[0]}:1", p[1]]}, "weigh all or none"),
    "a folder that is none": (lambda p: {"source": [p[0], p[1] + "0"]}, "no such directory"),
    "no checkpoint": (
        lambda p: {"source": [p[0], str(Path(p[0]).parents[1])]},
        "is no checkpoint, and no root",
    ),
    "one twice": (lambda p: {"source": [p[0], p[0] + "/../iter_0000008"]}, "are one checkpoint"),
    "one alone": (lambda p: {"source": [p[0]]}, "at least two"),
    "too few": (lambda p: {"source": p, "min_checkpoints": 3}, "--min-checkpoints 3: only 2"),
    "a run too": (lambda p: {"source": p, "load": "run"}, "--load and --source contradict"),
    "a window": (lambda p: {"source": p, "last": 2}, "--last selects checkpoints of a run"),
    "an interval": (lambda p: {"source": p, "min_interval": 2}, "--min-interval selects"),
    "weights beside": (lambda p: {"source": p, "weights": (1.0, 0.0)}, "each its weight"),
    "a decay and weights": (
        lambda p: {"source": [f"{one}:0.5" for one in p], "decay": "ema"},
        "contradict",
    ),
    "a sum of 2": (lambda p: {"source": [f"{one}:1" for one in p]}, "sum to 2, not 1"),
    "a sum of 0": (
        lambda p: {"source": [f"{p[0]}:1", f"{p[1]}:-1"], "normalize": True},
        "sum to 0, which must be above 0",
    ),
    "nothing to normalize": (lambda p: {"source": p, "normalize": True}, "no effect without"),
    "an address": (lambda p: {"source": ["s3://b/iter_0000008:0.5"]}, "is an address"),
    "into its own run": (
        lambda p: {"source": p, "decay": "mean", "save": Path(p[1]).parent, "output_iteration": 9},
        "sources are never written to",
    ),
    "into a source": (
        lambda p: {"source": p, "decay": "mean", "save": Path(p[1]) / "x"},
        "is inside of the checkpoint",
    ),
    "neither": (lambda p: {}, "give --load RUN, or the sources"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_named(tmp_path: Path, two: tuple[Path, Path], case: str) -> None:
    make, words = BAD[case]
    options = make([str(runs.checkpoint(run, 8)) for run in two])
    with pytest.raises(UsageError, match=words):
        merge(MergeConfig(**{"save": tmp_path / "out", **options}))
    assert not (tmp_path / "out").exists()


def test_a_renamed_source_is_refused(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    shutil.copytree(runs.checkpoint(run, 6), run / "iter_0000007")
    with pytest.raises(UsageError, match="holds the state of iteration 6"):
        merge_sources(tmp_path, str(run / "iter_0000007"), str(run / "iter_0000008"))


def test_a_copy_of_a_source_is_refused(tmp_path: Path, two: tuple[Path, Path]) -> None:
    shutil.copytree(runs.checkpoint(two[0], 8), tmp_path / "copy")
    with pytest.raises(UsageError, match="copies of one save"):
        merge_sources(
            tmp_path, str(runs.checkpoint(two[0], 8)), str(tmp_path / "copy"), decay="mean"
        )


def test_an_unfinished_tracked_checkpoint_is_told(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    (runs.checkpoint(run, 8) / "metadata.json").unlink()
    with pytest.raises(UsageError, match="says 8, and .* is no finished checkpoint"):
        merge_sources(tmp_path, str(run), str(runs.checkpoint(run, 6)))


def test_node_local_ranks_are_given_a_run(tmp_path: Path) -> None:
    paths = tuple(str(runs.checkpoint(runs.DENSE, i)) for i in (6, 8))
    with pytest.raises(UsageError, match="give --load"):
        merge(MergeConfig(source=paths, save=tmp_path / "out"), ExecutionOptions(node_local=True))


def test_the_command_takes_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    paths = [str(runs.checkpoint(runs.DENSE, i)) for i in (4, 8)]
    line = ["--source", f"{paths[0]}:1", "--source", f"{paths[1]}:2", "--save", str(tmp_path / "o")]
    assert main(["plan", *line, "--normalize"]) == 0
    assert "0.666667" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        assert main(["merge", *line, "--normalize"]) == 0
    assert_is_sum(tmp_path / "o/iter_0000008", [1 / 3, 2 / 3], list(map(Path, paths)))
    assert main(["merge", *line]) == EXIT_USAGE
    assert "sum to 3, not 1" in capsys.readouterr().err


def test_a_file_of_options_names_sources(tmp_path: Path) -> None:
    paths = [runs.checkpoint(runs.DENSE, i) for i in (4, 8)]
    lines = [f"save: {tmp_path / 'o'}", "source:", *(f"  - {path}:0.5" for path in paths)]
    (tmp_path / "job.yaml").write_text("\n".join(lines))
    assert main(["merge", "--config", str(tmp_path / "job.yaml")]) == 0
    assert_is_sum(tmp_path / "o/iter_0000008", [0.5, 0.5], paths)
