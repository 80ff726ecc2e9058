"""The command line: every command, what it prints, its JSON, its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import __version__, coefficients
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE


@pytest.fixture
def wsm(capsys):
    """Run a command that must succeed; its output lines."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return run


def test_coefficients_of_the_papers_ema(wsm):
    lines = wsm("coefficients", "--decay", "ema", "--num", "10", "--json")
    data = json.loads(lines[-1])
    assert list(data) == ["positions", "coefficients", "effective_lr"]
    paper = [0.126, 0.033, 0.041, 0.052, 0.065, 0.082, 0.103, 0.130, 0.163, 0.206]
    assert data["coefficients"] == pytest.approx(paper, abs=5e-4)
    assert len(data["effective_lr"]) == 9
    assert data["positions"] == list(range(1, 11))


def test_coefficients_of_positions_and_of_a_run(wsm):
    given = json.loads(wsm("coefficients", "--positions", "1000,2000,4000", "--json")[-1])
    assert given["coefficients"] == list(coefficients([1000, 2000, 4000], "linear"))
    run = json.loads(wsm("coefficients", "--load", RUNS / runs.DENSE, "--last", "3", "--json")[-1])
    assert run["positions"] == [4 * 128, 6 * 128, 8 * 128]  # tokens
    weights = json.loads(wsm("coefficients", "--num", "2", "--weights", "0.4,0.6", "--json")[-1])
    assert weights["coefficients"] == [0.4, 0.6] and weights["effective_lr"] == [0.6]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--num", "1"], "at least two"),
        (["--positions", "3,2,1"], "must increase"),
        (["--num", "4", "--last", "2"], "give --load"),
    ],
)
def test_bad_coefficients(arguments, words, capsys):
    assert main(["coefficients", *arguments]) == EXIT_USAGE
    assert words in capsys.readouterr().err


def test_plan_says_everything_and_writes_nothing(wsm, tmp_path):
    out = tmp_path / "out"
    lines = wsm("plan", "--load", RUNS / runs.MOE, "--save", out, "--json")
    text, data = "\n".join(lines), json.loads(lines[-1])
    assert f"would write {out}/iter_0000008" in text
    assert "left out" in text and "optimizer.distributed" in text
    assert data["iterations"] == [2, 4, 6, 8]
    assert data["tensors"]["decoder.layers.mlp.router.expert_bias"] == "merged"
    assert not out.exists()
    done = json.loads(wsm("merge", "--load", RUNS / runs.MOE, "--save", out, "--json")[-1])
    assert done["bytes_read"] == data["bytes_to_read"]


def test_plan_and_merge_agree_on_the_tensors(wsm, tmp_path):
    options = ["--load", RUNS / runs.FULLY, "--save", tmp_path / "out"]
    options += ["--optimizer-state", "last", "--json"]
    planned = json.loads(wsm("plan", *options)[-1])
    merged = json.loads(wsm("merge", *options)[-1])
    assert merged["output"] == planned["output"]
    assert merged["coefficients"] == planned["coefficients"]
    entries = json.loads(wsm("inspect", merged["output"], "--json")[-1])["entries"]
    kept = {key for key, entry in entries.items() if entry["dtype"] != "bytes"}
    mains = {key for key in kept if ".state.param." in key}
    assert set(planned["tensors"]) == kept - mains


def test_merge_prints_a_table_and_json(wsm, tmp_path):
    lines = wsm("merge", "--load", RUNS / runs.DENSE, "--save", tmp_path / "out", "--json")
    data = json.loads(lines[-1])
    assert {
        "output",
        "iterations",
        "coefficients",
        "bytes_read",
        "bytes_written",
        "seconds",
    } <= set(data)
    assert data["iterations"] == [2, 4, 6, 8] and sum(data["coefficients"]) == pytest.approx(1)
    output = tmp_path / "out" / "iter_0000008"
    assert f"merged checkpoint: {output} (4 checkpoints, 2 to 8, linear)" in lines
    assert sum("0.250000" in line for line in lines) == 4


def test_many_merges_are_a_line_each(wsm, tmp_path):
    options = ["--load", RUNS / runs.DENSE, "--decay", "mean,ema,cosine", "--last", "2"]
    quiet = wsm("merge", *options, "--save", tmp_path / "out")
    assert sum("merged checkpoint:" in line for line in quiet) == 3
    assert not any("effective LR" in line for line in quiet) and len(quiet) < 20
    told = wsm("merge", *options, "--save", tmp_path / "again", "-v")
    assert sum("effective LR" in line for line in told) == 3


def test_a_plan_groups_what_is_alike(wsm, tmp_path):
    options = ["plan", "--load", RUNS / runs.DENSE, "--save", tmp_path / "out"]
    quiet, told = wsm(*options), wsm(*options, "-v")
    (line,) = (line for line in quiet if line.startswith("  model: merged"))
    assert "entries" in line and "-v lists them" in line
    assert sum(line.startswith("  model: merged") for line in told) == int(line.split()[2])


def test_decays_side_by_side(wsm):
    lines = wsm("coefficients", "--num", "4", "--decay", "mean,ema", "--json")
    data = json.loads(lines[-1])["decays"]
    assert list(data) == ["mean", "ema"] and data["mean"]["coefficients"] == [0.25] * 4
    assert data["ema"]["coefficients"] == list(coefficients([1, 2, 3, 4], "ema"))
    assert lines[0].split() == ["iterations", "mean", "ema"] and len(lines) == 6
    of_run = wsm("coefficients", "--load", RUNS / runs.DENSE, "--decay", "mean,ema", "--json")
    assert json.loads(of_run[-1])["unit"] == "tokens"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["coefficients", "--num", "3"]])
def test_what_needs_no_torch_does_not_import_it(arguments):
    script = "import sys; sys.modules['torch'] = None; from wsm_megatron.__main__ import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_inspect_a_run_and_a_checkpoint(wsm, tmp_path):
    run = runs.copy_run(runs.FLAT, tmp_path / "run")
    (runs.checkpoint(run, 6) / "metadata.json").unlink()
    lines = wsm("inspect", run, "--json")
    assert any("unfinished" in line for line in lines)
    data = json.loads(lines[-1])
    assert data["unfinished"] == [6] and data["tracker"] == "8"
    assert data["checkpoints"][0] == {
        "iteration": 2,
        "tokens": 256,
        "merged": False,
        "lr": 1e-3,
        "marks": [],
    }
    lines = wsm("inspect", runs.checkpoint(run, 8), "--entries", "--json")
    data = json.loads(lines[-1])
    assert data["iteration"] == 8 and data["tokens"] == 1024
    entry = data["entries"]["embedding.word_embeddings.weight"]
    assert entry == {"role": "model", "dtype": "bfloat16", "shape": [128, 32], "bytes": 8192}
    assert any("embedding.word_embeddings.weight bfloat16 [128, 32]" in line for line in lines)
    wsm("merge", "--load", run, "--save", tmp_path / "out")
    assert any("2, 4, 8" in line for line in wsm("inspect", tmp_path / "out" / "iter_0000008"))


def test_version_and_help(capsys):
    for arguments in (["--help"], ["merge", "--help"], ["verify", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    assert "--optimizer-state" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"wsm_megatron {__version__}\n"


def test_the_offline_merge_needs_no_megatron(tmp_path):
    """In a process where importing megatron fails, through ``python -m`` machinery."""
    script = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("megatron", "transformer_engine", "apex", "triton"):
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocker())
        from wsm_megatron.cli.main import main

        for run in ({runs.FULLY!r}, {runs.MAIN!r}, {runs.MOE!r}):
            out = {str(tmp_path)!r} + "/" + run
            options = ["--load", {str(RUNS)!r} + "/" + run, "--save", out]
            assert main(["merge", *options, "--optimizer-state", "last"]) == 0
            assert main(["verify", out + "/iter_0000008", "--sources"]) == 0
        assert not [name for name in sys.modules if name.partition(".")[0] == "megatron"]
        print("merged without megatron")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("merged without megatron\n")


def test_python_dash_m_and_exit_status(tmp_path):
    command = [sys.executable, "-m", "wsm_megatron", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == EXIT_USAGE
    assert "no iter_XXXXXXX" in done.stderr and "Traceback" not in done.stderr


def test_plan_of_a_node_local_merge(wsm, tmp_path):
    arguments = ["--load", RUNS / runs.DENSE, "--save", tmp_path / "out", "--json"]
    plain = json.loads(wsm("plan", *arguments)[-1])
    del plain["windows"]  # a rank that sees some files does not know what others have
    *lines, last = wsm("plan", *arguments, "--node-local")
    assert "sums of 0 B would go from rank to rank" in lines
    assert json.loads(last) == plain
    assert not (tmp_path / "out").exists()


def test_a_rerun_says_what_was_there(wsm, tmp_path):
    arguments = ["merge", "--load", RUNS / runs.DENSE, "--save", tmp_path / "out"]
    wsm(*arguments, "--decay", "mean,ema")
    again = wsm(*arguments, "--decay", "mean,ema")
    assert len(again) == 1 and again[0].startswith("nothing to do: these 2 merges are there")
    lines = wsm(*arguments, "--decay", "ema,cosine")
    told = [line.split(" (")[0] for line in lines if "iter_0000008" in line]
    places = [str(tmp_path / "out" / name / "iter_0000008") for name in ("ema", "cosine")]
    assert told == [f"there already: {places[0]}", f"merged checkpoint: {places[1]}"]
