"""Pictures and pages: what is drawn is what was found, in one file that needs nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from tests import runs
from tests.reference import RUNS
from wsm_megatron import MergeConfig
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE
from wsm_megatron.inspection.inspect import inspect_run
from wsm_megatron.pictures.coefficients import draw_coefficients
from wsm_megatron.pictures.run import draw_run
from wsm_megatron.pictures.style import COLOURS, drawing, scaled
from wsm_megatron.pictures.sweep import draw_sweep
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.sweeps.grid import Sweep, SweepGrid
from wsm_megatron.sweeps.manifest import SweepManifest
from wsm_megatron.sweeps.metric import Metric
from wsm_megatron.sweeps.run import sweep

RUN = RUNS / runs.DENSE
PNG = b"\x89PNG"
GRID = SweepGrid(decay=("mean", "ema"), last=(2, 3, 4), order=("sequential", "reversed"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose merges are all scored, and a file of scores, of checkpoints too."""
    folder = tmp_path_factory.mktemp("swept")
    done = sweep(Sweep(MergeConfig(load=RUN, save=folder / "out"), GRID))
    assert done is not None
    lines = ["path,loss,acc"]
    lines += [f"{one.path},{1 + n / 10},{n}" for n, one in enumerate(done.merges)]
    lines += [f"{i},{3 - i / 10},0" for i in runs.ITERATIONS]
    (folder / "scores.csv").write_text("\n".join(lines) + "\n")
    return done.manifest


def scores_of(manifest: Path) -> str:
    return str(manifest.parents[1] / "scores.csv")


class Page(HTMLParser):
    """What a page has in it, and what it asks for from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[str] = []
        self.asked: list[str] = []
        self.pictures = 0
        self._in_heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag in ("h1", "h2")
        self.pictures += tag == "svg"
        assert tag not in ("script", "link", "iframe", "img"), tag
        values = [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.asked += [value for value in values if value and not value.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
        self._in_heading = False


def test_a_selection_s_page_has_everything_and_needs_nothing(
    swept: Path, tmp_path: Path, capsys
) -> None:
    assert main(["inspect", str(RUN), "--trajectory", "--out", str(swept.parent)]) == 0
    page = tmp_path / "report.html"
    command = ["select", "--manifest", str(swept), "--load", str(RUN), "--scores", scores_of(swept)]
    assert main([*command, "--metric", "loss,acc", "--report", str(page)]) == 0
    assert f"report: {page}" in capsys.readouterr().out
    text = page.read_text()
    found = Page(text)
    assert found.headings[1:] == [
        "The best merge",
        "Scores",
        "Coefficients",
        "The run",
        "The path",
        "Where it comes from",
        "How to cite",
    ]
    assert found.pictures == 4 and found.asked == []
    assert not re.search(
        r"url\((?!#)|@import|https?://(?!www\.w3\.org|purl\.org|creativecom)", text
    )
    assert len(page.read_bytes()) < 500_000
    merges = json.loads(swept.read_text())["merges"]
    assert all(one["name"] in text for one in merges)
    assert "arXiv:2507.17634" in text and merges[0]["digest"] in text


def test_the_same_report_has_the_same_bytes(swept: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        command = ["report", "--manifest", str(swept), "--scores", scores_of(swept)]
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_names_from_files_do_not_become_html(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "<script>alert(1)</script>" / "run")
    save = tmp_path / "out"
    done = sweep(Sweep(MergeConfig(load=run, save=save), SweepGrid(last=(2,))))
    assert done is not None
    page = tmp_path / "report.html"
    assert main(["report", "--manifest", str(done.manifest), "--out", str(page)]) == 0
    assert "<script" not in page.read_text()


def test_a_sweep_and_an_inspection_write_pages(tmp_path: Path) -> None:
    score = f"{sys.executable} -c 'print(1.5)'"
    command = ["sweep", "--load", RUN, "--save", tmp_path / "out", "--last", "2,3", "--trajectory"]
    page = tmp_path / "sweep.html"
    assert main([*map(str, command), "--eval", score, "--report", str(page)]) == 0
    assert {"Scores", "The path"} <= set(Page(page.read_text()).headings)
    page = tmp_path / "run.html"
    assert main(["inspect", str(RUN), "--report", str(page), "--trajectory"]) == 0
    assert Page(page.read_text()).headings[1:] == ["The run", "The path", "How to cite"]
    assert main(["inspect", str(RUN), "--report", str(page)]) == 0
    assert Page(page.read_text()).headings[1:] == ["The run", "How to cite"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_picture_is_drawn(suffix: str, swept: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(RUN), "--trajectory", "--out", str(tmp_path)]) == 0
    scores = ["--scores", scores_of(swept)]
    run_scores = tmp_path / "run.csv"
    run_scores.write_text("iteration,loss\n2,3\n8,2\n")
    kinds = {
        "coefficients": ["--num", "6", "--decay", "mean,1-sqrt,ema"],
        "run": [str(RUN), "--scores", str(run_scores)],
        "sweep": [str(swept), *scores],
        "trajectory": [str(tmp_path)],
    }
    for kind, arguments in kinds.items():
        out = tmp_path / f"{kind}.{suffix}"
        assert main(["plot", kind, *arguments, "--out", str(out)]) == 0
        data = out.read_bytes()
        assert data.startswith(PNG if suffix == "png" else b"<svg"), kind
        assert len(data) < 500_000


def test_coefficients_are_drawn_where_the_tokens_are() -> None:
    checkpoints = [Checkpoint(i, i * 10**9) for i in (1, 2, 4)]
    decays = [MergeCoefficients.over(checkpoints, name) for name in ("mean", "ema")]
    with drawing():
        above, below = draw_coefficients(decays).axes
    assert below.get_xlabel() == "training tokens (billions)"
    for line, one in zip(below.get_lines(), decays, strict=False):
        assert list(line.get_xdata()) == [1, 2, 4]
        assert tuple(line.get_ydata()) == one.coefficients
    for stairs, one in zip(above.patches, decays, strict=True):
        assert tuple(stairs.get_data().values) == (1.0, *one.effective_lr)
        assert list(stairs.get_data().edges[1:]) == [1, 2, 4]


def test_a_run_is_drawn_with_its_scores() -> None:
    with drawing():
        rates, losses = draw_run(inspect_run(RUN), {2: 3.0, 8: 2.0, 99: 1.0}).axes
    (line,) = losses.get_lines()
    assert list(line.get_ydata()) == [3.0, 2.0]
    assert set(rates.get_lines()[0].get_ydata()) == {0.001}


def test_a_sweep_s_best_merge_is_on_top(swept: Path) -> None:
    merges = SweepManifest.read(swept).merges
    scores = {one.path: float(n) for n, one in enumerate(merges)}
    for metric, best in ((Metric("loss", True), merges[0]), (Metric("acc", False), merges[-1])):
        with drawing():
            above, below = draw_sweep(merges, scores, metric, {8: 2.5}).axes
        assert above.get_yticklabels()[0].get_text() == best.name.split("/")[0]
        assert above.yaxis_inverted()
        drawn = sorted(y for line in below.get_lines() for y in line.get_ydata())
        assert drawn == sorted(scores.values())


def test_many_curves_do_not_fill_the_legend(swept: Path) -> None:
    merges = SweepManifest.read(swept).merges
    many = [
        type(one)(**{**vars(one), "decay": f"curve{n}", "path": f"{one.path}{n}"})
        for n in range(9)
        for one in merges
    ]
    with drawing():
        figure = draw_sweep(many, {one.path: 1.0 for one in many}, Metric("loss", True))
    names = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(names) == len(COLOURS) and names[-1] == "11 more"


def test_positions_are_shown_in_handy_numbers() -> None:
    assert scaled([5e11, 1.2e12], "tokens") == ([0.5, 1.2], "training tokens (trillions)")
    assert scaled([5, 12], "tokens") == ([5.0, 12.0], "training tokens")
    assert scaled([5000, 12000], "iterations") == ([5000.0, 12000.0], "training iteration")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["plot", "coefficients", "--num", "3", "--out", "x.jpeg"], EXIT_USAGE, ".png or .svg"),
        (["plot", "sweep", "{swept}", "--out", "x.png"], EXIT_USAGE, "give --scores"),
        (["plot", "sweep", "{none}", "--out", "x.png"], EXIT_FAILED, "none"),
        (["plot", "trajectory", "{none}", "--out", "x.png"], EXIT_USAGE, "no such file"),
        (["report", "--manifest", "{none}"], EXIT_USAGE, "no such file"),
        (["select", "--load", "{run}", "--scores", "{none}", "--report", "x"], EXIT_USAGE, "none"),
        (["inspect", "{run}/iter_0000002", "--report", "x"], EXIT_USAGE, "one checkpoint"),
    ],
)
def test_bad_input_is_a_message(
    arguments: list[str], status: int, words: str, swept: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"swept": swept, "none": tmp_path / "none", "run": RUN}
    assert main([one.format(**places) for one in arguments]) == status
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "x.png"
    assert main(["plot", "coefficients", "--num", "3", "--out", str(out)]) == EXIT_USAGE
    assert "pip install 'wsm_megatron[plot]'" in capsys.readouterr().err and not out.exists()


def test_help_imports_no_matplotlib_and_the_list_of_commands_no_torch() -> None:
    lines = [
        "import sys",
        "from wsm_megatron.cli.main import COMMANDS, parser",
        "parser([]).format_help()",
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()",
        "for command in COMMANDS:",
        "    parser([command]).format_help()",
        "assert 'matplotlib' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_merges_are_listed_with_their_scores(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["sweep", "--load", RUN, "--save", out, "--last", "2,3", "--decay", "mean,ema"]
    assert main([*map(str, command), "--eval", "echo 1.5", "--json"]) == 0
    assert main(["merge", "--load", str(RUN), "--save", str(out / "more"), "--weights",
                 "0.1,0.2,0.3,0.4"]) == 0  # fmt: skip
    moved = out.rename(tmp_path / "moved")
    (moved / "ema-last3/iter_0000008/wsm_merge.json").write_text("{")
    capsys.readouterr()
    assert main(["list", str(moved), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    merges = {str(Path(m["path"]).relative_to(moved)): m for m in json.loads(last)["merges"]}
    assert set(merges) == {
        f"{name}/iter_0000008" for name in ("mean-last2", "mean-last3", "ema-last2", "ema-last3",
                                            "more")
    }  # fmt: skip
    assert merges["mean-last2/iter_0000008"]["scores"] == {"loss": 1.5}
    assert merges["mean-last2/iter_0000008"]["iterations"] == [6, 8]
    assert merges["more/iter_0000008"]["decay"] is None
    assert merges["more/iter_0000008"]["made"] == "merge"
    assert "damaged" in merges["ema-last3/iter_0000008"]["problem"]
    assert any("loss" in line for line in lines[:1])
    assert main(["list", str(tmp_path / "none")]) == EXIT_USAGE
    assert main(["list", str(RUN)]) == 0
    assert "no merged checkpoint" in capsys.readouterr().out
