"""What a user finds out at the shell: examples and completion."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from wsm_megatron.cli.examples import EXAMPLES
from wsm_megatron.cli.main import COMMANDS, main, parser


@pytest.mark.parametrize("command", sorted({*COMMANDS, *EXAMPLES}))
def test_every_help_ends_in_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert capsys.readouterr().out.endswith(f"example:\n  {EXAMPLES[command]}\n")
    wsm, *words = shlex.split(EXAMPLES[command])
    assert wsm == "wsm" and parser(words).parse_args(words).command == command.split()[0]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("wsm coe", ["coefficients "]), ("wsm merge --optimizer-s", ["--optimizer-state "])],
)
def test_the_shell_is_told_how_a_line_goes_on(line: str, wanted: list[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "wsm_megatron"], env=os.environ | asked, check=True)
    assert answer.read_text().split("\n") == wanted
