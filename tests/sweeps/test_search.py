"""The search for coefficients: in memory and by a command, remembered, reported elsewhere."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import FRONTIER, RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, MergeError, SearchOptions, UsageError, merge, search
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.schedule.decay import DECAYS, coefficients
from wsm_megatron.sweeps import simplex
from wsm_megatron.sweeps.evaluate import EvaluationError
from wsm_megatron.sweeps.in_memory import InMemoryMerges
from wsm_megatron.sweeps.simplex import logits_of, softmax

pytest.importorskip("scipy")

WEIGHTS = (0.1, 0.5, 0.15, 0.25)
TARGETS = {"search": WEIGHTS, "report": (0.12, 0.46, 0.19, 0.23)}


def config(run: str = runs.DENSE, **options: Any) -> MergeConfig:
    """Without rounding to bf16, which is as large as what few steps of training change."""
    return MergeConfig(load=RUNS / run, save=Path("unused"), **{"dtype": "fp32", **options})


class Distance:
    """Squared distance of a merge's float weights to a merge with known weights, in float64."""

    def __init__(self, target: tuple[float, ...], run: str = runs.DENSE):
        read = [load_tensors(runs.checkpoint(run, i)) for i in runs.ITERATIONS]
        self.target = {
            key: sum(w * one[key].double() for w, one in zip(target, read, strict=True))
            for key, tensor in read[0].items()
            if tensor.is_floating_point()
        }
        self.calls = 0

    def __call__(self, tensors: dict[str, torch.Tensor]) -> float:
        self.calls += 1
        apart = (tensors[key].double() - value for key, value in self.target.items())
        return 1000 * sum(float(one.square().sum()) for one in apart)


@pytest.fixture(scope="module")
def target() -> Distance:
    return Distance(WEIGHTS)


@pytest.mark.parametrize(
    "run",
    [RUNS / run for run in (runs.DENSE, runs.FP32_PARAM, runs.FLAT, runs.FULLY, runs.MOE)]
    + sorted(path for path in FRONTIER.iterdir() if (path / "iter_0000006").is_dir()),
    ids=lambda path: path.name,
)
def test_merges_in_memory_have_the_bits_of_those_that_are_written(
    tmp_path: Path, run: Path
) -> None:
    weights = coefficients([6, 8], "ema")
    one = MergeConfig(load=run, save=tmp_path, iterations=(6, 8), weights=weights)
    merges = InMemoryMerges(prepare_job(one))
    merges.tensors((0.5, 0.5))
    tensors = merges.tensors(weights)
    written = load_tensors(merge(one).output)
    assert written.keys() == tensors.keys()
    for key, tensor in written.items():
        assert same_bits(tensors[key], tensor), key


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12))
def test_softmax_undoes_logits(weights: list[float]) -> None:
    total = math.fsum(weights)
    shares = [w / total for w in weights]
    again = softmax(logits_of(shares))
    assert math.fsum(again) == pytest.approx(1, abs=1e-12) and min(again) > 0
    if min(shares) >= simplex.SMALLEST:
        assert again == pytest.approx(shares, rel=1e-9)


@given(st.lists(st.floats(-700, 700), min_size=2, max_size=12))
def test_softmax_is_on_the_simplex_for_any_logits(logits: list[float]) -> None:
    found = softmax(logits)
    assert all(0 <= c <= 1 for c in found) and math.fsum(found) == pytest.approx(1, abs=1e-12)


def test_a_search_finds_what_no_decay_is(target: Distance) -> None:
    found = search(config(), target, options=SearchOptions(budget=60))
    assert found.iterations == runs.ITERATIONS
    assert found.best.name is None and found.best.coefficients == pytest.approx(WEIGHTS, abs=0.05)
    assert all(one.scores["loss"] > 2 * found.best.scores["loss"] for one in found.named)
    assert {one.name for one in found.named} <= set(DECAYS)
    assert len(found.evaluations) <= 60 and math.fsum(found.best.coefficients) == pytest.approx(1)
    steps = [one.scores["loss"] for _, one in found.frontier]
    assert steps == sorted(steps, reverse=True) and steps[-1] == found.best.scores["loss"]
    for one in found.evaluations:
        assert found.behind(one) == one.scores["loss"] - found.best.scores["loss"] >= 0


def test_on_a_split_that_it_did_not_see_it_beats_every_decay(target: Distance) -> None:
    """Where the splits are alike but not the same, as two halves of a held-out set are."""
    report = Distance(TARGETS["report"])
    found = search(config(), target, report, SearchOptions(budget=60))
    assert found.best.report is not None
    assert report.calls == 1 + len(found.named) and found.best.name is None
    for one in found.named:
        behind = found.behind(one, "report")
        assert behind is not None and behind > 0


def test_where_scores_are_not_smooth_it_is_no_worse_than_the_best_decay(target: Distance) -> None:
    """Weights rounded to bf16: the score jumps where large ones round the other way."""
    found = search(config(dtype="same"), target, options=SearchOptions(budget=60))
    assert len(found.evaluations) == 60
    assert found.best.scores["loss"] < found.named[0].scores["loss"]


def test_higher_may_be_better(target: Distance) -> None:
    options = SearchOptions(budget=30, metric="acc")
    found = search(config(), lambda tensors: {"acc": -target(tensors)}, options=options)
    assert found.best.scores["acc"] == max(one.scores["acc"] for one in found.evaluations)
    assert found.best.name is None


def test_a_search_that_ended_goes_on_and_asks_nothing_twice(
    tmp_path: Path, target: Distance
) -> None:
    whole = search(config(), target, options=SearchOptions(budget=40))
    before = target.calls

    def failing(tensors: dict[str, torch.Tensor]) -> float:
        if target.calls - before == 17:
            raise MergeError("the node is gone")
        return target(tensors)

    with pytest.raises(MergeError, match="the node is gone"):
        search(config(), failing, options=SearchOptions(budget=25), remember=tmp_path)
    assert len(json.loads((tmp_path / "search.json").read_text())["evaluations"]) == 17
    before = -(10**9)
    calls = target.calls
    found = search(config(), target, options=SearchOptions(budget=25), remember=tmp_path)
    assert (found.remembered, target.calls - calls) == (17, len(found.evaluations) - 17)
    more = search(config(), target, options=SearchOptions(budget=40), remember=tmp_path)
    assert more.remembered == len(found.evaluations)
    assert more.evaluations == whole.evaluations, "as if it had never ended"


@pytest.mark.parametrize(
    "change",
    [{"metric": "acc"}, {"eval": "other"}, {"iterations": (4, 6, 8)}, {"buffers": "last"}],
)
def test_scores_of_another_search_are_not_taken(
    tmp_path: Path, target: Distance, change: dict[str, Any]
) -> None:
    def evaluate(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"loss": target(tensors), "acc": 1.0}

    options = SearchOptions(budget=7)
    search(config(), evaluate, options=options, remember=tmp_path)
    ours = {name: value for name, value in change.items() if name in ("metric", "eval")}
    others = {name: value for name, value in change.items() if name not in ours}
    with pytest.raises(UsageError, match="is of another search: its"):
        search(
            config(**others),
            evaluate,
            options=replace(options, **ours),
            remember=tmp_path,
        )


def test_a_damaged_memory_is_told(tmp_path: Path, target: Distance) -> None:
    options = SearchOptions(budget=7)
    search(config(), target, options=options, remember=tmp_path)
    data = json.loads((tmp_path / "search.json").read_text())
    del data["evaluations"][0]["coefficients"]
    (tmp_path / "search.json").write_text(json.dumps(data))
    with pytest.raises(MergeError, match="search.json is damaged"):
        search(config(), target, options=options, remember=tmp_path)


@pytest.mark.parametrize("score", [math.nan, math.inf, {"acc": 1.0}])
def test_a_score_that_is_none_ends_the_search(score: Any) -> None:
    with pytest.raises(EvaluationError, match="no finite loss"):
        search(config(), lambda tensors: score, options=SearchOptions(budget=7))


def test_nothing_is_written(tmp_path: Path, target: Distance) -> None:
    one = replace(config(), save=tmp_path / "out")
    search(one, target, options=SearchOptions(budget=8))
    assert list(tmp_path.iterdir()) == []


def test_without_scipy_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, target: Distance
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"pip install 'wsm_megatron\[search\]'"):
        search(config(), target, options=SearchOptions(budget=8))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 3}, "less than the 6 decays"),
        ({"starts": ()}, "--starts: at least one"),
        ({"starts": ("mean", "mean")}, "none twice"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SearchOptions(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": (0.5, 0.5), "iterations": (6, 8)}, "leave it out"),
        ({"window_iterations": (2, 4)}, "one window is searched over at a time"),
        ({"optimizer_state": "last"}, "weights alone"),
    ],
)
def test_merges_that_cannot_be_searched(
    options: dict[str, Any], words: str, target: Distance
) -> None:
    with pytest.raises(UsageError, match=words):
        search(config(runs.FULLY, **options), target, options=SearchOptions(budget=7))


SCORE = """
import json, math, pathlib, sys
path, target = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
made = json.loads((path / "wsm_merge.json").read_text())["coefficients"]
with open({log!r}, "a") as stream:
    print(path.parent.name, file=stream)
print(json.dumps({{"loss": math.dist(made, target)}}))
"""


@pytest.fixture
def command(tmp_path: Path) -> Any:
    """Scores by the coefficients alone: quick, as this is of what is done around them."""
    script = tmp_path / "score.py"
    script.write_text(SCORE.format(log=str(tmp_path / "asked")))

    def of(split: str) -> str:
        wanted = json.dumps(TARGETS[split])
        return " ".join([shlex.quote(sys.executable), str(script), "{path}", shlex.quote(wanted)])

    return of


def test_the_command_keeps_the_best(
    tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", "--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / "out"),
            "--starts", "mean,ema", "--eval", command("search"), "--report", command("report"),
            "--budget", "12", "--json"]  # fmt: skip
    assert main(line) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    data = json.loads(last)
    best = tmp_path / "out/best/iter_0000008"
    assert data["best"]["path"] == str(best)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best", "search.json"]
    made = json.loads((best / "wsm_merge.json").read_text())
    assert made["coefficients"] == data["best"]["coefficients"]
    expected = merge(
        MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "again", weights=made["coefficients"])
    )
    again, kept = load_tensors(expected.output), load_tensors(best)
    assert all(same_bits(kept[key], tensor) for key, tensor in again.items())
    assert {one["name"] for one in data["named"]} == {"mean", "ema"}
    assert all(one["behind_on_report"] is not None for one in data["named"])
    assert data["best"]["report"]["loss"] == math.dist(made["coefficients"], TARGETS["report"])
    assert sum("(report)" in one for one in lines) == 1
    asked = (tmp_path / "asked").read_text().split()
    assert len(asked) == 12 + 3
    assert main([*line, "--budget", "20"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["remembered"] == 12
    assert sorted(path.name for path in (tmp_path / "out/best").iterdir()) == [
        "iter_0000008", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def test_ranks_of_this_machine_search_as_one(tmp_path: Path, command: Any) -> None:
    found = []
    for ranks in ("1", "2"):
        line = ["search", "--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / ranks),
                "--starts", "mean", "--eval", command("search"), "--budget", "4",
                "--local-ranks", ranks]  # fmt: skip
        assert main(line) == 0
        data = json.loads((tmp_path / ranks / "search.json").read_text())
        found.append(data["evaluations"])
    assert found[0] == found[1] and len(found[0]) == 4


def test_the_exit_status_tells_mistakes_from_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", "--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / "out")]
    assert main(line) == EXIT_USAGE and "give --eval CMD" in capsys.readouterr().err
    assert main([*line, "--eval", "exit 9"]) == EXIT_FAILED
    assert "exit status 9" in capsys.readouterr().err
