"""--copy and --drop: a model tensor, its main param and its moments are one thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from tests.unit.optimizer.test_flat_main_params import BUCKET, in_bucket
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.keys import model_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.optimizer.flat_main_params import (
    FlatMainParam,
    FlatMainParams,
    find_flat_main_params,
)
from wsm_megatron.optimizer.main_params import check_main_params
from wsm_megatron.planning.patterns import pattern_for
from wsm_megatron.planning.plan import make_plan

WEIGHTS = (0.07, 0.21, 0.31, 0.41)
MODEL = "embedding.word_embeddings.weight"
MAIN = f"optimizer.state.param.{MODEL}"
KEYED = (runs.FULLY, runs.FP32_PARAM, "chained")


def run_merge(run, out, **options):
    options = {"optimizer_state": "last", "weights": WEIGHTS, **options}
    return merge(MergeConfig(load=run, save=out, **options)).output


def sources_of(run):
    return [load_tensors(runs.checkpoint(run, i)) for i in runs.ITERATIONS]


def run_of(name, tmp_path):
    """A run by name; ``chained``: FULLY as several optimizers (MoE) save it."""
    if name != "chained":
        return RUNS / name
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for i in runs.ITERATIONS:
        runs.rewrite(
            runs.checkpoint(run, i),
            rename=lambda key: f"chained_1.{key}" if key.startswith("optimizer.state") else key,
        )
    return run


@pytest.mark.parametrize("state", ["last", "merge"])
@pytest.mark.parametrize("name", KEYED)
def test_a_copied_model_tensor_brings_its_main_param_and_moments(name, state, tmp_path):
    run = run_of(name, tmp_path)
    output = run_merge(run, tmp_path / "out", copy=(MODEL,), optimizer_state=state)
    newest, merged = sources_of(run)[-1], load_tensors(output)
    straight = load_tensors(run_merge(run, tmp_path / "straight", optimizer_state=state))
    copied = {key for key in newest if key == MODEL or model_of(key) == MODEL}
    assert len(copied) == 4 and set(merged) == set(newest)
    for key, tensor in merged.items():
        assert same_bits(tensor, (newest if key in copied else straight)[key]), key
    assert check_main_params(read_layout(output)).wrong == ()
    verify(output, sources=True)


def test_a_main_param_that_is_rebuilt_is_rebuilt_from_the_copied_model(tmp_path):
    """Its own is of other weights in this run."""
    run = RUNS / runs.WRONG_MAINS
    wrong = check_main_params(read_layout(runs.checkpoint(run, 8))).wrong
    output = run_merge(run, tmp_path / "out", copy=wrong[:2], rebuild_main_params=True)
    newest, merged = sources_of(run)[-1], load_tensors(output)
    for model in wrong[:2]:
        assert same_bits(merged[model], newest[model])
        main = merged[f"optimizer.state.param.{model}"]
        assert same_bits(main, newest[model].to(torch.float32))
    assert check_main_params(read_layout(output)).wrong == ()
    verify(output, sources=True)


@pytest.mark.parametrize("iteration", [6, 8])
def test_a_copied_main_param_of_other_weights_is_refused(iteration, tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    runs.rewrite(runs.checkpoint(run, iteration), lambda k, t: t + 1 if k == MAIN else t)
    if iteration == 6:  # nothing is taken of it
        assert run_merge(run, tmp_path / "out", copy=(MODEL,)).exists()
        return
    with pytest.raises(MergeError, match=f"iter_0000008: the main param {MAIN} does not belong"):
        run_merge(run, tmp_path / "out", copy=(MODEL,))


def test_values_that_are_not_finite_are_not_copied(tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    nan = float("nan")
    runs.rewrite(runs.checkpoint(run, 8), lambda k, t: t * nan if k in (MODEL, MAIN) else t)
    with pytest.raises(MergeError, match=f"iter_0000008: {MAIN} holds NaN"):
        run_merge(run, tmp_path / "out", copy=(MODEL,))


@pytest.mark.parametrize("state", ["last", "merge"])
def test_in_flat_buckets_a_copied_tensor_brings_its_spans(state, tmp_path):
    run, copied = RUNS / runs.FLAT, "decoder.layers.mlp.linear_fc1.weight"  # two chunks a layer
    output = run_merge(run, tmp_path / "out", copy=(copied,), optimizer_state=state)
    sources, merged = sources_of(run), load_tensors(output)
    newest = sources[-1]
    for suffix in ("param", "exp_avg", "exp_avg_sq"):
        key = f"{BUCKET.removesuffix('param')}{suffix}"
        if suffix == "param" or state == "merge":
            total = weighted_sum64(WEIGHTS, [source[key] for source in sources])
            expected = rounded(total, torch.float32)
        else:
            expected = newest[key]
        found = in_bucket(merged[key], newest)
        spans = {**in_bucket(expected, newest), copied: in_bucket(newest[key], newest)[copied]}
        for model, span in spans.items():
            assert same_bits(found[model], span), (key, model)
    assert same_bits(merged[copied], newest[copied])
    assert check_main_params(read_layout(output)).wrong == ()
    verify(output, sources=True, allow_nonfinite=True)


@pytest.mark.parametrize("name", [runs.FLAT, runs.MOE, runs.MAIN])
@pytest.mark.parametrize("state", ["last", "merge"])
def test_nothing_is_left_unwritten(name, state, tmp_path):
    """Whatever is copied: every element of every tensor is there, and fits the rest."""
    run = RUNS / name
    output = run_merge(run, tmp_path / "out", copy=("embedding*", "*mlp*"), optimizer_state=state)
    verify(output, sources=True, allow_nonfinite=True)
    assert check_main_params(read_layout(output)).wrong == ()
    newest, merged = sources_of(run)[-1], load_tensors(output)
    assert set(merged) == set(newest)
    copied = [key for key in newest if "embedding" in key or ".mlp." in key]
    models = [key for key in copied if not key.endswith("expert_bias")]
    assert len(models) > 2
    for key in copied:
        assert same_bits(merged[key], newest[key]), key


def test_sliding_merges_copy_from_their_own_newest(tmp_path):
    for name in (runs.FULLY, runs.FLAT):
        config = MergeConfig(
            load=RUNS / name,
            save=tmp_path / name,
            optimizer_state="merge",
            last=2,
            sliding_every=2,
            copy=(MODEL,),
        )
        for one in merge(config).merged:
            newest = load_tensors(runs.checkpoint(name, one.iterations[-1]))
            assert same_bits(load_tensors(one.output)[MODEL], newest[MODEL])
            assert check_main_params(read_layout(one.output)).wrong == ()
            verify(one.output, sources=True, allow_nonfinite=True)


@pytest.mark.parametrize("name", KEYED)
def test_a_dropped_model_tensor_takes_its_optimizer_state_along(name, tmp_path):
    run = run_of(name, tmp_path)
    merged = load_tensors(run_merge(run, tmp_path / "out", drop=(MODEL,)))
    straight = load_tensors(run_merge(run, tmp_path / "straight"))
    gone = {key for key in straight if key == MODEL or model_of(key) == MODEL}
    assert len(gone) == 4 and set(merged) == set(straight) - gone
    for key, tensor in merged.items():
        assert same_bits(tensor, straight[key]), key


def test_a_tensor_that_only_the_newest_has_is_copied_with_its_main_param(tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for iteration in (2, 4, 6):
        runs.rewrite(
            runs.checkpoint(run, iteration),
            rename=lambda key: f"{key}_old" if key.endswith(f"state.param.{MODEL}") else key,
        )
    merged = load_tensors(run_merge(run, tmp_path / "out", copy=(MODEL, "*_old")))
    newest = load_tensors(runs.checkpoint(run, 8))
    for key in (MODEL, MAIN):
        assert same_bits(merged[key], newest[key])


FIRST_STEP = "without its model tensor, which the first step after a load makes from it"


@pytest.mark.parametrize("name, options, words", [
    (runs.FULLY, {"copy": (MAIN,)}, f"--copy takes .* {MAIN} {FIRST_STEP}; --copy '{MODEL}'"),
    (runs.FULLY, {"drop": (MAIN,)}, f"--drop takes .* {MAIN} {FIRST_STEP}; --drop '{MODEL}'"),
    (runs.FULLY, {"copy": ("optimizer*",)}, FIRST_STEP),
    (runs.FULLY, {"copy": (MODEL,), "drop": (MAIN,)}, "--drop takes"),
    (runs.FLAT, {"copy": ("optimizer*",)}, "main params of many .*--optimizer-state drop"),
    (runs.FLAT, {"drop": ("*bucket_idx_0.param",)}, "main params of many"),
    (runs.FLAT, {"drop": (MODEL,)}, f"{MODEL}, but its main .* flat bucket.*state drop"),
    (runs.MOE, {"drop": ("*experts*",)}, "lies in a flat bucket .*--optimizer-state drop"),
    (runs.FULLY, {"copy": ("optimizer*",), "optimizer_state": "drop"},
     r"--copy 'optimizer\*' names optimizer state only.*--optimizer-state last"),
    (runs.FLAT, {"copy": ("*.exp_avg",), "optimizer_state": "drop"}, "optimizer state only"),
    (runs.FULLY, {"copy": ("none.*",)}, r"--copy 'none\.\*' matches no entry.*inspect"),
    (runs.FLAT, {"drop": (MODEL, "bias*"), "optimizer_state": "drop"}, "--drop 'bias.*no entry"),
])  # fmt: skip
def test_refused_with_the_way_out(name, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run_merge(RUNS / name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_ways_out_work(tmp_path):
    options = {"drop": (MODEL,), "optimizer_state": "drop"}
    merged = load_tensors(run_merge(RUNS / runs.FLAT, tmp_path / "out", **options))
    assert merged and MODEL not in merged


def test_weights_only_copies_no_optimizer_state(tmp_path):
    options = {"copy": ("*final_layernorm*",), "optimizer_state": "drop"}
    merged = load_tensors(run_merge(RUNS / runs.FULLY, tmp_path / "out", **options))
    newest = load_tensors(runs.checkpoint(runs.FULLY, 8))
    assert not [key for key in merged if key.startswith("optimizer")]
    key = "decoder.final_layernorm.weight"
    assert same_bits(merged[key], newest[key])


def test_a_copied_tensor_whose_main_param_is_not_found_is_refused():
    layouts = [read_layout(runs.checkpoint(runs.FLAT, i)) for i in runs.ITERATIONS]
    config = MergeConfig(load="a", save="b", optimizer_state="last", copy=(MODEL,))
    places = find_flat_main_params(layouts[-1]).places
    assert make_plan(layouts, config, FlatMainParams(places)).tasks
    some = {chunk: place for chunk, place in places.items() if chunk[0] != MODEL}
    with pytest.raises(ValueError, match=f"--copy takes {MODEL}, but where .* is not known"):
        make_plan(layouts, config, FlatMainParams(some))


def test_an_integer_model_tensor_is_not_made_from_its_main_param(tmp_path):
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for i in runs.ITERATIONS:
        runs.rewrite(
            runs.checkpoint(run, i), lambda key, t: (t * 64).to(torch.int8) if key == MODEL else t
        )
    with pytest.raises(ValueError, match=f"{MODEL} is torch.int8 .* --copy '{MODEL}'"):
        run_merge(run, tmp_path / "out")
    merged = load_tensors(run_merge(run, tmp_path / "out", copy=(MODEL,)))
    newest = load_tensors(runs.checkpoint(run, 8))
    for key in (MODEL, MAIN):
        assert same_bits(merged[key], newest[key])


@pytest.mark.parametrize("shift", [-64, 64, 10**6])
def test_a_plan_that_does_not_write_everything_once_is_refused(shift):
    """Whatever the reason: here main params that are said to lie elsewhere."""
    layouts = [read_layout(runs.checkpoint(runs.FLAT, i)) for i in runs.ITERATIONS]
    config = MergeConfig(load="a", save="b", optimizer_state="last")
    places = dict(find_flat_main_params(layouts[-1]).places)
    (chunk,) = [chunk for chunk in places if chunk[0] == "decoder.final_layernorm.weight"]
    places[chunk] = FlatMainParam(places[chunk].bucket, places[chunk].start + shift)
    with pytest.raises(MergeError, match=r"bucket_idx_0\.param .* would not be whole"):
        make_plan(layouts, config, FlatMainParams(places))


@pytest.mark.parametrize("keys, others, pattern", [
    (["mtp.a.w", "mtp.b.w"], ["decoder.w"], "mtp.*"),
    (["decoder.x.a", "decoder.x.b"], ["decoder.w"], "decoder.x.*"),
    (["decoder.x"], ["decoder.w"], "decoder.x"),
    (["a.x", "b.x"], ["c"], "PATTERN"),
    (["a"], [], "a"),
])  # fmt: skip
def test_a_pattern_for_some_keys(keys, others, pattern):
    assert pattern_for(keys, others) == pattern


def test_model_of_any_keyed_state():
    for key in ("param", "fp32_param", "exp_avg", "momentum_buffer"):
        assert model_of(f"chained_1.optimizer.state.{key}.a.b") == "a.b"
    assert model_of("a.b") is None and model_of(BUCKET) is None


def test_a_tensor_with_main_params_on_several_ranks_is_not_copied(monkeypatch):
    """In flat buckets one of them would be copied, and the others merged."""
    newest = read_layout(runs.checkpoint(runs.FLAT, 8))
    flat = find_flat_main_params(newest)
    key = next(iter(flat.places))[0]
    config = MergeConfig(
        load=RUNS / runs.FLAT, save=RUNS / "out", optimizer_state="last", copy=(key,)
    )
    layouts = [read_layout(runs.checkpoint(runs.FLAT, 6)), newest]
    assert make_plan(layouts, config, flat).tasks
    with pytest.raises(ValueError, match="several ranks keep main params.*--optimizer-state drop"):
        make_plan(layouts, config, replace(flat, repeated=frozenset({key})))
