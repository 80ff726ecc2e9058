"""Who reads what where ranks see different files, and the steps and messages that follow."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsm_megatron import MergeError
from wsm_megatron.access.node_local.assignment import (
    Assigner,
    PeerStage,
    TaskAssignment,
    peer_stages_of,
)
from wsm_megatron.access.node_local.schedule import arriving, ending, leaving, tickets_of
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import Chunk, Layout, Location, TensorEntry
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.optimizer.flat_main_params import FlatMainParam
from wsm_megatron.optimizer.representation import REMAINDER, ROUNDED, Representation
from wsm_megatron.planning.tasks import Merge, Output, Recipe, Rule, Task

KEY, ROWS = "weight", 24
RANKS = 4
BF16, FP32 = torch.bfloat16, torch.float32


def layout(source: int, chunks: int, key: str = KEY) -> Layout:
    """One tensor cut into ``chunks``, a file each."""
    step = ROWS // chunks
    parts = tuple(
        Chunk((i * step, 0), (step, 8), Location(f"{key}{i}", 0, 1)) for i in range(chunks)
    )
    entry = TensorEntry(key, Role.MODEL, BF16, (ROWS, 8), parts)
    return Layout(Path(f"iter_{source}"), {key: entry}, {}, {})


def task(rule: Rule = Rule.SUM, offset: int = 0, rows: int = ROWS, merges: int = 1) -> Task:
    inputs, dtypes = (KEY,), (BF16,)
    recipe = Recipe(rule, Role.MODEL, inputs, (Output(KEY, BF16, (ROWS, 8)),), dtypes)
    return Task(recipe, Region((offset, 0), (rows, 8)))


seen_by = st.lists(st.integers(0, RANKS - 1), min_size=1, max_size=RANKS, unique=True)


@settings(deadline=None)
@given(st.lists(seen_by, min_size=1, max_size=6))
def test_no_choice_of_holders_makes_fewer_hops(who: list[list[int]]) -> None:
    layouts = [layout(j, 1) for j in range(len(who))]
    seeing = [{"weight0": tuple(sorted(ranks))} for ranks in who]
    (held,) = Assigner(layouts, seeing, [len(who) - 1], RANKS, 1).hold([task()])
    assert all(holder in ranks for holder, ranks in zip(held.holders, who, strict=True))
    fewest = min(hops(choice) for choice in product(*who))
    assert hops(held.holders) == fewest
    assert (held.alone is not None) == (fewest == 0) == (not held.travels)


def hops(holders: Any) -> int:
    return sum(a != b for a, b in pairwise(holders))


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4), st.data())
def test_cut_tasks_tile_the_task_and_are_visible(chunks: list[int], data: st.DataObject) -> None:
    layouts = [layout(j, count) for j, count in enumerate(chunks)]
    seeing = [
        {f"weight{i}": tuple(sorted(data.draw(seen_by))) for i in range(count)} for count in chunks
    ]
    tasks = [task(offset=c.offsets[0], rows=c.sizes[0]) for c in layouts[-1].tensors[KEY].chunks]
    helds = list(Assigner(layouts, seeing, [len(chunks) - 1], RANKS, 1).hold(tasks))
    covered = torch.zeros(ROWS, dtype=torch.int)
    for held in helds:
        first, count = held.task.region.offsets[0], held.task.region.sizes[0]
        covered[first : first + count] += 1
        for j, holder in enumerate(held.holders):
            step = ROWS // chunks[j]
            for i in range(first // step, (first + count - 1) // step + 1):
                assert holder in seeing[j][f"weight{i}"]
    assert covered.tolist() == [1] * ROWS


holders_of_tasks = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(*[st.integers(0, 2)] * n), min_size=1, max_size=5),
        st.lists(
            st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True).map(sorted),
            min_size=1,
            max_size=3,
        ),
    )
)


@given(holders_of_tasks)
@settings(max_examples=300, deadline=None)
def test_every_merge_gets_its_sources_in_order_and_no_rank_waits_forever(
    case: tuple[list[tuple[int, ...]], list[list[int]]],
) -> None:
    """Play the chains with one thread a rank and transfers that wait for both sides."""
    holders, source_indices = case
    merges = [Merge(tuple(m), (1.0,) * len(m)) for m in source_indices]
    helds = [TaskAssignment(task(), chosen) for chosen in holders]
    steps = [step for n, held in enumerate(helds) for step in peer_stages_of(n, held)]
    queues = {rank: [step for step in steps if step.rank == rank] for rank in range(3)}
    tickets = {rank: tickets_of(queue, merges) for rank, queue in queues.items()}
    programs = {
        rank: [event for step in queue for event in events(step, tickets[rank], merges)]
        for rank, queue in queues.items()
    }
    sums: dict[tuple[int, int, int], list[int]] = {}
    written: dict[tuple[int, int], list[int]] = {}
    while any(programs.values()):
        assert advance(programs, sums, written, merges), "every rank waits"
    for n in range(len(helds)):
        for k, merge in enumerate(merges):
            assert written[n, k] == list(merge.source_indices)


def events(step: PeerStage, tickets: dict, merges: list[Merge]) -> list[tuple]:
    """What a rank does in a step: a message in, its own sources, a message out."""
    before = tickets.get((step.number, step.first, "before"))
    after = tickets.get((step.number, step.first, "after"))
    found: list[tuple] = [("own", step)]
    if before is not None:
        found.insert(0, ("in", step, *before))
    if after is not None:
        found.append(("out", step, *after))
    return found


def advance(programs: dict, sums: dict, written: dict, merges: list[Merge]) -> bool:
    for rank, program in programs.items():
        if not program:
            continue
        kind, step, *message = program[0]
        if kind == "own":
            own_sources(step, sums, written, merges)
        elif kind == "in":
            continue  # done together with the sender's
        else:
            peer, ticket = message
            there = programs[peer][0] if programs[peer] else ("none",)
            if there[0] != "in" or there[2:] != (rank, ticket):
                continue
            taken = programs[peer].pop(0)[1]
            assert taken.number == step.number and taken.first == step.last + 1
            assert arriving(taken, merges) == leaving(step, merges) != []
            for k in leaving(step, merges):
                sums[step.number, k, peer] = sums.pop((step.number, k, rank))
        program.pop(0)
        return True
    return False


def own_sources(step: PeerStage, sums: dict, written: dict, merges: list[Merge]) -> None:
    for k, merge in enumerate(merges):
        place = step.number, k, step.rank
        own = [j for j in merge.source_indices if step.first <= j <= step.last]
        if own or k in arriving(step, merges):
            sums[place] = [*sums.get(place, []), *own]
        if k in ending(step, merges):
            written[step.number, k] = sums.pop(place)


def test_load_is_shared_where_all_see_all() -> None:
    layouts = [layout(j, 6) for j in range(3)]
    seeing = [{f"weight{i}": (0, 1, 2) for i in range(6)}] * 3
    tasks = [task(offset=4 * i, rows=4) for i in range(6)]
    helds = list(Assigner(layouts, seeing, [2], 3, 1).hold(tasks))
    assert sorted(held.alone for held in helds) == [0, 0, 1, 1, 2, 2]  # type: ignore[type-var]


def with_mains(
    who_main: list[tuple[int, ...]],
    who_model: list[tuple[int, ...]],
    kind: Representation = ROUNDED,
) -> TaskAssignment:
    layouts = []
    for j in range(len(who_main)):
        one, main = layout(j, 1), layout(j, 1, "main")
        layouts.append(Layout(one.path, {**one.tensors, **main.tensors}, {}, {}))
    seeing = [{"main0": a, "weight0": b} for a, b in zip(who_main, who_model, strict=True)]
    outputs = Output("main", FP32, (ROWS, 8)), Output(KEY, BF16, (ROWS, 8))
    recipe = Recipe(Rule.SUM_MAIN, Role.MODEL, ("main", KEY), outputs, (FP32, BF16), kind)
    (held,) = Assigner(layouts, seeing, [], RANKS, 1).hold(
        [Task(recipe, Region((0, 0), (ROWS, 8)))]
    )
    return held


def test_mains_are_checked_by_their_holder_where_it_sees_the_model() -> None:
    held = with_mains([(0, 1), (0, 1)], [(1, 2), (1,)])
    assert (held.holders, held.checkers, held.alone) == ((1, 1), (1, 1), 1)
    assert not held.checked_apart


def test_mains_are_checked_apart_where_no_rank_sees_both() -> None:
    held = with_mains([(0,), (0,)], [(2,), (0,)])
    assert (held.holders, held.checkers, held.alone) == ((0, 0), (2, 0), None)
    assert held.checked_apart and not held.travels


def test_remainders_are_read_with_their_model_by_one_rank() -> None:
    held = with_mains([(0, 1), (0, 2)], [(1, 2), (0, 1)], REMAINDER)
    assert (held.holders, held.checkers) == ((1, 0), ())
    assert held.inputs(1, 0) == held.inputs(0, 1) == 2 and held.travels
    with pytest.raises(MergeError, match="main and weight at .* read together.*one node"):
        with_mains([(0,), (0,)], [(2,), (0,)], REMAINDER)


def test_copied_entries_need_the_newest_source_only() -> None:
    layouts = [layout(0, 1), layout(1, 1), layout(2, 1)]
    seeing: list[Any] = [{}, {"weight0": (3,)}, {"weight0": (1,)}]
    (held,) = Assigner(layouts, seeing, [1, 2], RANKS, 2).hold([task(Rule.COPY)])
    assert held.holders == (None, 3, 1)
    assert peer_stages_of(0, held) == [PeerStage(0, 3, 1, 1), PeerStage(0, 1, 2, 2)]


def copied_pair(mains: list[Any], models: list[Any]) -> TaskAssignment:
    """A main param that is copied together with its model tensor; who sees their one file each."""
    layouts, seeing = [], []
    for j, (main, model) in enumerate(zip(mains, models, strict=True)):
        tensors = {key: layout(j, 1, key).tensors[key] for key in ("main", KEY)}
        layouts.append(Layout(Path(f"iter_{j}"), tensors, {}, {}))
        seeing.append({"main0": main, "weight0": model})
    outputs = (Output("main", FP32, (ROWS, 8)), Output(KEY, BF16, (ROWS, 8)))
    recipe = Recipe(Rule.COPY, Role.MODEL, ("main", KEY), outputs, (FP32, BF16))
    whole = Task(recipe, Region((0, 0), (ROWS, 8)))
    (held,) = Assigner(layouts, seeing, [1], RANKS, 1).hold([whole])
    return held


def test_a_main_param_and_its_model_tensor_are_copied_by_one_rank() -> None:
    held = copied_pair([(), (0, 2, 3)], [(), (1, 2)])
    assert (held.holders, held.checkers) == ((None, 2), ())
    assert held.inputs(2, 1) == 2 and not held.travels
    with pytest.raises(MergeError, match="iter_1: main and weight at .* copied together.*one node"):
        copied_pair([(), (0,)], [(), (1,)])


def test_messages_are_bounded_over_all_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsm_megatron.access.node_local.assignment.TRAVEL_ELEMENTS", 64)
    layouts, seeing = [layout(0, 1), layout(1, 1)], [{"weight0": (0,)}, {"weight0": (1,)}]
    for merges in (1, 4):
        helds = list(Assigner(layouts, seeing, [1], RANKS, merges).hold([task()]))
        assert max(held.task.region.numel for held in helds) == 64 // merges
        assert sum(held.task.region.numel for held in helds) == ROWS * 8


def test_a_split_task_keeps_its_place_in_the_flat_bucket() -> None:
    whole = Task(task().recipe, Region((4, 0), (6, 8)), FlatMainParam("bucket", 100))
    parts = list(whole.split(16))
    assert [part.part("bucket", part.region) for part in parts] == [
        Region((100 + 16 * i,), (16,)) for i in range(3)
    ]


def test_refusal_names_checkpoint_tensor_files_and_ranks() -> None:
    layouts = [layout(0, 2), layout(1, 1)]
    seeing: list[Any] = [{"weight0": (0, 2)}, {"weight0": (0,)}]
    with pytest.raises(MergeError) as caught:
        list(Assigner(layouts, seeing, [1], RANKS, 1).hold([task()]))
    assert str(caught.value) == (
        "iter_0: no rank sees all files that weight at (12, 0) needs (weight1: no rank); let the "
        "nodes that have them take part, copy them to one that does, or leave this checkpoint out"
    )


def test_a_flat_main_is_not_cut() -> None:
    layouts = [layout(0, 2), layout(1, 1)]
    seeing = [{"weight0": (0, 2), "weight1": (1,)}, {"weight0": (0,)}]
    flat = Task(task().recipe, Region((0, 0), (ROWS, 8)), FlatMainParam("bucket", 0))
    with pytest.raises(MergeError, match=r"\(weight0: ranks 0, 2; weight1: rank 1\)"):
        list(Assigner(layouts, seeing, [1], RANKS, 1).hold([flat]))
