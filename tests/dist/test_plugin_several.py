"""Several merges in one run: each is what an offline sweep makes, and nothing else changes."""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.test_plugin_driver import Run
from tests.dist.test_plugin_refill import _warnings
from tests.mcore import CONFIGS, GPTConfig, run_ranks
from tests.reference import load_tensors, same_bits
from wsm_megatron import MergeConfig, Sweep, SweepGrid, sweep, verify

DECAYS, LENGTHS = ("1-sqrt", "mean"), (2, 3)
NAMES = [f"{decay}-last{number}" for number in LENGTHS for decay in DECAYS]
"""As a sweep of the run names its merges."""

LAYOUTS = {
    "moe-ep2": CONFIGS["moe-ep2-fully_reshardable"],
    "moe-pp2": GPTConfig(
        num_experts=4, pipeline_parallel=2, ffn_hidden_size=48, sharding_type="fully_reshardable"
    ),
    "tp2": CONFIGS["tp2"],
    "pp2": CONFIGS["pp2"],
}
OPTIONS = {"decay": DECAYS, "num": LENGTHS}


class Curves:
    """A TensorBoard writer."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))


class Wandb:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


class Several(Run):
    """Evaluates as Megatron does: to TensorBoard, on the last rank; saves what it evaluates."""

    def __init__(self, root: Path, config: GPTConfig, **options: Any) -> None:
        super().__init__(root, config=config, **{"eval": True, "save_interval": 4} | options)
        self.curves, self.wandb = Curves(), Wandb()
        self.loads: dict[str, dict[int, list[int]]] = {}
        if dist.get_rank() == dist.get_world_size() - 1:
            self.stand_in.get_tensorboard_writer = lambda: self.curves
            self.stand_in.get_wandb_writer = lambda: self.wandb

    def _evaluate(self, tag: str, data: Any, complete: bool) -> None:
        from tests.mcore.bed import evaluate, mock_data, save_checkpoint

        with _dispatched(self.training.model[0]) as loads:
            loss = evaluate(self.training, mock_data(self.training.config), 1)
        self.loads[f"{tag}{self.training.iteration}"] = dict(loads)
        writer, iteration = self.stand_in.get_tensorboard_writer(), self.training.iteration
        if writer:
            assert loss is not None
            writer.add_scalar("lm loss validation", loss, iteration)
        random.random(), torch.rand(1)
        self.args.consumed_valid_samples += 8
        save_checkpoint(self.training, self.root.parent / "evaluated" / f"{tag}{iteration}")


@contextmanager
def _dispatched(chunk: Any) -> Iterator[dict[int, list[int]]]:
    """Counts tokens where they arrive, at the experts: by layer, of this rank's own experts."""
    loads: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def counter(layer: Any) -> Any:
        def count(_: Any, inputs: tuple[Any, ...]) -> None:
            for expert, tokens in zip(layer.local_expert_indices, inputs[1].tolist(), strict=True):
                loads[layer.layer_number][expert] += tokens

        return count

    layers = [module for module in chunk.modules() if hasattr(module, "experts")]
    hooks = [layer.experts.register_forward_pre_hook(counter(layer)) for layer in layers]
    yield loads
    for hook in hooks:
        hook.remove()


def _in_ranks(root: Path) -> dict[str, Any]:
    return {name: _one(root / name, config) for name, config in LAYOUTS.items()}


def _one(root: Path, config: GPTConfig) -> dict[str, Any]:
    from tests.mcore.bed import build, differences, snapshot, train

    run = Several(root / "run", config, **OPTIONS, emit="all")
    run.attach()
    touched: list[str] = []
    evaluated = run.driver.evaluated

    def watched(*args: Any) -> Any:
        before, dice = snapshot(run.training), (random.getstate(), torch.get_rng_state())
        result = evaluated(*args)
        drawn = random.getstate()
        touched.extend(differences(before, snapshot(run.training)))
        random.setstate(dice[0])
        random.random()  # the evaluation of the trained weights is Megatron's own
        touched.extend([] if drawn == random.getstate() else ["Python's random numbers"])
        after = torch.get_rng_state()
        torch.set_rng_state(dice[1])
        torch.rand(1)
        touched.extend([] if torch.equal(after, torch.get_rng_state()) else ["torch's"])
        return result

    run.driver.evaluated = watched  # type: ignore[method-assign]
    run.train()
    run.driver.close()
    plain = build(config)
    train(plain, 8)
    return {
        "after": differences(snapshot(run.training), snapshot(plain)),
        "losses": run.training.losses == plain.losses,
        "touched": touched,
        "points": run.curves.points,
        "wandb": run.wandb.logged,
        "samples": run.args.consumed_valid_samples,
        "loads": run.loads,
    }


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("several")
    return root, run_ranks(_in_ranks, 2, root / "logs", root=root, timeout=400)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_merge_is_that_of_an_offline_sweep(
    outcome: tuple[Path, list[dict[str, Any]]], layout: str, tmp_path: Path
) -> None:
    """What is evaluated and what is emitted, main params too, bit for bit."""
    root = outcome[0] / layout
    config = MergeConfig(load=root / "run", save=tmp_path, optimizer_state="last")
    for end in (4, 8):
        sweep(Sweep(config, SweepGrid(last=(2, 3) if end == 8 else 2, decay=DECAYS, to=end)))
    for name, end in product(NAMES, (4, 8)):
        short = name.replace("last3", "last2") if end == 4 else name
        offline = load_tensors(tmp_path / short / f"iter_{end:07d}")
        emitted = root / "run" / "wsm" / name
        assert (emitted / "latest_checkpointed_iteration.txt").read_text() == "8"
        evaluated = root / "evaluated" / _tag(name, end)
        for folder in (emitted, evaluated):
            tensors = load_tensors(folder / f"iter_{end:07d}")
            assert tensors.keys() == offline.keys()
            for key, tensor in offline.items():
                assert same_bits(tensors[key], tensor), (folder, key)
        assert verify(emitted / f"iter_{end:07d}", sources=True).samples > 0
        said = json.loads((emitted / f"iter_{end:07d}" / "wsm_merge.json").read_text())
        assert said["options"]["decay"] == name.rpartition("-")[0]


def _tag(name: str, iteration: int) -> str:
    """Up to iteration 4 there are two snapshots: a window of three is one of two."""
    decay = name.rpartition("-")[0]
    shown = f"{decay}-last2 = {decay}-last3" if iteration == 4 else name
    return f"wsm {shown} {iteration}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_the_run_changes(
    outcome: tuple[Path, list[dict[str, Any]]], layout: str
) -> None:
    for report in (reports[layout] for reports in outcome[1]):
        assert report["after"] == [] and report["losses"]
        assert report["touched"] == []
        assert report["samples"] == 16, "as without the merged evaluations"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_curve_for_each_merge(outcome: tuple[Path, list[dict[str, Any]]], layout: str) -> None:
    first, last = (reports[layout] for reports in outcome[1])
    assert first["points"] == [] == first["wandb"]
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for tag, value, step in last["points"]:
        assert step not in curves[tag], "one point a curve and step"
        curves[tag][step] = value
    losses = {tag: points for tag, points in curves.items() if tag.endswith("lm loss validation")}
    assert set(losses) == {"lm loss validation"} | {f"wsm {n} lm loss validation" for n in NAMES}
    assert all(set(points) == {4, 8} for points in losses.values())
    for decay in DECAYS:
        short, long = (losses[f"wsm {decay}-last{n} lm loss validation"] for n in LENGTHS)
        assert short[4] == long[4] and short[8] != long[8]
    assert len({points[8] for points in losses.values()}) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_balance_is_what_the_experts_were_sent(
    outcome: tuple[Path, list[dict[str, Any]]], layout: str
) -> None:
    """Counted a second time where the tokens arrive, on the ranks of the experts."""
    ranks = [reports[layout] for reports in outcome[1]]
    found = {(tag, step): value for tag, value, step in ranks[1]["points"] if "violation" in tag}
    if "moe" not in layout:
        assert not found
        return
    for which, step in product(("", *(f"wsm {name} " for name in NAMES)), (4, 8)):
        tag = _tag(which[4:-1], step) if which else f"{step}"
        most, least = _violations([rank["loads"][tag] for rank in ranks])
        assert found[f"{which}max violation validation", step] == pytest.approx(most, rel=1e-12)
        assert found[f"{which}min violation validation", step] == pytest.approx(least, rel=1e-12)
    logged = {(tag, step): v for values, step in ranks[1]["wandb"] for tag, v in values.items()}
    assert logged == found


def _violations(ranks: list[dict[int, list[int]]]) -> tuple[float, float]:
    """Means over the layers of max and min load, in mean loads, less one."""
    layers: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for loads in ranks:
        for layer, tokens in loads.items():
            layers[layer] += torch.tensor(tokens, dtype=torch.float64)
    assert sorted(layers) == [1, 2]
    assert all(load.sum() == 2 * 8 * 16 for load in layers.values()), "top 2 of 8 samples"
    most = [(load.max() / load.mean() - 1).item() for load in layers.values()]
    least = [(load.min() / load.mean() - 1).item() for load in layers.values()]
    return sum(most) / 2, sum(least) / 2


def _more(root: Path) -> dict[str, Any]:
    report: dict[str, Any] = {}
    config = CONFIGS["dp2-fully_reshardable"]
    run = Several(root / "a", config, **OPTIONS, emit="mean:3")
    run.attach()
    run.train()
    run.driver.close()
    again = Several(root / "a", config, **OPTIONS)
    again.args.train_iters = 10
    again.restart(8)
    report["refilled"] = [c.iteration for c in again.driver._wsm.kept]
    again.driver.close()
    report["dry run"] = {
        store: _dry_run(root / "b", config, store=store) for store in ("memory", "disk")
    }
    return report | {"unreadable": _unreadable(root / "c" / "run", config)}


def _unreadable(root: Path, config: GPTConfig) -> Any:
    """The snapshot of iteration 4 cannot be read on one rank."""
    from tests.mcore.bed import build, differences, snapshot, train

    run = Several(root, config, **OPTIONS)
    run.attach()
    store: Any = run.driver._wsm._store
    if dist.get_rank() == 1:
        store.get = partial(_get, store.get)
    with _warnings() as warned:
        run.train()
    run.driver.close()
    plain = build(config)
    train(plain, 8)
    return list(run.loads), warned, differences(snapshot(run.training), snapshot(plain))


def _get(get: Any, iteration: int, index: int) -> torch.Tensor:
    if iteration == 4:
        raise OSError("Input/output error")
    found: torch.Tensor = get(iteration, index)
    return found


def _dry_run(root: Path, config: GPTConfig, **options: Any) -> Any:
    run = Several(root, config, **OPTIONS, **options, dry_run=True)
    with _said() as lines, _warnings() as warned, pytest.raises(SystemExit) as end:
        run.attach()
    return end.value.code, lines, warned


@contextmanager
def _said() -> Iterator[list[str]]:
    """What the plugin logs on this rank."""
    lines: list[str] = []
    own, handler = logging.getLogger("wsm_megatron"), logging.Handler(logging.INFO)
    level = own.level
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    yield lines
    own.setLevel(level)
    own.removeHandler(handler)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("more")
    return root, run_ranks(_more, 2, root / "logs", root=root, timeout=200)


def test_one_that_is_emitted_needs_no_folder_of_its_own(
    more: tuple[Path, list[dict[str, Any]]],
) -> None:
    root = more[0] / "a" / "wsm"
    assert sorted(p.name for p in root.iterdir()) == [
        "iter_0000004",
        "iter_0000008",
        "latest_checkpointed_iteration.txt",
    ]
    said = json.loads((root / "iter_0000008" / "wsm_merge.json").read_text())
    assert [one["iteration"] for one in said["sources"]] == [4, 6, 8]
    assert said["options"]["decay"] == "mean"


def test_a_merge_that_fails_leaves_the_others(
    more: tuple[Path, list[dict[str, Any]]],
) -> None:
    for evaluated, warned, after in (report["unreadable"] for report in more[1]):
        assert evaluated == ["4", "8", "wsm 1-sqrt-last2 8", "wsm mean-last2 8"]
        assert sum("no evaluation, the merge failed" in text for text in warned) == 4
        assert all("Input/output error" in text for text in warned)
        assert after == []
    assert [p.name for p in (more[0] / "c" / "run" / "wsm").glob("iter_*")] == ["iter_0000008"]


def test_a_restart_refills_the_longest_window(more: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [report["refilled"] for report in more[1]] == [[4, 6, 8]] * 2


def test_a_dry_run_ends_on_every_rank_and_leaves_nothing(
    more: tuple[Path, list[dict[str, Any]]],
) -> None:
    root, (first, second) = more
    assert not (root / "b").exists()
    for store, (code, lines, warned) in first["dry run"].items():
        assert code == 0 and warned == []
        text = "\n".join(lines)
        assert "--wsm-merge-num 3: 3 snapshots over 4 iterations, 512 tokens" in text
        assert ("on the disk of snapshots" in text) == (store == "disk")
        assert lines[-1] == "wsm: the dry run ends here, before training"
    assert [one[:2] for one in second["dry run"].values()] == [(0, [])] * 2, "one rank says it"
