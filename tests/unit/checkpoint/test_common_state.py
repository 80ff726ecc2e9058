"""The common state: read, summarised, and made over for a merged checkpoint."""

from __future__ import annotations

import argparse
import copy
import io
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import dump_common
from wsm_megatron.checkpoint.common_state import (
    PROVENANCE_KEY,
    CommonSummary,
    load_common,
    prepare,
    summarize,
)
from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.metadata import load_metadata
from wsm_megatron.safe_pickle.objects import load_object
from wsm_megatron.safe_pickle.opaque import GlobalName, OpaqueObject

RUNS = Path(__file__).parents[2] / "data" / "runs"
PROVENANCE = {"sources": [{"iteration": 2, "tokens": None}], "coefficients": [0.25, 0.75]}


def read(run: str, iteration: int = 8) -> dict[str, Any]:
    path = RUNS / run / f"iter_{iteration:07d}" / "common.pt"
    return load_common(path.read_bytes(), str(path))


def read_from_distcp() -> tuple[bytes, dict[str, Any]]:
    checkpoint = RUNS / "main-dense-dp2-dp_reshardable" / "iter_0000008"
    stored = load_metadata(checkpoint / ".metadata").storage_data
    info = next(i for index, i in stored.items() if index.fqn == "common_state/shard_0_1")
    file = (checkpoint / info.relative_path).read_bytes()
    data = file[info.offset : info.offset + info.length]
    return data, load_common(data, "common_state")


@pytest.mark.parametrize("iteration", [2, 4, 6, 8])
def test_summary_of_a_run(iteration: int) -> None:
    summary = summarize(read("mcore0.16-moe-ep2-dp_reshardable", iteration))
    assert summary.iteration == iteration
    assert summary.tokens == summary.consumed_samples * summary.seq_length > 0  # type: ignore[operator]


def test_summary_where_the_state_says_little() -> None:
    assert summarize({}) == CommonSummary(None, None, None)
    assert summarize({"total_iters": 5}).iteration == 5
    args = argparse.Namespace(consumed_train_samples=6)
    assert summarize({"args": args}).tokens is None
    assert summarize({"args": types.SimpleNamespace(**vars(args), seq_length=4)}).tokens == 24
    assert summarize({"args": OpaqueObject(GlobalName("megatron", "X"), (), state=vars(args))}) == (
        CommonSummary(None, 6, None)
    )


def test_both_forms_are_read_and_written() -> None:
    data, state = read_from_distcp()
    assert summarize(state).iteration == 8
    assert load_object(dump_common(state, in_distcp=True), "x") == load_object(data, "x") == [state]
    assert load_object(dump_common(state), "x") == state


def test_other_objects_are_not_a_common_state() -> None:
    for other in ([1, 2], 3, [[1]]):
        stream = io.BytesIO()
        torch.save(other, stream)
        with pytest.raises(MergeError, match="x/common.pt: the common state is a .*, not a dict"):
            load_common(stream.getvalue(), "x/common.pt")


def test_dropping_the_optimizer_makes_what_megatron_saves_without_it() -> None:
    """Against a run with ``--no-save-optim --no-save-rng``, alike but for its optimizer."""
    merged = prepare(
        read("mcore0.16-dense-dp2-dp_reshardable"),
        iteration=8,
        drop_optimizer=True,
        provenance=PROVENANCE,
    )
    saved = read("mcore0.16-dense-dp2-noopt")
    assert merged.pop(PROVENANCE_KEY) == PROVENANCE
    merged_args, saved_args = vars(merged.pop("args")), vars(saved.pop("args"))
    differing = {k for k in merged_args | saved_args if merged_args[k] != saved_args[k]}
    assert differing == {"iteration", "save", "use_distributed_optimizer"}
    merged["content_metadata"].pop("distrib_optim_sharding_type")
    assert merged == saved


def test_keeping_the_optimizer_changes_the_iteration_alone() -> None:
    state = read("mcore0.16-dense-dp2-dp_reshardable")
    before = copy.deepcopy(state)
    merged = prepare(state, iteration=12, drop_optimizer=False, provenance=PROVENANCE)
    assert state == before, "the source's state was changed"
    assert merged.pop(PROVENANCE_KEY) == PROVENANCE
    assert merged.pop("iteration") == merged["args"].iteration == 12
    del state["iteration"]
    merged["args"].iteration = state["args"].iteration
    assert merged == state


def test_new_args_are_set() -> None:
    state = {"args": argparse.Namespace(seed=1), "total_iters": 3}
    merged = prepare(
        state, iteration=4, drop_optimizer=True, provenance={}, new_args={"bf16": True}
    )
    expected = argparse.Namespace(
        seed=1, iteration=4, no_save_optim=True, no_save_rng=True, bf16=True
    )
    assert merged == {"args": expected, "iteration": 4, PROVENANCE_KEY: {}}
    assert vars(state["args"]) == {"seed": 1}


def test_other_kinds_of_args() -> None:
    inert = OpaqueObject(GlobalName("megatron.bridge", "Args"), (), new=True, state={"seed": 1})
    merged = prepare({"args": inert}, iteration=4, drop_optimizer=False, provenance={})
    assert merged["args"].state == {"seed": 1, "iteration": 4}
    assert inert.state == {"seed": 1}
    simple = types.SimpleNamespace(seed=1)
    merged = prepare({"args": simple}, iteration=4, drop_optimizer=False, provenance={})
    assert merged["args"] == types.SimpleNamespace(seed=1, iteration=4)
    assert "args" not in prepare({}, iteration=4, drop_optimizer=True, provenance={})
    with pytest.raises(MergeError, match="args are of type str: cannot set iteration"):
        prepare({"args": "x"}, iteration=4, drop_optimizer=False, provenance={})


@pytest.mark.parametrize("in_distcp", [False, True])
def test_a_prepared_state_loads_as_megatron_loads_it(in_distcp: bool) -> None:
    pytest.importorskip("megatron.core")  # declares its classes safe for weights_only
    state = prepare(
        read("mcore0.16-dense-tp2-fp32param"),
        iteration=8,
        drop_optimizer=True,
        provenance=PROVENANCE,
    )
    loaded = torch.load(
        io.BytesIO(dump_common(state, in_distcp=in_distcp)), map_location="cpu", weights_only=True
    )
    loaded = loaded[0] if in_distcp else loaded
    assert loaded[PROVENANCE_KEY] == PROVENANCE
    assert loaded["args"].no_save_optim and loaded["args"].no_save_rng
    assert loaded["args"].model_type.name == "encoder_or_decoder"
