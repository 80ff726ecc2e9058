"""The docs as a site, built strict and complete in itself; every ``wsm`` command in them runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from html.parser import HTMLParser
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import runs
from tests.reference import load_tensors
from wsm_megatron.cli.main import COMMANDS, main, parser
from wsm_megatron.plugin.config import WSMConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
MKDOCS = ROOT / "scripts" / "mkdocs.yml"

STARTED = {
    "srun": "needs a Slurm cluster (tests/slurm)",
    "mpirun": "needs an MPI (tests/unit/comm/test_launcher.py)",
    "torchrun": "starts processes of its own (tests/dist)",
}
"""Launchers, and why what they start is parsed only."""
PARSED = {("plot", "trajectory"): "shows a file that a command of another page writes"}
"""Commands that are parsed only, by their first words, and why."""
BEFORE = {
    "export.md": "wsm merge --load RUN --save OUT --last 4",
    "resume.md": "wsm merge --load RUN --save MERGED --last 4 --optimizer-state last",
    "undo.md": "wsm merge --load RUN --save OUT --last 4 --optimizer-state last",
}
"""What a page takes for granted."""
FEWER = {"search": ("--budget", "7")}
"""The same command with less to do."""


@dataclass(frozen=True)
class Shown:
    """A command line as a page shows it.

    Attributes:
        launcher: what starts it, if anything. output: the lines under it, where it has a prompt.
    """

    page: str
    launcher: str | None
    words: tuple[str, ...]
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of every code block of a page, fenced or indented."""
    lines: list[str] = []
    fenced = False
    for line in re.sub(r"\\\n +", " ", text).splitlines():  # a command may go on in the next line
        fence = line.lstrip().startswith("```")
        if not fence and (fenced or line.startswith("    ")):
            lines.append(line if fenced else line[4:])
        elif line.strip() or fence:
            yield lines
            lines = []
        fenced ^= fence
    yield lines


def commands(page: Path) -> list[Shown]:
    """Of a page, in order. ``…`` stands for the options of that command before."""
    found: list[Shown] = []
    for block in blocks(page.read_text()):
        for number, line in enumerate(block):
            start = re.match(r"(\$ )?((srun|mpirun|torchrun|env) .*?)?\bwsm +(?=[a-z])", line)
            if not start:
                continue
            words = shlex.split(re.sub(r"[\[\]]", " ", line[start.end() :]), comments=True)
            output = tuple(block[number + 1 :]) if start[1] else ()
            shown = Shown(page.name, start[3], tuple(words), output)
            found.append(completed(shown, found))
    return found


def completed(shown: Shown, before: list[Shown]) -> Shown:
    if "…" not in shown.words:
        return shown
    same = [one for one in before if one.words[0] == shown.words[0]]
    assumed = ("--load", "RUN", "--save", "OUT", "--last", "4")
    rest = same[-1].words[1:] if same else assumed
    at = shown.words.index("…")
    words = (shown.words[0], *rest, *shown.words[1:at], *shown.words[at + 1 :])
    return Shown(shown.page, shown.launcher, words, shown.output)


def yaml_blocks(page: str) -> list[dict[str, Any]]:
    """Of a page, those that are files for ``--config``."""
    found = []
    for block in blocks((DOCS / page).read_text()):
        if block and block[0].startswith("load:"):
            lines = takewhile(lambda line: not line.startswith("wsm "), block)
            found.append(yaml.safe_load("\n".join(lines)))
    return found


SOURCE = runs.checkpoint(runs.FP32_PARAM, 8)
MAIN = "optimizer.state.fp32_param."


@cache
def mains() -> dict[str, torch.Tensor]:
    """Main params of the checkpoint that all others are made of, by their model tensors."""
    stored = load_tensors(SOURCE).items()
    return {key.removeprefix(MAIN): main for key, main in stored if key.startswith(MAIN)}


def make_run(folder: Path, iterations: Sequence[int], tokens: int, seed: int = 0) -> Path:
    """A run whose checkpoints differ, with main params that are its weights'.

    Args:
        tokens: trained in an iteration, a multiple of 1000.
    """
    for iteration in iterations:
        path = folder / f"iter_{iteration:07d}"
        shutil.copytree(SOURCE, path)
        runs.rewrite(path, partial(scaled, 1 + iteration / 100_000 + seed / 64))
        runs.restate(path, partial(move, iteration, tokens))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iterations[-1]))
    return folder


def scaled(scale: float, key: str, tensor: torch.Tensor) -> torch.Tensor:
    main = mains().get(key.removeprefix(MAIN))
    return tensor if main is None else (main * scale).to(tensor.dtype)


def move(iteration: int, tokens: int, state: dict[str, Any]) -> None:
    state["iteration"] = iteration
    state["args"].seq_length = 1000
    state["args"].consumed_train_samples = iteration * tokens // 1000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: runs, seeds, a released checkpoint, an evaluator, a tokenizer."""
    there = tmp_path_factory.mktemp("world")
    make_run(there / "RUN", range(1000, 13000, 1000), tokens=10**8)
    make_run(there / "demo-out" / "run", range(20, 420, 20), tokens=2000)
    make_run(there / "A", (4000, 8000), tokens=10**8, seed=1)
    for seed, name in enumerate(("B", "SEED1", "SEED2", "SEED3"), 2):
        make_run(there / name, (8000,), tokens=10**8, seed=seed)
    release = make_run(there / "released", (0,), tokens=0, seed=9)
    (release / "iter_0000000").rename(release / "release")
    (release / "latest_checkpointed_iteration.txt").write_text("release")
    (there / "CKPT").symlink_to(there / "RUN" / "iter_0012000")
    score = there / "score.sh"
    score.write_text('#!/bin/sh\ncat "$1"/*.distcp "$1"/*.safetensors | cksum | sed "s/ .*//"\n')
    score.chmod(0o755)
    (there / "TOKENIZER").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (there / "TOKENIZER" / name).write_text(json.dumps(TOKENIZER.get(name, {})))
    return there


WORDS = {f"t{n}": n for n in range(127)}
TOKENIZER: dict[str, Any] = {
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "t0"},
    },
}  # fmt: skip


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one page's own, with the world in it; and no signs of a launcher."""
    for path in world.iterdir():
        if path.name != "demo-out":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "demo-out").mkdir()
    (tmp_path / "demo-out" / "run").symlink_to(world / "demo-out" / "run")
    job, sweep = yaml_blocks("options.md")[0], yaml_blocks("sweep.md")[0]
    job |= {"load": "RUN", "save": "JOB", "window_tokens": "200B", "copy": ["*layernorm*"]}
    sweep |= {"window_tokens": sweep["window_tokens"][:2], "order_seed": sweep["order_seed"][:1]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def write_scores(words: tuple[str, ...]) -> None:
    """The scores that a command is given: of a sweep's merges, or of the run's checkpoints."""
    given = dict(pairwise(words))
    metrics = given.get("--metric", "loss").split(",")
    places = [place for word in words for place in (Path(word), Path(word, "sweep.json"))]
    manifest = next((one for one in places if one.name == "sweep.json" and one.is_file()), None)
    if manifest is not None:
        names = [merge["path"] for merge in json.loads(manifest.read_text())["merges"]]
    else:
        names = [str(int(path.name.removeprefix("iter_"))) for path in Path("RUN").glob("iter_*")]
    head = ["iteration" if manifest is None else "path", *metrics]
    rows = [[name, *(str(1.5 - n / 64) for _ in metrics)] for n, name in enumerate(names)]
    Path(given["--scores"]).write_text("\n".join(",".join(row) for row in [head, *rows]) + "\n")


def make_room(root: Path) -> None:
    """Pages show alternatives: of the merges that they make in one place, none is in the way."""
    for path in root.glob("iter_*"):
        shutil.rmtree(path)


@pytest.mark.parametrize("page", [*filter(commands, PAGES)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = commands(page)
    if any(one.launcher not in STARTED for one in shown) and page.name in BEFORE:
        assert main(shlex.split(BEFORE[page.name])[1:]) == 0
    for one in shown:
        assert one.words[0] in COMMANDS, one
        if one.launcher in STARTED or one.words[:2] in PARSED:
            parser(one.words).parse_args(one.words)
            continue
        if one.words[0] == "search":
            pytest.importorskip("scipy")
        if "--scores" in one.words:
            write_scores(one.words)
        if one.words[0] in ("merge", "rescue") and "--save" in one.words:
            make_room(Path(one.words[one.words.index("--save") + 1]))
        capsys.readouterr()
        assert main([*one.words, *FEWER.get(one.words[0], ())]) == 0, one
        if one.output and "…" not in "".join(one.output):
            assert capsys.readouterr().out.split() == " ".join(one.output).split(), one


def test_commands_are_found_in_any_block() -> None:
    """Else nothing above is tested."""
    found = {page.name: len(commands(page)) for page in PAGES}
    assert found["README.md"] > 8 and found["cookbook.md"] > 8 and found["sweep.md"] > 8
    words = {word for page in PAGES for one in commands(page) for word in one.words}
    assert words >= {"--local-ranks", "--node-local", "--sliding-every", "--order", "--eval"}


def test_flags_of_the_plugin_exist() -> None:
    known = {"--wsm-merge", "--wsm-merge-config"}
    known |= {f"--wsm-merge-{one.name.replace('_', '-')}" for one in WSMConfig.options()}
    named = {
        flag.rstrip("-")
        for page in PAGES
        for flag in re.findall(r"--wsm-merge[a-z-]*(?![a-z*…-])", page.read_text())
    }
    assert named and named <= known | {"--wsm-merge"}, named - known


class Links(HTMLParser):
    """What a browser loads for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(str(given["src"]))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(str(given.get("href")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strict: a dead link, anchor or page outside of the navigation ends it."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(MKDOCS), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    built = {path.stem for path in site.glob("*.html")} - {"404"}
    copied = {path.stem for path in DOCS.glob("*.html")}
    assert built - copied == {path.stem for path in DOCS.glob("*.md")}


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        links = Links()
        links.feed(page.read_text())
        assert links.loaded or (DOCS / page.name).exists(), page
        for link in links.loaded:
            assert not re.match(r"(https?:)?//", link), f"{page.name}: {link}"
            assert page.name == "404.html" or (site / link.split("?")[0]).exists(), link
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet
