"""Sources of several kinds: the refusal says which are of which, and every way out works."""

from __future__ import annotations

import re

import pytest
import torch

from tests import runs
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, merge

KEY = "embedding.word_embeddings.weight"
HEADS = ("mtp.layers.0.eh_proj.weight", "mtp.layers.0.enorm.weight")


def run_where(changed, tmp_path, change):
    """A run whose checkpoints of some iterations are changed."""
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for i in changed:
        runs.rewrite(runs.checkpoint(run, i), change, grid=runs.whole)
    return run


def message_of(run, tmp_path, **options):
    with pytest.raises(ValueError) as caught:
        merge(MergeConfig(load=run, save=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def is_merged(run, tmp_path, chosen, **options):
    """The merge of these sources, with these options, is their mean."""
    report = merge(MergeConfig(load=run, save=tmp_path / "good", decay="mean", **options))
    assert report.iterations == chosen
    merged = load_tensors(report.output)
    sources = [load_tensors(runs.checkpoint(run, i)) for i in chosen]
    weights = [1 / len(chosen)] * len(chosen)
    for key, tensor in merged.items():
        if key in HEADS or key in options.get("copy", ()):
            assert same_bits(tensor, sources[-1][key]), key
            continue
        total = weighted_sum64(weights, [source[key] for source in sources])
        assert same_bits(tensor, rounded(total, tensor.dtype)), key
    return merged


CHANGES = [
    ((6, 8), "--from 6", {"from_": 6}, (6, 8)),
    ((8,), "--to 6", {"to": 6}, (2, 4, 6)),
    ((2, 8), "--iterations 2,8", {"iterations": (2, 8)}, (2, 8)),
    ((2,), "--from 4", {"from_": 4}, (4, 6, 8)),
    ((2, 8), "--from 4 --to 6", {"from_": 4, "to": 6}, (4, 6)),
]


@pytest.mark.parametrize("changed, words, options, chosen", CHANGES)
def test_dtypes(changed, words, options, chosen, tmp_path):
    run = run_where(changed, tmp_path, lambda key, t: t.float())
    message = message_of(run, tmp_path, dtype="fp32")
    assert re.search(
        r"iter_000000\d: .* is (float32|bfloat16), but (float32|bfloat16) in .*", message
    )
    assert f"merge those that are alike ({words})" in message and "--dtype" in message
    is_merged(run, tmp_path, chosen, **options)


def test_one_tensor_of_another_dtype(tmp_path):
    run = run_where((4,), tmp_path, lambda key, t: t.float() if key == KEY else t)
    assert f"--copy '{KEY}'" in message_of(run, tmp_path)
    is_merged(run, tmp_path, runs.ITERATIONS, copy=(KEY,))


def test_a_floating_tensor_that_became_integer(tmp_path):
    run = run_where((8,), tmp_path, lambda key, t: t.to(torch.int8) if key == KEY else t)
    message = message_of(run, tmp_path)
    assert f"{KEY} is bfloat16, but int8 in" in message and "(--to 6)" in message


@pytest.mark.parametrize("changed, words, options, chosen", CHANGES)
def test_a_padded_vocabulary(changed, words, options, chosen, tmp_path):
    run = run_where(changed, tmp_path, lambda key, t: t.repeat(2, 1) if key == KEY else t)
    message = message_of(run, tmp_path)
    assert "(256, 32)" in message and "(128, 32)" in message
    assert f"({words})" in message and "--make-vocab-size-divisible-by x TP" in message
    is_merged(run, tmp_path, chosen, **options)


def run_with_heads(there, tmp_path):
    """As training saves that predicts several tokens for a while."""
    run = runs.copy_run(runs.DENSE, tmp_path / "run")
    for i in there:
        heads = {key: torch.full((4, 4), i, dtype=torch.bfloat16) for key in HEADS}
        runs.rewrite(runs.checkpoint(run, i), more=heads)
    return run


@pytest.mark.parametrize("there, lacking", [((6, 8), (2, 4)), ((8,), (2, 4, 6))])
def test_keys_of_the_newest(there, lacking, tmp_path):
    run = run_with_heads(there, tmp_path)
    message = message_of(run, tmp_path)
    only, not_in = (", ".join(f"iter_{i:07d}" for i in some) for some in (there, lacking))
    assert f"{HEADS[0]}, {HEADS[1]} is in {only} only, not in {not_in}; " in message
    assert "--drop 'mtp.*', or take the newest one's with --copy 'mtp.*', or merge" in message
    assert f"(--to {lacking[-1]})" in message
    merged = is_merged(run, tmp_path / "copied", runs.ITERATIONS, copy=("mtp.*",))
    assert set(HEADS) <= set(merged)
    is_merged(run, tmp_path / "dropped", runs.ITERATIONS, drop=("mtp.*",))
    is_merged(run, tmp_path / "before", lacking, to=lacking[-1])


def test_keys_that_the_newest_lacks(tmp_path):
    run = run_with_heads((4,), tmp_path)
    message = message_of(run, tmp_path)
    assert "is in iter_0000004 only" in message and "--copy" not in message
    assert "--drop 'mtp.*', or merge those that are alike (--iterations 2,6,8)" in message
    is_merged(run, tmp_path, runs.ITERATIONS, drop=("mtp.*",))
