"""Memory divided among threads, and what is read ahead."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import RUNS, load_tensors, same_bits
from wsm_megatron import ExecutionOptions, MergeConfig, merge
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.execution import device, memory_budget
from wsm_megatron.execution.memory_budget import default_memory, make_budget
from wsm_megatron.planning.tasks import Output, Recipe, Rule, Scope
from wsm_megatron.storage import files


def recipe(rule: Rule, inputs: list[torch.dtype], outputs: list[torch.dtype]) -> Recipe:
    return Recipe(
        rule,
        Role.MODEL,
        tuple(f"in{i}" for i in range(len(inputs))),
        tuple(Output(f"out{i}", dtype, (4,)) for i, dtype in enumerate(outputs)),
        tuple(inputs),
    )


BF16, FP32 = torch.bfloat16, torch.float32
RECIPES = [
    recipe(Rule.SUM, [BF16], [BF16]),
    recipe(Rule.SUM_MAIN, [FP32, BF16], [FP32, BF16]),
    recipe(Rule.COPY, [FP32], [FP32]),
]


@given(
    memory=st.integers(2**20, 2**34),
    threads=st.integers(1, 64),
    sources=st.integers(2, 200),
    merges=st.integers(1, 100),
    depth=st.integers(1, 2),
)
def test_what_is_in_flight_fits_into_memory(memory, threads, sources, merges, depth):
    try:
        found = make_budget(memory, threads, sources, merges, RECIPES, depth=depth)
    except ValueError as error:
        assert "--memory" in str(error) and str(memory) in str(error)
        smallest = 2**14 * max(r.cost(sources, merges) for r in RECIPES[:2])
        assert memory < depth * smallest
        return
    assert 1 <= found.threads <= threads
    scope = Scope(tuple(range(sources)), tuple(range(merges)))
    for one in RECIPES:
        numel = found.tile_elements(one, scope)
        assert numel >= 1
        tile = numel * (4 if one.rule is Rule.COPY else one.cost(sources, merges))
        ahead = found.ahead * sources
        assert found.threads * (depth * tile + ahead) <= memory


@pytest.mark.parametrize("free, taken", [(0, 2**25), (2**30, 2**27), (2**42, 2**29)])
def test_the_default_is_an_eighth_of_what_is_free(monkeypatch, free, taken):
    monkeypatch.setattr(memory_budget, "available_memory", lambda: free)
    assert default_memory() == taken


def merged(tmp_path, name, **options):
    config = MergeConfig(load=RUNS / runs.FULLY, save=tmp_path / name)
    return load_tensors(merge(config, ExecutionOptions(**options)).output)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert same_bits(tensor, right[key]), key


@pytest.mark.parametrize("size", ["x", "12Q", "GiB", "1.5.2GiB"])
def test_a_size_that_is_none(tmp_path, size, capsys):
    arguments = ["--load", str(tmp_path), "--save", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *arguments, f"--memory={size}"])
    assert stopped.value.code == 2
    assert "is not a size" in capsys.readouterr().err


def test_too_little_memory_is_refused(tmp_path, capsys):
    arguments = ["--load", str(RUNS / runs.DENSE), "--save", str(tmp_path / "out")]
    assert main(["merge", *arguments, "--memory", "64KiB"]) == EXIT_USAGE
    assert "--memory 65536 is too little" in capsys.readouterr().err
    assert main(["merge", *arguments, "--memory", "1mb"]) == 0


def test_reading_ahead_stays_inside_the_window(tmp_path, monkeypatch):
    """Chunks of several tiles are announced, piece after piece; advice that is refused is left."""
    monkeypatch.setattr(memory_budget, "LEAST_ELEMENTS", 64)
    monkeypatch.setattr(device, "TILE_BYTES", 1024)
    monkeypatch.setattr(files, "is_cached", lambda descriptor, position: False)
    advised = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, length, what: advised.append((start, length, what))
    )
    expected = merged(tmp_path, "out", memory=2**28)
    assert advised and {what for *_, what in advised} == {os.POSIX_FADV_WILLNEED}
    assert all(length > 0 for _, length, _ in advised)

    def refuse(*arguments):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert_same(merged(tmp_path, "refused", memory=2**28), expected)
