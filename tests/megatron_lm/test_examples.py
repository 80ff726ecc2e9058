"""The launch scripts in examples/ give flags that this Megatron-LM and the plugin know."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron_lm.checkout import REPOSITORY, SITE

PARSE = """
import argparse, sys
import wsm_megatron
wsm_megatron.install()
from megatron.training import arguments
from wsm_megatron.plugin.arguments import config_from_args
parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
args = parser.parse_args(sys.argv[1:])
print(config_from_args(args), args.log_interval)
"""


@pytest.mark.parametrize("script", ["pretrain_gpt_wsm.sh", "pretrain_gpt_moe_wsm.sh"])
def test_every_flag_is_known(megatron: Path, script: str) -> None:
    settings = {"MEGATRON_LM": str(megatron), "DATA_PATH": "/data/text", "SAVE": "/runs/a"}
    settings |= {"DRY_RUN": "1", "WSM_NUM": "5", "WSM_STORE": "disk", "WSM_DIR": "/local"}
    printed = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / script), "--log-interval", "7"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = shlex.split(printed)
    flags = command[command.index(str(megatron / "pretrain_gpt.py")) + 1 :]
    paths = [SITE, REPOSITORY, megatron, os.environ.get("PYTHONPATH", "")]
    parsed = subprocess.run(
        [sys.executable, "-c", PARSE, *flags],
        env=os.environ
        | {"MEGATRON_LM_ON_CPU": "1", "RANK": "0", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert parsed.returncode == 0, parsed.stderr[-3000:]
    assert "num=(5,)" in parsed.stdout and "dir=PosixPath('/local')" in parsed.stdout
    assert parsed.stdout.strip().endswith("7")
