"""One option system: flags, ``--config`` files, checks, old names, help, the reference."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, UsageError, merge, verify
from wsm_megatron.cli.main import main
from wsm_megatron.cli.merge import JOB_OPTIONS
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.options import read_yaml
from wsm_megatron.planning.prepare import prepare_job
from wsm_megatron.planning.provenance import read_provenance
from wsm_megatron.planning.staging_key import merge_digest

ROOT = Path(__file__).parents[2]

RECORDED = [
    "iterations",
    "from_",
    "to",
    "last",
    "window_iterations",
    "window_tokens",
    "every",
    "sliding_every",
    "decay",
    "min_decay",
    "weights",
    "allow_unnormalized",
    "optimizer_state",
    "mains_from_model",
    "buffers",
    "dtype",
    "format",
    "output_iteration",
    "copy",
    "drop",
    "allow_nonfinite",
    "allow_lr_decay",
]
"""Names and order in ``wsm_merge.json``, which merges of earlier versions have too."""
WHERE_SET = {"min_interval": 2, "min_checkpoints": 2, "order": "scrambled", "order_seed": 3}
"""Recorded after these where they are given."""


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> dict[str, Any]:
    return read_yaml(job_file(folder, text), JOB_OPTIONS, "--config").values


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """The plan of a merge, by the text of its file and by its flags; without the windows that a
    run affords, which are measured."""

    def plan(text: str, *flags: str) -> dict[str, Any]:
        places = f"load: {RUNS / runs.DENSE}\nsave: {tmp_path / 'out'}\n"
        file = str(job_file(tmp_path, places + text))
        assert main(["plan", "--config", file, "--json", *flags]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        said.pop("windows", None)  # of this machine too: free space and memory change
        return said

    return plan


def refusal(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    assert main([command, *arguments]) == EXIT_USAGE
    return capsys.readouterr().err


def test_a_file_says_what_the_flags_would(planned: Any) -> None:
    of_file = planned("last: 3\ndecay: 1-sqrt\noptimizer-state: drop\n")
    of_flags = planned("", "--last", "3", "--decay", "1-sqrt")
    assert of_file == of_flags and of_file["iterations"] == [4, 6, 8]
    assert planned("weights: [1/4, 75%]\nlast: 2")["coefficients"] == [0.25, 0.75]
    assert planned("from: 4\nto: 8")["iterations"] == [4, 6, 8]


def test_flags_win_over_the_file(planned: Any) -> None:
    assert planned("last: 3\n", "--last", "2")["iterations"] == [6, 8]
    assert planned("last: 3\ndecay: ema", "--decay", "mean")["coefficients"] == [1 / 3] * 3


def test_a_file_may_give_all_that_merge_needs(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    text = f"load: {RUNS / runs.DENSE}\nsave: {out}\nthreads: 1\nlog_json: {log}\nlocal_ranks: 2\n"
    assert main(["merge", "--config", str(job_file(tmp_path, text))]) == 0
    started = json.loads(log.read_text().splitlines()[0])
    assert started["ranks"] == 2 and started["options"]["threads"] == 1
    assert (out / "iter_0000008" / "wsm_merge.json").exists()


def test_without_load_and_save_there_is_no_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --load and --save" in refusal(capsys, "merge")
    file = str(job_file(tmp_path, "load: run"))
    assert "give --save, as flags or in the file" in refusal(capsys, "plan", "--config", file)


def test_values_in_a_file_are_written_as_after_the_flags(tmp_path: Path) -> None:
    text = """
        window_tokens: 1e9, 2B
        window-iterations: [1_000, 20k]
        format: 0.19
        memory: 256MiB
        copy: "*bias*"
        drop: [a, "b,c"]
        allow_nonfinite: yes
        node_local: false
        to: 010
        log_json: null
    """
    assert read(tmp_path, text) == {
        "window_tokens": (10**9, 2 * 10**9),
        "window_iterations": (1000, 20_000),
        "format": "0.19",
        "memory": 2**28,
        "copy": ("*bias*",),
        "drop": ("a", "b,c"),
        "allow_nonfinite": True,
        "node_local": False,
        "to": 10,
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("lst: 3", "there is no option lst; did you mean last?"),
        ("direct_io: true", "there is no option direct_io; did you mean "),
        ("Decay: ema", "there is no option Decay; did you mean decay?"),
        ("last: many", "last: 'many' is not a whole number"),
        ("last: 2.5", "last: '2.5' is not a whole number"),
        ("last: [2, 4]", "last: must be a whole number, not a list"),
        ("iterations: [2, x]", "iterations: 'x' is not a whole number"),
        ("iterations: {a: 2}", "iterations: must be a whole number, or a list of them, not a map"),
        ("memory: lots", "memory: 'lots' is not a size"),
        ("threads: 0", "threads: must be at least 1, not 0"),
        ("retries: -1", "retries: must be at least 0, not -1"),
        ("dtype: int8", "dtype: 'int8' is not one of same, bf16, fp16, fp32"),
        ("allow-nonfinite: 1", "allow-nonfinite: '1' is neither true nor false"),
        ("load: s3://b/run", "load: s3://b/run is an address"),
        ("last: 2\nlast: 3", "last: last is given twice"),
        ("window_tokens: 2\nwindow-tokens: 3", "window-tokens: window_tokens is given twice"),
        ("node_local: yes\nsource_parallel: yes", "source_parallel: node_local is given twice"),
        ("", "expected a mapping"),
        ("- last", "expected a mapping"),
        ("last: [", "expected the node content"),
        ("last: 2\n---\nlast: 3", "expected a single document"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"--config {tmp_path / 'job.yaml'}: ") and words in message
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "merge", "--config", str(tmp_path / "none.yaml"))
    assert f"--config {tmp_path}/none.yaml: " in message and "No such file" in message


@pytest.mark.parametrize(
    "options, words",
    [
        ({"last": "8"}, "--last must be a whole number, not '8'"),
        ({"last": 8.0}, "--last must be a whole number, not 8.0"),
        ({"last": True}, "--last must be a whole number, not True"),
        ({"from_": "2"}, "--from must be a whole number"),
        ({"iterations": (2, "4")}, "--iterations must be a whole number, not '4'"),
        ({"buffers": "none"}, "--buffers must be one of merge, last, not 'none'"),
        ({"allow_nonfinite": 1}, "--allow-nonfinite must be true or false, not 1"),
        ({"min_decay": None}, "--min-decay must be a number, not None"),
        ({"output_iteration": -1}, "--output-iteration must be at least 0, not -1"),
        ({"decay": 1}, "--decay must be text, not 1"),
        ({"save": 1}, "--save must be a path, not 1"),
    ],
)
def test_values_from_python_are_checked_too(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MergeConfig(**{"load": "run", "save": "out", **options})


def test_one_of_several_may_stand_alone() -> None:
    config = MergeConfig(load="run", save="out", window_iterations=4, copy="*bias*", drop=["a"])
    assert (config.window_iterations, config.copy, config.drop) == ((4,), ("*bias*",), ("a",))
    assert config.load == Path("run")


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5])
def test_how_a_job_runs_is_checked(threads: Any) -> None:
    with pytest.raises(UsageError, match="--threads must be"):
        ExecutionOptions(threads=threads)


def test_the_provenance_holds_what_is_merged_and_nothing_of_how_the_job_ran(
    tmp_path: Path,
) -> None:
    config = MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out", last=2, copy=("x*",))
    options = config.recorded()
    assert list(options) == RECORDED
    names = {one.name for one in fields(MergeConfig)}
    assert {"mains_from_model"} | names == {
        "load", "source", "save", "rebuild_main_params", "normalize", *WHERE_SET, *options
    }  # fmt: skip
    later = replace(config, **WHERE_SET).recorded()
    assert set(later) - set(options) == set(WHERE_SET)
    assert replace(config, weights=(1.0, 2.0), normalize=True).recorded()["normalize"] is True
    assert not set(options) & {one.name for one in fields(ExecutionOptions)}
    config = replace(config, copy=())
    output = merge(config, ExecutionOptions(threads=1, retries=0, device="cpu")).output
    provenance = read_provenance(output)
    assert provenance is not None and provenance["options"] == config.recorded()
    assert MergeConfig.of_record(provenance["options"]) == replace(
        config, load="sources", save="merged"
    )


def test_how_the_job_runs_changes_no_digest(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.FULLY, save=tmp_path, optimizer_state="last")
    execution = ExecutionOptions(threads=7, memory=2**24, retries=9, log_json=tmp_path / "log")
    jobs = [prepare_job(config), prepare_job(config, execution)]
    assert jobs[1].execution == execution and jobs[1].config == config
    assert len({merge_digest(job, job.outputs[0]) for job in jobs}) == 1


def test_the_record_keeps_the_first_name_of_an_option_and_either_is_read(tmp_path: Path) -> None:
    config = MergeConfig(
        load=RUNS / runs.WRONG_MAINS,
        save=tmp_path,
        optimizer_state="last",
        rebuild_main_params=True,
    )
    output = merge(config).output
    provenance = read_provenance(output)
    assert provenance is not None and provenance["options"]["mains_from_model"] is True
    assert verify(output, sources=True).recomputed == "sample"
    options = dict(provenance["options"])
    options["rebuild_main_params"] = options.pop("mains_from_model")
    assert MergeConfig.of_record(options).rebuild_main_params


def test_a_record_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="another version, with options not known here: later$"):
        MergeConfig.of_record({"decay": "mean", "later": 1})


OLD = [("--source-parallel", "--node-local"), ("--mains-from-model", "--rebuild-main-params")]


@pytest.mark.parametrize("old, new", OLD)
@pytest.mark.parametrize("in_file", [False, True])
def test_an_old_name_is_understood_with_one_notice(
    planned: Any, caplog: pytest.LogCaptureFixture, old: str, new: str, in_file: bool
) -> None:
    text = "optimizer_state: last\n" if "mains" in old else ""
    load = ["--load", str(RUNS / runs.FULLY)]
    expected = planned(text, new, *load)
    assert not caplog.records
    key = old.removeprefix("--").replace("-", "_")
    found = planned(f"{text}{key}: true\n", *load) if in_file else planned(text, old, *load)
    assert found == expected
    (notice,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert notice.getMessage() == f"{old} is now {new}; the old name goes with the next release"


def test_an_old_name_is_told_once_for_all_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wsm_megatron", "merge", "--load", str(RUNS / runs.DENSE)]
    command += ["--save", str(tmp_path), "--local-ranks", "2", "--source-parallel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--source-parallel is now --node-local") == 1


def test_options_of_local_ranks_are_refused_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--load", "run", "--save", str(tmp_path), "--local-ranks", "3", "--threads", "0"]
    assert main(["merge", *arguments]) == EXIT_USAGE
    assert capfd.readouterr().err.count("--threads must be at least 1, not 0") == 1


COMMANDS = ["", "merge", "plan", "coefficients", "inspect", "verify", "resume-check", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_renders(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"] if command else ["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: wsm {command}".strip() in shown
    assert not any(old in shown for old, _ in OLD)
    if command in ("merge", "plan"):
        for one in JOB_OPTIONS:
            assert one.flag in shown or one.name == "local_ranks"


def test_the_reference_in_the_docs_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "options_page.py")]
    page = subprocess.check_output(command, text=True, cwd=ROOT)
    assert page == (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), (
        "python scripts/options_page.py > docs/options.md"
    )
