"""What is trained and merged, in the order of priority.

Arms of one question come together, seed after seed, so that whenever time runs out the questions
before it have all their seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from examples.wsm_vs_wsd.names import DECAYS, STYLES
from examples.wsm_vs_wsd.profile import Profile

_MOE_COST = 4.5
"""Of a step, in steps of the dense model."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One piece of work of one seed.

    Attributes:
        name: unique; names its result.
        kind: which function of worker.py does it. options: its keyword arguments.
        needs: names of arms that must be done before.
        steps: that it trains, roughly, for the estimate; evaluations count a third.
    """

    name: str
    kind: str
    seed: int
    steps: float
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def plan(profile: Profile) -> list[Arm]:
    questions = (
        _main, _main_decays, _main_merges, _theory, _after, _low, _low_theory, _annealing,
        _moments, _fine_tuning, _spike, _moe,
    )  # fmt: skip
    return [arm for ask in questions for seed in profile.seeds for arm in ask(profile, seed)]


def _main(p: Profile, seed: int) -> Iterator[Arm]:
    yield _stable(p, seed, "main", lr=p.lr, steps=p.steps, saved=_main_saves(p))


def _main_saves(p: Profile) -> list[int]:
    return list(range(p.steps - p.windows[-1], p.steps + 1, p.save_every))


def _stable(p: Profile, seed: int, run: str, *, steps: int, **options: Any) -> Arm:
    return Arm(
        name=f"s{seed}-{run}",
        kind="stable",
        seed=seed,
        steps=steps * (_MOE_COST if options.get("experts") else 1),
        options={"run": run, "steps": steps, **options},
    )


def _decay(p: Profile, seed: int, run: str, style: str, window: int, **options: Any) -> Arm:
    end = options.pop("end", p.steps)
    return Arm(
        name=f"s{seed}-{run}-{style}-{window}",
        kind="branch",
        seed=seed,
        steps=window * (_MOE_COST if options.get("experts") else 1),
        needs=(f"s{seed}-{run}",),
        options={
            "name": f"{run}: decay {style} {window}",
            "run": f"s{seed}-{run}",
            "start": end - window,
            "steps": window,
            "style": style,
            **options,
        },
    )


def _main_decays(p: Profile, seed: int) -> Iterator[Arm]:
    for window in p.windows:
        for style in STYLES:
            saves = style == "linear" and window == p.middle
            yield _decay(p, seed, "main", style, window, lr=p.lr, save=saves)


def _main_merges(p: Profile, seed: int) -> Iterator[Arm]:
    yield _merges(p, seed, "main", 60, lr=p.lr, end=p.steps, everything=True)


def _merges(p: Profile, seed: int, run: str, count: int, **options: Any) -> Arm:
    return Arm(
        name=f"s{seed}-{run}-merges",
        kind="merges",
        seed=seed,
        steps=count * 2 * p.batches / 3 * (_MOE_COST if options.get("experts") else 1),
        needs=(f"s{seed}-{run}",),
        options={"run": run, **options},
    )


def _theory(p: Profile, seed: int, run: str = "main", styles: Any = STYLES) -> Iterator[Arm]:
    decays = {f"{s} {w}": f"s{seed}-{run}-{s}-{w}" for s in styles for w in p.windows}
    yield Arm(
        name=f"s{seed}-{run}-theory",
        kind="theory",
        seed=seed,
        steps=10,
        needs=(f"s{seed}-{run}", *decays.values()),
        options={"run": run, "decays": decays},
    )


def _after(p: Profile, seed: int) -> Iterator[Arm]:
    """Decay after merging, and merging after decay."""
    arm = _decay(p, seed, "main", "linear", p.middle, lr=p.lr, merged="last")
    name = "main: merge, then decay linear"
    yield Arm(
        **vars(arm) | {"name": f"s{seed}-merge-decay", "options": arm.options | {"name": name}}
    )
    for window in p.windows[1:]:
        decay = f"s{seed}-main-linear-{window}"
        yield Arm(
            name=f"s{seed}-decay-merge-{window}",
            kind="merges_of_decay",
            seed=seed,
            steps=8 * p.batches / 3,
            needs=(decay,),
            options={"decay": decay, "lr": p.lr, "window": window},
        )


def _low(p: Profile, seed: int) -> Iterator[Arm]:
    """Another LR."""
    starts = [p.steps - window for window in p.windows]
    yield _stable(p, seed, "low", lr=p.second_lr, steps=p.steps, saved=starts)
    for window in p.windows:
        yield _decay(p, seed, "low", "linear", window, lr=p.second_lr)
    yield _merges(p, seed, "low", 15, lr=p.second_lr, end=p.steps)


def _low_theory(p: Profile, seed: int) -> Iterator[Arm]:
    return _theory(p, seed, "low", ("linear",))


def _annealing(p: Profile, seed: int) -> Iterator[Arm]:
    """A noisy mixture first, clean text at the end."""
    start = p.noisy_steps - p.middle
    yield _stable(p, seed, "noisy", lr=p.lr, steps=start, saved=[start], text="noisy")
    common = {"lr": p.lr, "end": p.noisy_steps}
    for style in ("linear", "1-sqrt"):
        yield _decay(p, seed, "noisy", style, p.middle, **common)
    constant = _decay(p, seed, "noisy", "constant", p.middle, **common)
    yield Arm(**vars(constant) | {"options": constant.options | {"merges": DECAYS, "style": None}})


def _moments(p: Profile, seed: int) -> Iterator[Arm]:
    """Going on at the same LR from a merge, by what becomes of the optimizer state."""
    for policy in (None, "last", "merge", "drop"):
        yield Arm(
            name=f"s{seed}-moments-{policy}",
            kind="branch",
            seed=seed,
            steps=p.more + 8 * p.batches / 3,
            needs=(f"s{seed}-main",),
            options={
                "name": f"moments: {policy or 'unmerged'}",
                "run": f"s{seed}-main",
                "start": p.steps,
                "steps": p.more,
                "lr": p.lr,
                "merged": policy,
                "looks": [step for step in (0, 1, 5, 20) if step < p.more] + [p.more],
            },
        )


def _fine_tuning(p: Profile, seed: int) -> Iterator[Arm]:
    main, decayed = f"s{seed}-main", f"s{seed}-main-linear-{p.middle}"
    for start, run in (("stable", main), ("merged", main), ("decayed", decayed)):
        yield Arm(
            name=f"s{seed}-tune-{start}",
            kind="tune",
            seed=seed,
            steps=p.more,
            needs=(main, decayed),
            options={"start": start, "run": run, "merged": start == "merged"},
        )


def _spike(p: Profile, seed: int) -> Iterator[Arm]:
    """A burst of a huge LR; going on, or from the merge of what was before it."""
    start = p.steps - p.middle
    common = {"run": f"s{seed}-main", "start": start, "steps": p.middle, "lr": p.lr}
    cases: dict[str, dict[str, Any]] = {
        "spiked": {"spike": True, "merges": ("mean",)},
        "rescued": {"merged": "last", "merges": ("mean",)},
    }
    for case, options in cases.items():
        yield Arm(
            name=f"s{seed}-{case}",
            kind="branch",
            seed=seed,
            steps=p.middle,
            needs=(f"s{seed}-main",),
            options={**common, "name": f"spike: {case}", **options},
        )


def _moe(p: Profile, seed: int) -> Iterator[Arm]:
    steps = p.moe_steps
    yield _stable(p, seed, "moe", lr=p.lr, steps=steps, saved=[steps - p.middle], experts=True)
    yield _decay(p, seed, "moe", "linear", p.middle, lr=p.lr, end=steps, experts=True)
    yield _merges(p, seed, "moe", 15, lr=p.lr, end=steps, experts=True)
