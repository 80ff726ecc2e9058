"""From scores to a choice."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import MergeConfig, UsageError
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.metric import Metric, metrics_of
from wsm_megatron.sweeps.run import SweepOptions, sweep
from wsm_megatron.sweeps.selection import (
    Candidate,
    Scored,
    Selection,
    pareto_front,
    select_merges,
)

RUN = RUNS / runs.DENSE
NAMES = ("mean-last2", "mean-last3", "ema-last2", "ema-last3")
LOSSES = dict(zip(NAMES, (3.0, 1.0, 2.0, 4.0), strict=True))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "out"
    done = sweep(
        Sweep(MergeConfig(load=RUN, save=out), SweepGrid(decay=("mean", "ema"), last=(2, 3)))
    )
    assert done is not None
    return done.manifest


def select(
    manifest: Path | None, file: Path | list[Path], metric: str = "loss", **more: Any
) -> Selection:
    files = file if isinstance(file, list) else [file]
    return select_merges(metrics_of(metric), files, manifest, **more)


def csv(folder: Path, *lines: str, name: str = "scores.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def names(scored: Any) -> list[str]:
    return [one.candidate.name.split("/")[0] for one in scored]


NAMED_BY = {
    "path": lambda m: m["path"],
    "name": lambda m: m["name"],
    "folder": lambda m: m["name"].split("/")[0],
    "root": lambda m: m["root"],
    "root with a slash": lambda m: m["root"] + "/",
}


@pytest.mark.parametrize("by", NAMED_BY)
@pytest.mark.parametrize("form", ["csv", "json", "json list"])
def test_merges_are_ranked_however_they_are_named(
    tmp_path: Path, manifest: Path, by: str, form: str
) -> None:
    merges = json.loads(manifest.read_text())["merges"]
    rows = [(NAMED_BY[by](m), LOSSES[m["name"].split("/")[0]]) for m in merges]
    if form == "csv":
        file = csv(tmp_path, "model,path,loss", *(f"x,{key},{loss}" for key, loss in rows))
    else:
        data: Any = {key: {"loss": loss, "note": "x"} for key, loss in rows}
        if form == "json list":
            data = [{"merge": key, "loss": loss} for key, loss in rows]
        file = tmp_path / "scores.json"
        file.write_text(json.dumps(data))
    found = select(manifest, file)
    assert names(found.merges) == sorted(NAMES, key=LOSSES.__getitem__)
    assert found.missing == () and found.front == () and found.checkpoints == ()


def test_a_path_relative_to_here_is_one(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(manifest.parent.parent)
    file = csv(tmp_path, "path,loss", "out/ema-last2/iter_0000008,1")
    assert names(select(Path("out/sweep.json"), file).merges) == ["ema-last2"]


def test_the_way_that_is_better() -> None:
    lower = ("loss", "lm loss value", "wikitext_ppl", "bits_per_byte", "max_violation")
    assert all(Metric.of(name).lower for name in lower)
    assert not any(Metric.of(name).lower for name in ("mmlu", "acc", "gsm8k", "score"))
    assert Metric.of("acc:min") == Metric("acc", True)
    assert Metric.of("loss:max") == Metric("loss", False)
    assert Metric.of("a:b").name == "a:b"


def test_higher_is_better_for_accuracies(tmp_path: Path, manifest: Path) -> None:
    file = csv(tmp_path, "merge,mmlu", *(f"{name},{loss}" for name, loss in LOSSES.items()))
    assert names(select(manifest, file, "mmlu").merges)[0] == "ema-last3"
    assert names(select(manifest, file, "mmlu:min").merges)[0] == "mean-last3"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    metrics = metrics_of("loss,acc")
    scored = [
        Scored(Candidate(str(n), n, None, frozenset()), {"loss": x, "acc": y})
        for n, (x, y) in enumerate(points)
    ]
    front = {one.candidate.iteration for one in pareto_front(scored, metrics)}
    for (n, (x, y)), (m, (a, b)) in product(enumerate(points), repeat=2):
        if a <= x and b >= y and (a < x or b > y):
            assert n not in front, m
    assert front, "of finitely many, one is not dominated"
    for n in set(range(len(points))) - front:
        x, y = points[n]
        assert any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)


def test_two_metrics_give_a_front(tmp_path: Path, manifest: Path) -> None:
    lines = ["mean-last2,3,0.9", "mean-last3,1,0.5", "ema-last2,2,0.7", "ema-last3,4,0.6"]
    found = select(manifest, csv(tmp_path, "merge,loss,acc", *lines), "loss,acc")
    assert names(found.front) == ["mean-last3", "ema-last2", "mean-last2"]
    assert names(found.merges)[0] == "mean-last3"


def test_scores_of_two_harnesses_are_put_together(tmp_path: Path, manifest: Path) -> None:
    files = [
        csv(tmp_path, "merge,loss", "mean-last2,3", "ema-last2,2", name="a.csv"),
        csv(tmp_path, "name,acc", "ema-last2,0.5", "mean-last2,0.6", name="b.csv"),
    ]
    assert names(select(manifest, files, "loss,acc").front) == ["ema-last2", "mean-last2"]


def test_scores_that_the_sweep_has_made_count_and_those_of_a_file_win(tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(f"import sys; print({LOSSES!r}[sys.argv[1].split('/')[-2]])")
    done = sweep(
        Sweep(MergeConfig(load=RUN, save=tmp_path / "out"), SweepGrid(decay=("ema",), last=(2, 3))),
        options=SweepOptions(eval=f"{shlex.quote(sys.executable)} {script} {{path}}"),
    )
    assert done is not None
    assert names(select(done.manifest, []).merges) == ["ema-last2", "ema-last3"]
    better = csv(tmp_path, "merge,loss", "ema-last3,0.5")
    assert names(select(done.manifest, better).merges) == ["ema-last3", "ema-last2"]


def test_what_has_no_score_is_named(tmp_path: Path, manifest: Path) -> None:
    found = select(manifest, csv(tmp_path, "merge,loss", "mean-last2,3", "ema-last2,"))
    assert names(found.merges) == ["mean-last2"]
    missing = {name.split("/")[0] for name in found.missing}
    assert missing == {"mean-last3", "ema-last2", "ema-last3"}


CHECKPOINTS = ("iteration,loss", "2,4", "4,1", "6,3", "8,2")


@pytest.mark.parametrize("by_manifest", [False, True])
def test_the_best_checkpoints_are_a_list_of_sources(
    tmp_path: Path, manifest: Path, by_manifest: bool
) -> None:
    lines = CHECKPOINTS[:1] + CHECKPOINTS[2:] if by_manifest else CHECKPOINTS
    where = {} if by_manifest else {"load": RUN}
    found = select(manifest if by_manifest else None, csv(tmp_path, *lines), top=2, **where)
    assert [one.candidate.iteration for one in found.checkpoints][:3] == [4, 8, 6]
    assert found.top == (4, 8), "oldest first, as --iterations wants them"


BAD: dict[str, tuple[list[str], str]] = {
    "an unknown merge": (["merge,loss", "mean-last2,1", "mean-last9,1"], "mean-last9: neither a"),
    "an unknown checkpoint": (["iteration,loss", "7,1"], "7: neither a merge"),
    "one twice": (["merge,loss", "mean-last2,1", "mean-last2,2"], "line 3: loss of .* twice"),
    "one under two names": (
        ["merge,loss", "mean-last2,1", "mean-last2/iter_0000008,2"],
        "line 3: loss of mean-last2/iter_0000008 is there twice",
    ),
    "NaN": (["merge,loss", "mean-last2,nan"], "line 2: loss of mean-last2 is 'nan', no finite"),
    "infinity": (["merge,loss", "mean-last2,-inf"], "no finite number"),
    "text": (["merge,loss", "mean-last2,high"], "is 'high', no finite number"),
    "another metric": (["merge,acc", "mean-last2,1"], "no loss in it: acc"),
    "a column twice": (["merge,loss,loss", "mean-last2,1,2"], "two columns have one name"),
    "a short line": (["merge,loss", "mean-last2"], "line 2: 1 values under 2 names"),
    "nothing": ([], "there are no scores in it"),
    "a head alone": (["merge,loss"], "there are no scores in it"),
    "only empty ones": (["merge,loss", "mean-last2,"], "nothing has a score of loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_scores_are_named(tmp_path: Path, manifest: Path, case: str) -> None:
    lines, words = BAD[case]
    with pytest.raises(UsageError, match=words):
        select(manifest, csv(tmp_path, *lines))


BAD_JSON = {
    "a name twice": ('{"mean-last2": {"loss": 1}, "mean-last2": {"loss": 2}}', "is there twice"),
    "NaN": ('{"mean-last2": {"loss": NaN}}', "loss of mean-last2 is nan"),
    "a bool": ('{"mean-last2": {"loss": true}}', "is True, no finite number"),
    "a huge number": ('{"mean-last2": {"loss": 1' + "0" * 400 + "}}", "no finite number"),
    "no object": ('{"mean-last2": 1}', "expected an object"),
    "no name": ('[{"loss": 1}]', "does not say of what"),
    "no JSON": ("{", "not JSON"),
    "neither": ("[1]", "does not say of what"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_named(tmp_path: Path, manifest: Path, case: str) -> None:
    text, words = BAD_JSON[case]
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        select(manifest, tmp_path / "s.json")


def wsm(capsys: pytest.CaptureFixture[str], *line: Any) -> tuple[int, str, str]:
    status = main(["select", *map(str, line)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_leads_to_the_merge(
    tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that it names makes the chosen merge again, bit for bit."""
    file = csv(tmp_path, "merge,loss", *(f"{name},{loss}" for name, loss in LOSSES.items()))
    status, out, _ = wsm(
        capsys, "--manifest", manifest, "--scores", file, "--metric", "loss", "--json"
    )
    *lines, last = out.splitlines()
    data = json.loads(last)
    assert status == 0 and data["best"]["name"] == "mean-last3/iter_0000008"
    assert any("Table 5" in line for line in lines) and "Table 5" in data["note"]
    assert [one["scores"]["loss"] for one in data["merges"]] == [1, 2, 3, 4]
    words = data["best"]["command"].split()
    assert words[:2] == ["wsm", "merge"] and any(data["best"]["command"] in one for one in lines)
    assert main([*words[1 : words.index("--save")], "--save", str(tmp_path / "again"),
                 *words[words.index("--save") + 2 :]]) == 0  # fmt: skip
    again = load_tensors(tmp_path / "again/iter_0000008")
    chosen = load_tensors(Path(data["best"]["path"]))
    assert all(same_bits(again[key], tensor) for key, tensor in chosen.items())


def test_the_command_lists_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = csv(tmp_path, *CHECKPOINTS)
    status, out, _ = wsm(capsys, "--load", RUN, "--scores", file, "--top", "3")
    assert status == 0 and "  --iterations 4,6,8" in out.splitlines()
    assert "Table 5" not in out, "said of merges"


def test_no_note_where_benchmarks_decide(
    tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = csv(tmp_path, "merge,loss,mmlu", "mean-last2,1,0.5", "ema-last2,2,0.6")
    status, out, _ = wsm(capsys, "--manifest", manifest, "--scores", file, "--metric", "loss,mmlu")
    assert status == 0 and "Table 5" not in out and "Pareto front of loss and mmlu:" in out


@pytest.mark.parametrize(
    "line, words",
    [
        ([], "give --manifest OUT/sweep.json, --load RUN, or both"),
        (["--manifest", "nowhere.json"], "no such file"),
        (["--load", RUN, "--scores", "nowhere.csv"], "No such file"),
        (["--load", RUN, "--top", "1"], "at least two"),
        (["--load", RUN, "--metric", "a,b,c"], "one name, or two"),
        (["--load", RUN, "--metric", "a,a"], "names a metric twice"),
        (["--load", RUN, "--metric", "a,"], "no name"),
        (["--load", RUN], "nothing has a score of loss; give --scores"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], line: list[Any], words: str) -> None:
    status, _, err = wsm(capsys, *line)
    assert status == EXIT_USAGE and words in err


def test_a_damaged_manifest_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    status, _, err = wsm(capsys, "--manifest", tmp_path / "sweep.json")
    assert status == EXIT_FAILED and "is damaged, or no manifest" in err
