"""install() and uninstall() against stub modules, without Megatron-LM."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from wsm_megatron.plugin import hooks, versions

FUNCTIONS = {
    "arguments": ["add_megatron_arguments"],
    "training": [
        "setup_model_and_optimizer",
        "save_checkpoint",
        "evaluate_and_print_results",
        "checkpoint_and_decide_exit",
        "train",
    ],
    "checkpointing": ["schedule_async_save"],
}


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stub modules whose functions return their own name and arguments."""
    modules: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.training", ModuleType("megatron.training"))
    modules["core"] = ModuleType("megatron.core")
    modules["core"].__version__ = "0.18.2"
    monkeypatch.setitem(sys.modules, "megatron.core", modules["core"])
    for name, functions in FUNCTIONS.items():
        modules[name] = ModuleType(f"megatron.training.{name}")
        monkeypatch.setitem(sys.modules, f"megatron.training.{name}", modules[name])
        for function in functions:
            setattr(modules[name], function, lambda *a, _name=function, **k: (_name, a, k))
    modules["arguments"].add_megatron_arguments = lambda parser: parser
    modules["training"].get_args = lambda: argparse.Namespace(skip_train=False, wsm_merge=False)
    yield modules
    hooks.uninstall()


def functions_of(modules: dict[str, Any]) -> dict[str, Any]:
    return {f"{m}.{f}": getattr(modules[m], f) for m in FUNCTIONS for f in FUNCTIONS[m]}


def test_install_twice_and_uninstall_twice(megatron: dict[str, Any]) -> None:
    before = functions_of(megatron)
    hooks.install()
    wrapped = functions_of(megatron)
    assert all(wrapped[name] is not before[name] for name in before)
    hooks.install()
    assert functions_of(megatron) == wrapped
    hooks.uninstall()
    hooks.uninstall()
    assert functions_of(megatron) == before


def test_flags_are_added_to_megatrons_own(megatron: dict[str, Any]) -> None:
    hooks.install()
    parser = megatron["arguments"].add_megatron_arguments(argparse.ArgumentParser())
    assert parser.parse_args(["--wsm-merge", "--wsm-merge-num", "4"]).wsm_merge_num == (4,)


def test_without_the_flag_calls_pass_through(megatron: dict[str, Any]) -> None:
    hooks.install()
    training = megatron["training"]
    assert training.setup_model_and_optimizer(1, key=2) == (
        "setup_model_and_optimizer",
        (1,),
        {"key": 2},
    )
    name, args, kwargs = training.save_checkpoint(8, "m", "o", "s", 0.0, {}, dp_group="g")
    assert (name, args) == ("save_checkpoint", (8, "m", "o", "s", 0.0, {}))
    assert kwargs["dp_group"] == "g"
    _, args, kwargs = training.evaluate_and_print_results(
        "iteration 8", "f", "d", "m", 8, "p", "c", verbose=True, non_loss_data_func="n"
    )
    assert args == ("iteration 8", "f", "d", "m", 8, "p", "c")
    assert kwargs == {"verbose": True, "non_loss_data_func": "n"}
    assert training.train(1, 2, 3, 4, 5, 6)[1] == (1, 2, 3, 4, 5, 6)
    assert training.checkpoint_and_decide_exit(1, 2, 3, 4, 5, 6, 7)[1] == (1, 2, 3, 4, 5, 6, 7)
    assert megatron["checkpointing"].schedule_async_save("request")[1] == ("request",)


def test_a_missing_function_is_named(megatron: dict[str, Any]) -> None:
    del megatron["training"].checkpoint_and_decide_exit
    before = megatron["training"].train
    with pytest.raises(ImportError, match=r"checkpoint_and_decide_exit.*tested: core_v0\.14\.0"):
        hooks.install()
    assert megatron["training"].train is before, "nothing is wrapped by half"


def test_no_megatron_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    with pytest.raises(ImportError, match=r"needs Megatron-LM on the Python path"):
        hooks.install()


def test_bad_flags_are_refused_before_the_model_is_built(megatron: dict[str, Any]) -> None:
    hooks.install()
    training = megatron["training"]
    training.get_args = lambda: argparse.Namespace(wsm_merge=False, wsm_merge_num=4)
    with pytest.raises(ValueError, match="--wsm-merge-num without effect"):
        training.setup_model_and_optimizer()


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.14.0", True), ("0.20.0rc0", True), ("0.13.2", False), ("0.21.0", False), ("?", False)],
)
def test_every_version_that_is_not_tested_is_said_to_be_that(
    megatron: dict[str, Any], caplog: pytest.LogCaptureFixture, version: str, tested: bool
) -> None:
    megatron["core"].__version__ = version
    hooks.install()
    assert (f"Megatron core {version} was not tested" in caplog.text) != tested
    assert set(versions.wrapped_by(version)) == {(m, f) for m in FUNCTIONS for f in FUNCTIONS[m]}
