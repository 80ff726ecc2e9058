"""A sweep: every merge of a grid, of one read, named, listed, evaluated, continued."""

from __future__ import annotations

import json
import random
import shlex
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.merge.test_many_merges import Watched
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import ExecutionOptions, MergeConfig, MergeError, UsageError, coefficients, merge
from wsm_megatron.checkpoint.run_directory import TRACKER_FILE
from wsm_megatron.checkpoint.writer import ChunkWriter
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE, StoppedError
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.schedule.decay import DECAYS
from wsm_megatron.schedule.order import ORDERS
from wsm_megatron.sweeps.evaluate import EvaluationError
from wsm_megatron.sweeps.grid import Sweep, SweepGrid, merge_name
from wsm_megatron.sweeps.manifest import SweepManifest
from wsm_megatron.sweeps.run import SweepOptions, sweep

GRID = SweepGrid(
    window_iterations=(4, 6),
    decay=("mean", "ema"),
    min_decay=(0.0, 0.25),
    order=("sequential", "reversed", "scrambled"),
    order_seed=(0, 5),
)


def base(tmp_path: Path, run: Path | str = runs.DENSE, **options: Any) -> MergeConfig:
    load = RUNS / run if isinstance(run, str) else run
    return MergeConfig(load=load, save=tmp_path / "out", **options)


def read_manifest(tmp_path: Path) -> list[dict[str, Any]]:
    data = json.loads((tmp_path / "out/sweep.json").read_text())
    assert data["format"] == 1
    merges: list[dict[str, Any]] = data["merges"]
    return merges


def expected_coefficients(one: dict[str, Any]) -> list[float]:
    """From the words of the manifest alone; even spacing, so iterations will do."""
    plain = list(coefficients(one["iterations"], one["decay"], one["min_decay"]))
    if one["order"] == "reversed":
        return plain[::-1]
    if one["order"] == "scrambled":
        random.Random(one["order_seed"]).shuffle(plain)
    return plain


def assert_bits(one: dict[str, Any], run: Path) -> None:
    read = [load_tensors(runs.checkpoint(run, i)) for i in one["iterations"]]
    for key, tensor in load_tensors(Path(one["path"])).items():
        if tensor.is_floating_point():
            total = weighted_sum64(one["coefficients"], [source[key] for source in read])
            assert same_bits(tensor, rounded(total, tensor.dtype)), (one["name"], key)


def test_every_merge_of_a_grid_is_listed_and_has_its_bits(tmp_path: Path) -> None:
    done = sweep(Sweep(base(tmp_path), GRID))
    merges = read_manifest(tmp_path)
    assert done is not None and len(merges) == 2 * 2 * 2 * 4 == len(done.merges)
    seen = {
        (m["window"]["window_iterations"], m["decay"], m["min_decay"], m["order"], m["order_seed"])
        for m in merges
    }
    orders = [("sequential", None), ("reversed", None), ("scrambled", 0), ("scrambled", 5)]
    assert seen == {
        (window, decay, floor, *order)
        for window, decay, floor, order in product((4, 6), ("mean", "ema"), (0.0, 0.25), orders)
    }
    assert len({m["path"] for m in merges}) == len(merges)
    for one in merges:
        assert one["exists"] and one["scores"] is None and Path(one["path"]).is_dir()
        assert (
            one["iterations"] == {4: [4, 6, 8], 6: [2, 4, 6, 8]}[one["window"]["window_iterations"]]
        )
        assert one["window"]["to"] == one["iteration"] == 8
        assert one["coefficients"] == pytest.approx(expected_coefficients(one), abs=1e-15)
        assert_bits(one, RUNS / runs.DENSE)
        assert (Path(one["root"]) / TRACKER_FILE).read_text() == "8"
    names = {m["name"] for m in merges}
    assert "ema-floor0.25-reversed-4-iterations/iter_0000008" in names
    assert "mean-scrambled5-6-iterations/iter_0000008" in names


def test_a_sweep_is_one_read_of_the_sources(tmp_path: Path) -> None:
    wanted = Sweep(base(tmp_path, runs.FULLY), replace(GRID, to=(6, 8))).merge_set()
    planned = prepare_job(wanted)
    one = prepare_job(base(tmp_path, runs.FULLY))
    assert len(planned.outputs) == 64
    assert planned.bytes_to_read() < one.bytes_to_read() * 1.1, "objects of both ends"

    def make(wanted: Sweep, execution: ExecutionOptions, progress: Any) -> Any:
        return sweep(wanted, execution, progress=progress)

    done = Watched(Sweep(base(tmp_path, runs.FULLY), GRID), ExecutionOptions(), make)
    assert done.read_once() == done.report.bytes_read == one.bytes_to_read()
    assert done.moved == done.total


@given(
    windows=st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True),
    decays=st.lists(st.sampled_from(DECAYS), min_size=1, max_size=6, unique=True),
    floors=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.25, 1.0]), min_size=1, unique=True),
    orders=st.lists(st.sampled_from(ORDERS), min_size=1, max_size=3, unique=True),
    ends=st.lists(st.integers(1, 10**6), min_size=1, max_size=3, unique=True),
)
def test_names_tell_the_merges_of_any_grid_apart(
    windows: list[int], decays: list[str], floors: list[float], orders: list[str], ends: list[int]
) -> None:
    grid = SweepGrid(
        window_iterations=windows, decay=decays, min_decay=floors, order=orders, to=ends
    )
    merges = Sweep(MergeConfig(load="run", save="out"), grid).merge_set().merges
    assert len(merges) == len(windows) * len(decays) * len(floors) * len(orders) * len(ends)
    assert len({(one.save, one.to) for one in merges}) == len(merges)
    assert all(one.save == Path("out") / merge_name(one) for one in merges)


def test_windows_of_several_kinds_stand_beside_each_other(tmp_path: Path) -> None:
    sweep(Sweep(base(tmp_path), SweepGrid(last=(2, 3), window_tokens=(512,))))
    merges = {m["name"].split("/")[0]: m for m in read_manifest(tmp_path)}
    assert {name: m["iterations"] for name, m in merges.items()} == {
        "linear-last2": [6, 8], "linear-last3": [4, 6, 8], "linear-512-tokens": [4, 6, 8],
    }  # fmt: skip
    assert merges["linear-512-tokens"]["window"] == {"window_tokens": 512, "to": 8}


def test_end_points_share_a_folder(tmp_path: Path) -> None:
    sweep(Sweep(base(tmp_path), SweepGrid(last=(2,), to=(8, 4, 6), decay=("ema",))))
    assert [m["name"] for m in read_manifest(tmp_path)] == [
        f"ema-last2/iter_000000{end}" for end in (4, 6, 8)
    ]
    assert (tmp_path / "out/ema-last2" / TRACKER_FILE).read_text() == "8"


def test_the_same_sweep_again_reads_nothing_and_a_larger_one_makes_the_rest(
    tmp_path: Path,
) -> None:
    small = Sweep(base(tmp_path), SweepGrid(decay=("ema",), last=(2, 3)))
    sweep(small)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/iter_*")}
    again = sweep(small)
    assert again is not None and again.bytes_read == 0
    sweep(replace(small, grid=replace(small.grid, decay=("mean",))))
    names = [m["name"].split("/")[0] for m in read_manifest(tmp_path)]
    assert names == ["ema-last2", "ema-last3", "mean-last2", "mean-last3"]
    assert all(p.stat().st_mtime_ns == before for p, before in times.items())


@pytest.mark.parametrize("chunks", [5, 40])
def test_a_sweep_that_was_stopped_goes_on_from_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    wanted, execution = Sweep(base(tmp_path), FOUR), ExecutionOptions(threads=1)
    finish, done = ChunkWriter.finish, 0

    def finish_some(writer: ChunkWriter) -> None:
        nonlocal done
        if done == chunks:
            raise StoppedError("stopped", 15)
        done += 1
        finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "finish", finish_some)
        with pytest.raises(StoppedError):
            sweep(wanted, execution)
    assert there(tmp_path) == [] and not (tmp_path / "out/sweep.json").exists()
    again = sweep(wanted, execution)
    whole = sweep(replace(wanted, base=replace(wanted.base, save=tmp_path / "whole")), execution)
    assert again is not None and whole is not None
    assert again.bytes_written < whole.bytes_written
    assert len(there(tmp_path)) == 4
    for one in read_manifest(tmp_path):
        assert_bits(one, RUNS / runs.DENSE)


def test_ranks_that_see_different_files_sweep_too(tmp_path: Path) -> None:
    sweep(Sweep(base(tmp_path), FOUR), ExecutionOptions(node_local=True))
    assert len(there(tmp_path)) == 4
    for one in read_manifest(tmp_path):
        assert_bits(one, RUNS / runs.DENSE)


def test_merges_of_named_sources_are_swept(tmp_path: Path) -> None:
    paths = [str(runs.checkpoint(runs.DENSE, i)) for i in (4, 6, 8)]
    config = MergeConfig(source=tuple(paths), save=tmp_path / "out")
    sweep(Sweep(config, SweepGrid(decay=("mean", "1-sqrt"), order=("reversed",))))
    merges = read_manifest(tmp_path)
    assert [m["name"].split("/")[0] for m in merges] == ["mean-reversed", "1-sqrt-reversed"]
    for one in merges:
        assert one["sources"] == paths
        assert_bits(one, RUNS / runs.DENSE)


SCORE = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
with open({log!r}, "a") as stream:
    print(path.parent.name, file=stream)
names = {names!r}
print("loading ...")
print(json.dumps({{"loss": names[path.parent.name], "acc": 1}}))
"""


@pytest.fixture
def scored(tmp_path: Path) -> Any:
    """A command that scores merges by their names, and what it was asked."""

    class Scored:
        log = tmp_path / "asked"
        losses = {"mean-last2": 3.0, "mean-last3": 1.0, "ema-last2": 2.0, "ema-last3": 4.0}

        def command(self, body: str = SCORE) -> str:
            script = tmp_path / "score.py"
            script.write_text(body.format(log=str(self.log), names=self.losses))
            return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{path}}"

        @property
        def asked(self) -> list[str]:
            return self.log.read_text().split() if self.log.exists() else []

    return Scored()


FOUR = SweepGrid(decay=("mean", "ema"), last=(2, 3))


def there(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "out").glob("*/iter_*"))


@pytest.mark.parametrize("batch", [1, 3, 10])
@pytest.mark.parametrize("keep", [1, 2])
def test_batches_keep_the_best_and_delete_the_others(
    tmp_path: Path, scored: Any, batch: int, keep: int
) -> None:
    options = SweepOptions(batch=batch, keep=keep, eval=scored.command())
    sweep(Sweep(base(tmp_path), FOUR), options=options)
    assert there(tmp_path) == sorted(["mean-last3", "ema-last2"][:keep])
    assert sorted(scored.asked) == sorted(scored.losses), "each is evaluated once"
    for one in read_manifest(tmp_path):
        name = one["name"].split("/")[0]
        assert one["scores"] == {"loss": scored.losses[name], "acc": 1}
        assert one["exists"] == Path(one["path"]).is_dir() == (name in there(tmp_path))
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {"sweep.json", *there(tmp_path)}, "nothing is left of the others"
    again = sweep(Sweep(base(tmp_path), FOUR), options=options)
    assert again is not None and again.bytes_read == 0 and len(scored.asked) == 4
    assert_bits(next(m for m in read_manifest(tmp_path) if m["exists"]), RUNS / runs.DENSE)


def test_more_are_kept_later_than_before(tmp_path: Path, scored: Any) -> None:
    options = SweepOptions(batch=2, eval=scored.command())
    sweep(Sweep(base(tmp_path), FOUR), options=options)
    sweep(Sweep(base(tmp_path), FOUR), options=replace(options, keep=2))
    assert there(tmp_path) == ["ema-last2", "mean-last3"] and len(scored.asked) == 4


def test_of_end_points_in_one_folder_the_tracker_follows_what_is_kept(
    tmp_path: Path, scored: Any
) -> None:
    script = tmp_path / "by_end.py"
    script.write_text("import os; print({'4': 3, '6': 1, '8': 2}[os.environ['WSM_ITERATION']])")
    command = f"{shlex.quote(sys.executable)} {script} {{root}}"
    grid = SweepGrid(decay=("ema",), last=(2,), to=(4, 6, 8))
    sweep(Sweep(base(tmp_path), grid), options=SweepOptions(batch=1, eval=command))
    root = tmp_path / "out/ema-last2"
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000006", TRACKER_FILE]
    assert (root / TRACKER_FILE).read_text() == "6"


def test_without_batches_all_are_scored_and_kept(tmp_path: Path, scored: Any) -> None:
    sweep(Sweep(base(tmp_path), FOUR), options=SweepOptions(eval=scored.command()))
    assert there(tmp_path) == sorted(scored.losses)
    assert all(m["scores"] for m in read_manifest(tmp_path))


FAILING = {
    "fails": ("import sys; print('oh no', file=sys.stderr); sys.exit(3)", "exit status 3: oh no"),
    "prints no number": ("print('done')", "its last line is 'done'"),
    "prints nothing": ("pass", "its last line is ''"),
    "prints NaN": ("print('nan')", "its last line is 'nan'"),
    "prints a NaN": ("""print('{{"loss": NaN}}')""", "loss is not finite"),
    "lacks the metric": ("""print('{{"acc": 1}}')""", "no loss in"),
    "hangs": ("import time; time.sleep(600)", "not done after 5 s"),
}


@pytest.mark.parametrize("case", FAILING)
def test_an_evaluation_that_fails_is_named_and_work_is_kept(
    tmp_path: Path, scored: Any, case: str
) -> None:
    body, words = FAILING[case]
    fails = f"if 'ema-last2' in sys.argv[1]:\n    {body}; sys.exit()".replace(" ; ", " ")
    body = SCORE.replace("path = ", fails + "\npath = ", 1)
    options = SweepOptions(
        batch=2, eval=scored.command(body), eval_timeout=5 if case == "hangs" else 60
    )
    with pytest.raises(EvaluationError, match=words) as caught:
        sweep(Sweep(base(tmp_path), FOUR), options=options)
    assert "ema-last2" in str(caught.value)
    scores = {m["name"].split("/")[0]: m["scores"] for m in read_manifest(tmp_path)}
    assert scores["mean-last2"] and scores["ema-last2"] is None
    sweep(Sweep(base(tmp_path), FOUR), options=replace(options, eval=scored.command()))
    assert there(tmp_path) == ["mean-last3"]
    assert sorted(scored.asked) == sorted(scored.losses), "what was scored is not asked again"


def test_no_space_for_all_of_them_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr("wsm_megatron.storage.space.shutil.disk_usage", lambda place: Usage)
    with pytest.raises(MergeError, match="GB needed and 0.000 GB free; nothing was written"):
        sweep(Sweep(base(tmp_path), FOUR))
    assert not list((tmp_path).glob("out/*/iter_*"))


def test_sources_that_were_written_anew_are_scored_anew(tmp_path: Path, scored: Any) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    wanted = Sweep(base(tmp_path, run), SweepGrid(decay=("mean",), last=(2,)))
    options = SweepOptions(batch=1, eval=scored.command())
    sweep(wanted, options=options)
    runs.rewrite(runs.checkpoint(run, 6), lambda key, tensor: tensor)
    (tmp_path / "out/mean-last2/iter_0000008").rename(tmp_path / "old")
    sweep(wanted, options=options)
    assert scored.asked == ["mean-last2"] * 2


BAD_GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "an axis without values": ({"decay": ()}, "--decay: no value, so the grid is empty"),
    "a value twice": ({"order": ("reversed", "reversed")}, "--order names a value twice"),
    "an order that is none": ({"order": ("backwards",)}, "--order must be one of sequential"),
    "seeds of nothing": ({"order_seed": (1, 2)}, "no effect without --order scrambled"),
    "a decay that is none": ({"decay": ("lineal",)}, "did you mean linear"),
    "a floor above 1": ({"min_decay": (2.0,)}, "not between 0 and 1"),
    "a window of nothing": ({"window_iterations": (1,)}, "at least two checkpoints"),
    "an end that is no checkpoint": ({"to": (7,)}, "--to: no finished checkpoint of iteration 7"),
}


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_bad_grids_are_named(tmp_path: Path, case: str) -> None:
    options, words = BAD_GRIDS[case]
    with pytest.raises(UsageError, match=words):
        sweep(Sweep(base(tmp_path), SweepGrid(**options)))
    assert not (tmp_path / "out").exists()


def test_two_decays_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = []
    for folder, half in (("a", 0.5), ("b", 0.25)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "curve.csv").write_text(f"0,1\n0.5,{half}\n1,0\n")
        paths.append(str(tmp_path / folder / "curve.csv"))
    with pytest.raises(UsageError, match="would both be saved to"):
        sweep(Sweep(base(tmp_path), SweepGrid(decay=paths)))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', '{"format": 1, "merges": [{}]}'])
def test_a_damaged_manifest_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sweep.json").write_text(text)
    with pytest.raises(MergeError, match="sweep.json"):
        sweep(Sweep(base(tmp_path), FOUR))
    assert (tmp_path / "out/sweep.json").read_text() == text and there(tmp_path) == []


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    done = sweep(Sweep(base(tmp_path), FOUR))
    assert done is not None
    assert SweepManifest.read(done.manifest).merges == done.merges


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch": 2}, "--batch keeps the best: give --eval"),
        ({"keep": 2, "eval": "true"}, "--keep has no effect"),
        ({"batch": 0, "eval": "true"}, "--batch must be at least 1"),
        ({"metric": "loss,acc"}, "one decides"),
        ({"eval_timeout": 0}, "must be above 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SweepOptions(**options)


def command(tmp_path: Path, *more: str) -> list[str]:
    return ["sweep", "--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / "out"), *more]


def test_the_command_says_little_and_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--window-iterations", "4,6", "--decay", "mean,ema", "--order", "sequential,reversed"]
    assert main(command(tmp_path, *grid, "--dry-run")) == 0
    said = capsys.readouterr()
    assert "8 merges of 4 sources" in said.err and "free" in said.err
    assert said.out.splitlines()[-1] == "nothing was written" and not (tmp_path / "out").exists()
    assert main(command(tmp_path, *grid, "--json")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 2 + 1, "a line for each merge"
    assert len({len(line) for line in lines[:9]}) == 1, "aligned"
    data = json.loads(lines[-1])
    assert data["merges"] == read_manifest(tmp_path)
    assert data["estimate"]["free"] > 0 and data["bytes_read"] > 0


def test_a_file_of_options_is_a_grid(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"load: {RUNS / runs.DENSE}\nsave: {tmp_path / 'out'}\nlast: [2, 3]\n"
        "decay: [mean, ema]\norder: reversed\nmin_decay: [0, 10%]\noptimizer_state: drop\n"
    )
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml"), "--decay", "1-sqrt"]) == 0
    assert [m["name"].split("/")[0] for m in read_manifest(tmp_path)] == [
        "1-sqrt-reversed-last2", "1-sqrt-floor0.1-reversed-last2",
        "1-sqrt-reversed-last3", "1-sqrt-floor0.1-reversed-last3",
    ]  # fmt: skip


def test_the_exit_status_tells_mistakes_from_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "--decay", "lineal")) == EXIT_USAGE
    assert main(command(tmp_path, "--batch", "1", "--eval", "exit 7")) == EXIT_FAILED
    assert "exit status 7: nothing on standard error" in capsys.readouterr().err


def test_ranks_of_this_machine_make_the_same_sweep(tmp_path: Path, scored: Any) -> None:
    line = command(tmp_path, "--last", "2,3", "--decay", "mean,ema", "--local-ranks", "2")
    assert main([*line, "--batch", "3", "--eval", scored.command()]) == 0
    assert there(tmp_path) == ["mean-last3"] and sorted(scored.asked) == sorted(scored.losses)
    alone = merge(replace(base(tmp_path), save=tmp_path / "alone", last=3, decay="mean"))
    expected = load_tensors(alone.output)
    merged = load_tensors(tmp_path / "out/mean-last3/iter_0000008")
    assert all(same_bits(merged[key], tensor) for key, tensor in expected.items())


def test_merges_that_come_out_the_same_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = SweepGrid(decay=("mean",), order=("sequential", "reversed"), window_iterations=(6, 8))
    sweep(Sweep(base(tmp_path), grid), options=SweepOptions(dry_run=True))
    assert "3 of 4 merges are equal to others" in caplog.text
