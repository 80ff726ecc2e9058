"""``--wsm-merge`` after a restart, with ways to keep main params: the window goes on.

That merges are exact, the run unchanged and a resume in place are rows of the table
(``matrix/table.py``). What CUDA would do is done by stand-ins (``standins/``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron_lm.checkout import Outcome, pretrain
from tests.megatron_lm.matrix.cell import WSM, last_error
from tests.megatron_lm.matrix.kinds import assert_is_merge
from tests.megatron_lm.matrix.table import BY_NAME, TRAIN, Configuration


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("precision-masters", "memory"),
        ("precision-remainders-flat", "disk"),
        ("offload", "disk"),
        ("fp8-weights", "memory"),
        ("muon-layer-wise", "memory"),
    ],
)
def test_the_window_goes_on_after_a_restart(
    megatron: Path, tmp_path: Path, name: str, store: str
) -> None:
    """Refilled by Megatron's own loads, or found on disk to be what was loaded."""
    one, run = BY_NAME[name], tmp_path / "run"
    state = f"--wsm-merge-optimizer-state {one.state} --wsm-merge-store {store}"
    flags = f"{TRAIN} --save {run} --load {run}"
    begun = launch(megatron, one, f"{flags} {WSM} {state} --exit-interval 4")
    if begun.returncode and "is not installed" in begun.log:
        pytest.skip(last_error(begun.log))
    assert begun.returncode == 0, begun.log[-8000:]
    if (plain := launch(megatron, one, f"{flags} --skip-train", plugin=False)).returncode:
        pytest.skip(f"this Megatron-LM does not load its own checkpoints: {last_error(plain.log)}")
    again = launch(megatron, one, f"{flags} {WSM} {state}")
    assert again.returncode == 0, again.log[-8000:]
    assert "window begins with iterations [2, 4]" in again.log
    assert "is not what was loaded" not in again.log and "are not those of" not in again.log
    assert one.kind is not None
    assert_is_merge(run, (4, 6, 8), one.kind)


def launch(megatron: Path, one: Configuration, flags: str, plugin: bool = True) -> Outcome:
    env = dict(one.env) | {"STANDINS": ",".join(one.standins)}
    return pretrain(megatron, f"{one.flags} {flags}", plugin=plugin, env=env, timeout=900)
