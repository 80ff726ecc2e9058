"""Values of the user's own classes in the common state: inert, and left out of what is written."""

from __future__ import annotations

import argparse
import dataclasses
import decimal
import enum
import functools
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import runs
from tests.reference import load_tensors, same_bits
from wsm_megatron.checkpoint.common_state import attributes, load_common, read_common
from wsm_megatron.cli.main import main
from wsm_megatron.safe_pickle.opaque import references


class Mode(enum.Enum):
    FAST = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 2
    names: tuple[str, ...] = ("a",)


class Arguments(argparse.Namespace):
    pass


@pytest.fixture
def of_a_project() -> Iterator[None]:
    """The classes belong to a module that is gone when the checkpoint is read."""
    module = types.ModuleType("their_project")
    for one in (Mode, Settings, Arguments):
        one.__module__ = "their_project"
        setattr(module, one.__name__, one)
    sys.modules["their_project"] = module
    yield
    sys.modules.pop("their_project", None)


FOREIGN: dict[str, Any] = {
    "mode": Mode.FAST,
    "settings": Settings(),
    "nested": {"deep": [(Mode.FAST,)]},
    "as_key": {Mode.FAST: 1, Settings(): 2},
    "partial": functools.partial(int, base=2),
    "function": functools.reduce,
    "price": decimal.Decimal("1.5"),
    "kind": np.int64,
}
KEPT: dict[str, Any] = {"numpy": np.int64(7), "real": np.float32(0.5), "seed_": 3}


def change_common(run: Path, change: Any) -> None:
    for iteration in runs.ITERATIONS:
        path = runs.checkpoint(run, iteration) / "common.pt"
        state = common_of(path.parent)
        args = {k: v for k, v in vars(state["args"]).items() if not list(references(v))}
        state["args"] = argparse.Namespace(**args)  # without Megatron's enums
        change(state)
        torch.save(state, path)


def common_of(path: Path) -> dict[str, Any]:
    return load_common(*read_common(path))


@pytest.mark.usefixtures("of_a_project")
def test_they_are_left_out_of_args_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    change_common(run, lambda state: vars(state["args"]).update(FOREIGN | KEPT))
    del sys.modules["their_project"]
    newest = runs.checkpoint(run, 8)
    for command in (["inspect", run], ["inspect", newest], ["verify", newest]):
        assert main([str(word) for word in command]) == 0
    save = ["--load", str(run), "--save", str(tmp_path / "out"), "--optimizer-state", "last"]
    assert main(["plan", *save]) == 0
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert main(["merge", *save]) == 0
    output = tmp_path / "out" / newest.name
    args = attributes(common_of(output)["args"])
    assert not FOREIGN.keys() & args.keys()
    assert KEPT.keys() <= args.keys()
    (warning,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert all(f"args.{name} (" in warning for name in FOREIGN)
    assert "args.mode (their_project.Mode)" in warning and "decimal.Decimal" in warning
    assert main(["verify", "--sources", str(output)]) == 0
    assert main(["resume-check", str(output)]) == 0
    assert "their_project" not in sys.modules
    loaded = torch.load(output / "common.pt", weights_only=False)
    assert loaded["args"].numpy == 7 and type(loaded["args"].numpy) is np.int64
    straight = tmp_path / "straight"
    command = ["merge", "--load", str(runs.RUNS / runs.FULLY), "--save", str(straight)]
    assert main([*command, "--optimizer-state", "last"]) == 0
    expected = load_tensors(straight / newest.name)
    for key, tensor in load_tensors(output).items():
        assert same_bits(tensor, expected[key]), key
    capsys.readouterr()


@pytest.mark.usefixtures("of_a_project")
def test_args_of_a_class_of_their_own_become_a_namespace(tmp_path: Path) -> None:
    run = runs.copy_run(runs.DENSE, tmp_path / "run")

    def change(state: dict[str, Any]) -> None:
        state["args"] = Arguments(**vars(state["args"]), mode=Mode.FAST)
        state["theirs"] = {"mode": Mode.FAST}

    change_common(run, change)
    before = attributes(common_of(runs.checkpoint(run, 8))["args"])
    del before["mode"]
    assert main(["merge", "--load", str(run), "--save", str(tmp_path / "out")]) == 0
    state = common_of(tmp_path / "out" / "iter_0000008")
    assert type(state["args"]) is argparse.Namespace
    changed = {"iteration": 8, "no_save_optim": True, "no_save_rng": True}
    assert vars(state["args"]) == before | changed
    assert "theirs" not in state


@pytest.mark.usefixtures("of_a_project")
def test_they_are_refused_in_optimizer_state_that_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    change_common(run, lambda state: state["opt_param_scheduler"].update(mode=Mode.FAST))
    save = ["--load", str(run), "--save", str(tmp_path / "out")]
    assert main(["merge", *save, "--optimizer-state", "last"]) == 1
    message = capsys.readouterr().err
    assert "opt_param_scheduler refers to their_project.Mode" in message
    assert "--optimizer-state drop" in message and not (tmp_path / "out").exists()
    assert main(["merge", *save, "--optimizer-state", "drop"]) == 0
