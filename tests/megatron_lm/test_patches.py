"""The patches apply to the checkout they are made for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PATCHES = Path(__file__).resolve().parents[2] / "patches" / "megatron-lm"


def test_one_of_the_patches_applies_and_installs(tmp_path: Path) -> None:
    shutil.copy(Path(os.environ["MEGATRON_LM_DIR"]) / "pretrain_gpt.py", tmp_path)
    patches = sorted(PATCHES.glob("*/*.patch"))
    assert [p.parent.name for p in patches] == ["core_v0.16.1", "main"]
    applied = [p for p in patches if _git_apply(p, tmp_path, "--check") == 0]
    assert len(applied) >= 1, "made for another version of Megatron-LM"
    assert _git_apply(applied[0], tmp_path) == 0
    main = (tmp_path / "pretrain_gpt.py").read_text().split('if __name__ == "__main__":')[1]
    lines = [line.strip() for line in main.splitlines() if line.strip()]
    assert lines[:2] == ["import wsm_megatron", "wsm_megatron.install()"]
    compile((tmp_path / "pretrain_gpt.py").read_text(), "pretrain_gpt.py", "exec")


def _git_apply(patch: Path, folder: Path, *flags: str) -> int:
    # Outside a repository, or git would look for the file in that repository.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *flags, str(patch)]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode
