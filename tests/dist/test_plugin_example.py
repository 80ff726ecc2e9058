"""examples/custom_loop.py prints what it says it does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_custom_loop(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.custom_loop", str(tmp_path)]
    output = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    losses = re.findall(r"iteration +(\d+): trained ([\d.]+), merged ([\d.]+) of (.+)", output)
    assert [(i, sources) for i, _, _, sources in losses] == [
        ("80", "[20, 40, 60, 80]"),
        ("160", "[100, 120, 140, 160]"),
    ]
    for _, trained, merged, _ in losses:
        assert float(merged) < float(trained), output
    assert "bit for bit: True" in output
    assert (tmp_path / "merged" / "iter_0000160" / "metadata.json").exists()
