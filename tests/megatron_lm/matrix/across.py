"""Merges of one version's runs, resumed by another version."""

from __future__ import annotations

from pathlib import Path

from tests.megatron_lm.checkout import Outcome
from tests.megatron_lm.matrix.cell import (
    CANNOT_RUN,
    FAILED,
    WINDOW,
    Launch,
    Result,
    assert_nothing_moved,
    checked,
    last_error,
    launch_flags,
    resume_flags,
)
from tests.megatron_lm.matrix.promises import DECAY
from tests.megatron_lm.matrix.table import VERSIONS, Configuration, Version
from wsm_megatron import MergeConfig, merge

_NAMES = [version.name for version in VERSIONS]


def train(
    version: Version, configuration: Configuration, megatron: Path, run: Path, launch: Launch
) -> Outcome:
    """A run without the plugin, for others to resume from the merge of."""
    flags = launch_flags(version, configuration, megatron)
    return launch(
        f"{flags} {configuration.train} --save {run}", plugin=False, nproc=configuration.nproc
    )


def resume(
    version: Version,
    configuration: Configuration,
    megatron: Path,
    run: Path,
    folder: Path,
    launch: Launch,
) -> Result:
    """The merge of another version's ``run``, resumed by ``version`` with LR 0."""
    if not (run / "latest_checkpointed_iteration.txt").exists():
        return Result(CANNOT_RUN, "the run did not train")

    flags = f"{launch_flags(version, configuration, megatron)} "
    flags += resume_flags(configuration, WINDOW[-1])

    def check() -> None:
        root, after = folder / "merged", folder / "after"
        merge(
            MergeConfig(
                load=run,
                save=root,
                last=3,
                decay=DECAY,
                optimizer_state="last",
                format="0.16" if _NAMES.index(version.name) < _NAMES.index("0.19.0") else "same",
            )
        )
        saving = f"--load {root} --save {after} --save-interval 1"
        outcome = launch(f"{flags} {saving}", plugin=False, nproc=configuration.nproc)
        assert outcome.returncode == 0, last_error(outcome.log)
        assert_nothing_moved(root, after)

    found = checked(check)
    if found.status == FAILED:
        own = launch(f"{flags} --load {run}", plugin=False, nproc=configuration.nproc)
        if own.returncode:
            reason = f"loads no checkpoint of that run either: {last_error(own.log)}"
            return Result(CANNOT_RUN, reason)
    return found
