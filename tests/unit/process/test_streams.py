"""The exit status says what happened, whatever standard output and error are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron.cli import main, verify
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE

WSM = f"{sys.executable} -m wsm_megatron"
CLOSED = ">&- 2>&- <&-"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, which ends with the status of the first command in it that fails."""
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


FULL = ">/dev/full 2>/dev/full"


@pytest.mark.parametrize(
    "how",
    [CLOSED, f"--local-ranks 2 {CLOSED}", f"--local-ranks 2 {FULL}", "2>&1 | true", "1</dev/null"],
)
def test_a_merge_that_cannot_say_so_is_done(tmp_path: Path, how: str) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    (runs.checkpoint(run, 2) / "metadata.json").unlink()  # something to warn about
    done = shell(f"{WSM} merge --load {run} --save {tmp_path}/out --json -v {how}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert main.main(["verify", f"{tmp_path}/out/iter_0000008", "--sources"]) == 0


@pytest.mark.parametrize("how", [CLOSED, f"--local-ranks 2 {FULL}"])
def test_a_merge_that_fails_has_failed(tmp_path: Path, how: str) -> None:
    command = f"{WSM} merge --load {RUNS / runs.DENSE} --save {tmp_path}/out --last 9 {how}"
    assert shell(command).returncode == EXIT_USAGE


def test_a_report_that_is_lost_is_regretted(tmp_path: Path) -> None:
    command = f"{WSM} merge --load {RUNS / runs.DENSE} --save {tmp_path}/out >/dev/full"
    done = shell(command)
    assert done.returncode == 0
    assert done.stderr == (
        "wsm merge: it is done, but standard output cannot be written: No space left on device\n"
    )


@pytest.mark.parametrize("what", ["coefficients --num 20000", "coefficients --num 3"])
def test_what_only_shows_fails_where_it_cannot(what: str) -> None:
    done = shell(f"{WSM} {what} >/dev/full")
    assert done.returncode == EXIT_FAILED
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_had_enough_is_no_failure() -> None:
    done = shell(f"{WSM} coefficients --num 20000 | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from wsm_megatron.process.streams import open_streams\n"
        "open_streams()\n"
        f"with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    for number in (1, 2):\n"
        "        os.write(number, b'a warning')\n"
        "    print('a line', flush=True)\n"
        "    print('a line', file=sys.stderr, flush=True)\n"
        "    sys.exit(file.fileno())\n"
    )
    for closed in (">&-", "2>&-", "<&-", CLOSED):
        done = shell(f"{sys.executable} {script} {closed}")
        assert done.returncode > 2, done.stderr
        assert (tmp_path / "file").read_text() == ""


def test_names_that_are_no_text_are_shown(tmp_path: Path) -> None:
    done = shell(
        f"PYTHONIOENCODING=ascii {WSM} plan --load {RUNS / runs.DENSE} --save {tmp_path}/öff"
    )
    assert done.returncode == 0, done.stderr
    assert "would write" in done.stdout


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", interrupted)
    assert main.main(["verify", "somewhere"]) == 130
    assert capsys.readouterr().err == "wsm verify: stopped by SIGINT\n"
