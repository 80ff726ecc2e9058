"""Flat buckets: equal weights told apart, frozen ones told from wrong ones, copies of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import runs
from tests.flat_run import bucket_key, starts_of, write_checkpoint
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.cli.main import main as wsm
from wsm_megatron.optimizer.flat_buckets import BEGINNING
from wsm_megatron.optimizer.flat_main_params import find_flat_main_params
from wsm_megatron.optimizer.main_params import check_main_params

WEIGHTS = (0.3, 0.7)
BUCKET = bucket_key()


def values(numel: int, seed: int, around: float = 0.0, spread: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return around + spread * torch.randn(numel, generator=generator)


def ones(numel: int, seed: int) -> torch.Tensor:
    """Float32 values that all round to one in bf16, as those of young norms do."""
    main = values(numel, seed, 1.0, 2e-4)
    assert (main.bfloat16() == 1).all() and not (main == 1).all()
    return main


def as_model(mains: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: main.bfloat16() for key, main in mains.items()}


def write_run(root, *sources: dict[str, torch.Tensor], order=None, **options) -> None:
    """Iterations 2, 4, ...: one bucket with the main params of all tensors."""
    for k, mains in enumerate(sources):
        placed = [mains[key] for key in order or mains]
        write_checkpoint(root, 2 * k + 2, as_model(mains), {BUCKET: placed}, **options)


def run_merge(root, out, **options):
    options = {"optimizer_state": "last", "weights": WEIGHTS, **options}
    return merge(MergeConfig(load=root, save=out, **options)).output


def expect_rounded(output, sources, keys) -> None:
    """Every tensor is its own merged main param, rounded; the bucket holds those."""
    merged = load_tensors(output)
    starts = dict(zip(keys, starts_of([sources[0][key] for key in keys]), strict=True))
    for key in keys:
        main = rounded(weighted_sum64(WEIGHTS, [one[key] for one in sources]), torch.float32)
        assert same_bits(merged[BUCKET][starts[key] :][: main.numel()], main), key
        assert same_bits(merged[key], main.bfloat16()), key
    assert check_main_params(read_layout(output)).wrong == ()
    verify(output, sources=True, allow_nonfinite=True)


NORMS = ("a.layer_norm_weight", "b.layer_norm_weight", "c.weight")


def test_equal_norms_are_told_apart_by_another_source(tmp_path, caplog):
    """All ones in the newest source, and in the order of their keys not that of the bucket."""
    older = {NORMS[0]: values(96, 1, 1.0), NORMS[1]: values(96, 2, 1.0), NORMS[2]: values(300, 3)}
    newest = {NORMS[0]: ones(96, 4), NORMS[1]: ones(96, 5), NORMS[2]: values(300, 6)}
    order = (NORMS[1], NORMS[2], NORMS[0])
    write_run(tmp_path / "run", older, newest, order=order)
    output = run_merge(tmp_path / "run", tmp_path / "out")
    expect_rounded(output, [older, newest], order)
    assert "main params" not in caplog.text


def test_weights_that_begin_alike_are_told_apart_by_all_elements(tmp_path):
    def padded(seed: int) -> torch.Tensor:
        return torch.cat([torch.zeros(BEGINNING), values(200, seed)])

    sources = [{"a": padded(10 + j), "b": padded(20 + j)} for j in (0, 1)]
    write_run(tmp_path / "run", *sources, order=("b", "a"))
    expect_rounded(run_merge(tmp_path / "run", tmp_path / "out"), sources, ("b", "a"))


def test_twins_of_every_source_share_their_places(tmp_path, caplog):
    """Equal in all bits of the model everywhere: either order is right, none is left out."""
    sources = [{"a": ones(96, j), "b": ones(96, 10 + j), "c": values(70, j)} for j in (0, 1)]
    write_run(tmp_path / "run", *sources)
    assert len(find_flat_main_params(*layouts(tmp_path / "run", 4, 2)).places) == 3
    expect_rounded(run_merge(tmp_path / "run", tmp_path / "out"), sources, ("a", "b", "c"))
    assert "main params" not in caplog.text


def layouts(root, newest: int, *older: int):
    read = [read_layout(root / f"iter_{i:07d}") for i in (newest, *older)]
    return read[0], read[1:]


@pytest.mark.parametrize("wrong_in, named", [(1, "iter_0000004"), (0, "iter_0000002")])
def test_a_twin_whose_main_param_is_of_other_weights_is_refused(wrong_in, named, tmp_path):
    sources = [{"a": ones(96, j), "b": ones(96, 10 + j), "c": values(70, j)} for j in (0, 1)]
    for j, mains in enumerate(sources):
        held = list(mains.values())
        if j == wrong_in:
            held[1] = values(96, 99, 1.0)
        write_checkpoint(tmp_path / "run", 2 * j + 2, as_model(mains), {BUCKET: held})
    with pytest.raises(MergeError, match=f"{named}: the main params of b are not in its flat"):
        run_merge(tmp_path / "run", tmp_path / "out")
    assert list((tmp_path / "out").glob("*")) == []


def test_small_norms_do_not_take_the_places_of_large_ones(tmp_path):
    """A run of ones fits everywhere: the chunks on disk say how long each param is."""
    sizes = {"q_norm": 128, "k_norm": 128, "norm": 5000, "w": 900, "norm2": 5000}
    sources = [
        {key: values(n, 7 * j) if key == "w" else ones(n, 7 * j + i)
         for i, (key, n) in enumerate(sizes.items())}
        for j in (0, 1)
    ]  # fmt: skip
    write_run(tmp_path / "run", *sources)
    expect_rounded(run_merge(tmp_path / "run", tmp_path / "out"), sources, tuple(sizes))


def test_frozen_tensors_are_merged_from_the_model(tmp_path, caplog):
    """Megatron keeps no main param of what is not trained: none is wrong, as none is left over."""
    run, frozen = tmp_path / "run", values(500, 42).bfloat16()
    for j in (0, 1):
        mains = {"a": values(300, j), "b": values(130, 10 + j)}
        model = as_model(mains) | {"frozen": frozen}
        write_checkpoint(run, 2 * j + 2, model, {BUCKET: list(mains.values())})
    output = run_merge(run, tmp_path / "out")
    assert "no main params for frozen" in caplog.text
    assert same_bits(load_tensors(output)["frozen"], frozen)
    found = check_main_params(read_layout(output))
    assert (found.wrong, found.without, found.unknown) == ((), ("frozen",), 0)


def test_a_wrong_main_param_is_not_taken_for_a_frozen_tensor(tmp_path, capsys):
    run = tmp_path / "run"
    for j in (0, 1):
        mains = {"a": values(300, j), "b": values(130, 10 + j)}
        held = [mains["a"], mains["b"] if j == 0 else values(130, 99)]
        write_checkpoint(run, 2 * j + 2, as_model(mains), {BUCKET: held})
    command = ["--load", str(run), "--save", str(tmp_path / "out"), "--optimizer-state", "last"]
    assert wsm(["merge", *command]) == 1
    error = capsys.readouterr().err
    assert "iter_0000004: the main params of b are not in its flat buckets" in error
    assert "--optimizer-state drop" in error and "--rebuild-main-params" not in error
    assert not (tmp_path / "out" / "iter_0000004").exists()
    assert wsm(["resume-check", str(run)]) == 3
    printed = capsys.readouterr().out
    assert "(b)" in printed and "--no-load-optim" in printed
    assert "--rebuild-main-params" not in printed


def test_copies_of_tensor_parallel_ranks(tmp_path, caplog):
    """A norm is one chunk of the model and in every rank's bucket; one copy has drifted."""
    run, sources = tmp_path / "run", []
    for j in (0, 1):
        norm, halves = values(200, j, 1.0), (values(640, 10 + j), values(640, 20 + j))
        drifted = norm.clone()
        drifted[3] *= 1.01
        model = {"norm": norm.bfloat16(), "w": torch.stack(halves).bfloat16()}
        regions = {"w": [Region((rank, 0), (1, 640)) for rank in (0, 1)]}
        buckets = {
            bucket_key(10): [norm, halves[1]],
            bucket_key(9): [norm + 1e-6, halves[0]],
            bucket_key(11): [drifted],
        }
        sources.append(buckets)
        write_checkpoint(run, 2 * j + 2, model, buckets, chunks=regions)
    output = run_merge(run, tmp_path / "out")
    merged = load_tensors(output)
    assert "200 elements of its flat buckets round to no model tensor" in caplog.text
    for key in sources[0]:
        main = rounded(weighted_sum64(WEIGHTS, [one[key][0] for one in sources]), torch.float32)
        assert same_bits(merged[key][:200], main), key
        if key == bucket_key(9):  # of the first rank, which saves the model
            assert same_bits(merged["norm"], main.bfloat16())
    found = check_main_params(read_layout(output))
    assert (found.wrong, found.without, found.unknown) == ((), (), 200)


def test_float32_params_and_half_main_params(tmp_path):
    """A float32 router has a bucket of its own; a bucket's dtype need not be float32."""
    run, router = tmp_path / "run", bucket_key(index=1, dtype="float32")
    for j in (0, 1):
        mains = {"a": values(300, j).bfloat16(), "router": values(256, 10 + j)}
        buckets = {BUCKET: [mains["a"]], router: [mains["router"]]}
        write_checkpoint(run, 2 * j + 2, mains, buckets)
    newest, older = layouts(run, 4, 2)
    flat = find_flat_main_params(newest, older)
    assert {key: main.bucket for (key, _), main in flat.places.items()} == {
        "a": BUCKET,
        "router": router,
    }
    merged = load_tensors(run_merge(run, tmp_path / "out"))
    assert same_bits(merged["a"], merged[BUCKET]) and same_bits(merged["router"], merged[router])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    cuts=st.sets(st.integers(1, 30).map(lambda n: 80 * n), max_size=6),
    halved=st.sets(st.integers(0, 7)),
    shuffle=st.randoms(use_true_random=False),
)
def test_every_main_param_is_found(sizes, cuts, halved, shuffle, tmp_path_factory):
    """Whatever the sizes, wherever ranks' parts end, whether a param is two chunks (SwiGLU)."""
    root = tmp_path_factory.mktemp("run")
    mains = {f"{i:02d}": values(2 * n, i).view(2, n) for i, n in enumerate(sizes)}
    order = list(mains)
    shuffle.shuffle(order)
    regions = {
        f"{i:02d}": [Region((half, 0), (1, sizes[i])) for half in (0, 1)]
        for i in halved
        if i < len(sizes)
    }
    held = [mains[key] for key in order]
    path = write_checkpoint(
        root, 2, as_model(mains), {BUCKET: held}, cuts=sorted(cuts), chunks=regions
    )
    flat, starts = find_flat_main_params(read_layout(path)), starts_of(held)
    assert flat.unknown == {} and flat.missing == {}
    chunks = {
        (key, region)
        for key in mains
        for region in regions.get(key) or [Region((0, 0), (2, sizes[int(key)]))]
    }
    assert set(flat.places) == chunks
    for (key, region), main in flat.places.items():
        assert main.start == starts[order.index(key)] + region.offsets[0] * sizes[int(key)]
    assert check_main_params(read_layout(path)).wrong == ()


def count_reads(monkeypatch) -> list[str]:
    """What is read from now on, a key a read."""
    reads: list[str] = []

    def counted(read):
        def and_read(self, key, *args):
            reads.append(key)
            return read(self, key, *args)

        return and_read

    for name in ("read", "read_run"):
        monkeypatch.setattr(CheckpointReader, name, counted(getattr(CheckpointReader, name)))
    return reads


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_each_beginning_is_read_once(scale, tmp_path, monkeypatch):
    """Planning is linear in the model's chunks and the buckets' params together."""
    count = 30 * scale
    mains = {f"{i:03d}": values(64 * (i % 3 + 1), i) for i in range(count)}
    keys = list(mains)
    buckets = {bucket_key(index=i): [mains[key] for key in keys[i::scale]] for i in range(scale)}
    layout = read_layout(write_checkpoint(tmp_path, 2, as_model(mains), buckets))
    reads = count_reads(monkeypatch)
    assert len(find_flat_main_params(layout).places) == count
    assert len(reads) == 2 * count


def test_an_old_copy_of_a_param_in_the_padding_of_another_bucket(tmp_path):
    """Padding is memory that was used before: in the newest source it holds what the norm is."""
    root, generator = tmp_path / "run", torch.Generator().manual_seed(0)
    first, second = bucket_key(index=0), bucket_key(index=1)
    expected = []
    for iteration in (1, 2):
        norm, other, *large = (torch.randn(n, generator=generator) for n in (32, 32, 64, 64))
        mains = {first: [other, large[0]], second: [norm, large[1]]}
        names = {"other.weight": other, "norm.weight": norm}
        names |= {f"large.{i}.weight": one for i, one in enumerate(large)}
        model = {name: one.bfloat16() for name, one in names.items()}
        path = write_checkpoint(root, iteration, model, mains)
        expected.append(norm)
    runs.rewrite(path, change=lambda key, t: _with_copy(t, norm) if key == first else t)
    config = MergeConfig(load=root, save=tmp_path / "out", decay="mean", optimizer_state="last")
    found = load_tensors(merge(config).output)
    total = rounded(weighted_sum64((0.5, 0.5), expected), torch.float32)
    assert same_bits(found[second][:32], total)
    assert same_bits(found["norm.weight"], total.bfloat16())


def _with_copy(bucket: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    bucket = bucket.clone()
    assert bucket[32:64].isnan().all()
    bucket[32:64] = norm
    return bucket
