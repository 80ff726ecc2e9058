"""Tables of what comes with merging: data, experts, fine-tuning, spikes, moments, prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.progress_given_up import progress_given_up
from examples.wsm_vs_wsd.results import Results
from examples.wsm_vs_wsd.statistics import correlation, interval
from examples.wsm_vs_wsd.tables import Table, _table, shown


def annealing(r: Results) -> Table:
    linear = names.decay("noisy", "linear", r.profile.middle)
    constant = names.decay("noisy", "constant", r.profile.middle)
    models = {f"decay {s}": names.decay("noisy", s, r.profile.middle) for s in ("linear", "1-sqrt")}
    models |= {"constant LR": constant}
    models |= {f"merge {d}": f"{constant}, merge {d}" for d in names.DECAYS}
    rows = [
        (what, shown(r.mean(name), sign=False),
         shown(r.difference(name, constant)) if name != constant else "",
         shown(r.difference(name, linear)) if name != linear else "")
        for what, name in models.items()
    ]  # fmt: skip
    return _table(r, "Clean text at the end of a noisy mixture",
                  ("model", "loss", "against constant LR", "against the linear decay"), rows,
                  "All see the same clean text in the last"
                  f" {r.profile.middle} of {r.profile.noisy_steps} steps.")  # fmt: skip


def experts(r: Results) -> Table:
    p = r.profile
    stable, linear = names.stable("moe", p.moe_steps), names.decay("moe", "linear", p.middle)
    models = {"constant LR": stable, "decay linear": linear}
    for window in p.windows[:2]:
        models |= {
            f"merge {d}, window {window}": names.merged("moe", d, window, p.interval, p.moe_steps)
            for d in names.DECAYS
        }
    rows = [
        (what, shown(r.mean(name), sign=False), shown(r.difference(name, stable)),
         *(shown(r.mean(name, metric), digits=3) for metric in ("max_violation", "min_violation")),
         *(shown(r.difference(name, linear, metric), digits=3)
           for metric in ("max_violation", "min_violation")))
        for what, name in models.items()
    ]  # fmt: skip
    rows = [row for row in rows if row[1] != "–"]
    return _table(r, "Load balance of experts",
                  ("model", "loss", "against constant LR", "max violation", "min violation",
                   "max, against decay", "min, against decay"), rows,
                  "MaxVio and MinVio: load of the most and the least loaded expert over the mean,"
                  f" less 1; the mean over layers. The decay has {p.middle} steps.")  # fmt: skip


def fine_tuning(r: Results) -> Table:
    rows = []
    for start in ("stable", "decayed", "merged"):
        name = f"tune: {start}"
        rows.append((
            start, shown(r.mean(name, "prose-test"), sign=False),
            shown(r.difference(name, "tune: decayed", "prose-test")) if start != "decayed" else "",
            shown(r.difference(name, "tune: decayed")) if start != "decayed" else "",
        ))  # fmt: skip
    return _table(r, "After fine-tuning on another text",
                  ("fine-tuned from", "loss on prose", "prose, against decayed",
                   "code, against decayed"), rows,
                  f"{r.profile.more} steps on Python's language reference, with a schedule of their"
                  " own; `code` is the test split of pre-training.")  # fmt: skip


def spike(r: Results) -> Table:
    p = r.profile
    healthy = names.stable("main", p.steps)
    merged = names.merged("main", "mean", p.middle, p.interval, p.steps)
    rows = [("no spike", shown(r.mean(healthy), sign=False), "", "")]
    for case in ("spiked", "rescued"):
        name = f"spike: {case}"
        rows.append((
            case, shown(r.mean(name), sign=False), shown(r.difference(name, healthy)),
            shown(r.difference(f"{name}, merge mean", merged)),
        ))  # fmt: skip
    rows = rows if any(row[2] not in ("", "–") for row in rows) else []
    return _table(r, "Spike and rescue",
                  ("run", "loss", "against no spike", "its mean, against the mean without a spike"),
                  rows,
                  f"{p.middle} steps before the end the LR is 30 times itself for 5 steps."
                  " `spiked` goes on; `rescued` goes on from the mean of the window before the"
                  " spike, without it.")  # fmt: skip


def moments(r: Results) -> Table:
    looks = [step for step in (0, 1, 5, 20) if step < r.profile.more] + [r.profile.more]
    base = [f"moments: unmerged after {step}" for step in looks]
    rows = [("unmerged", *(shown(r.mean(name), sign=False) for name in base))]
    for policy in ("last", "merge", "drop"):
        ours = [f"moments: {policy} after {step}" for step in looks]
        cells = [shown(r.difference(a, b)) for a, b in zip(ours, base, strict=True)]
        rows.append((f"merged, `--optimizer-state {policy}`", *cells))
    return _table(r, "Resuming from a merge, by what becomes of the moments",
                  ("", *(f"after {step} steps" for step in looks)), rows,
                  "Unmerged: loss; others: against unmerged after as many steps at the same LR.",
                  )  # fmt: skip


def gains(r: Results) -> list[dict[str, Any]]:
    """What the path said of a merge, and what it gained, by run, seed, window and decay."""
    p, found = r.profile, []
    for one in r.records("variances"):
        if one["decay"] not in ("mean", "ema"):
            continue
        run, seed = one["run"], one["seed"]
        name = names.merged(run, one["decay"], one["window"], p.interval, p.steps)
        merge, stable = r.values(name), r.values(names.stable(run, p.steps))
        if seed in merge and seed in stable:
            gain = stable[seed] - merge[seed]
            found.append({**one, "gain": gain, "score": noise_less_drift(one)})
    return found


def noise_less_drift(one: dict[str, Any]) -> float:
    """Squared distance by which a merge averages noise away, less the squared distance of the
    progress that it gives up: as if the valley were as stiff across as it falls along."""
    n, update = one["intervals"], one["update"]
    noise = one["averaged_away"] * update * (n * one["walk"] + one["jitter"] / 2)
    return noise - update * one["drift"] * (n * (1 - one["progress_kept"])) ** 2


_RULES = {
    "noise averaged away − drift given up": lambda one: one["score"],
    "distance that the merge moves": lambda one: one["moved"],
    "the longest window": lambda one: one["window"],
    "the shortest window": lambda one: -one["window"],
}
_OF_LENGTH = ("the longest window", "the shortest window")
"""To compare with: they look at no path."""


def prediction(r: Results) -> Table:
    """Each rule picks the window of the mean, seed by seed, without looking at a loss."""
    rows = [
        (run, rule, shown(interval(order), digits=2), shown(interval(regret), sign=False))
        for (run, rule), (order, regret) in _tried(r).items()
    ]
    return _table(r, "Prediction of the gain from the path",
                  ("run", "rule", "rank correlation with the gain", "loss against the best window"),
                  rows,
                  "Over the windows of one run and seed, for the mean. The last column is what the"
                  " window that the rule picks loses against the best on the test split, which no"
                  " rule can beat: 0 is perfect.")  # fmt: skip


def within_noise(r: Results) -> list[str]:
    """Rules of the path that in no run pick a window that is worse than the best by more than what
    seeds differ by."""
    tried = _tried(r)
    rules = [rule for rule in _RULES if rule not in _OF_LENGTH]
    return [
        rule
        for rule in rules
        if all(interval(regret).sign == 0 for (_, one), (_, regret) in tried.items() if one == rule)
    ]


def _tried(r: Results) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """By run and rule: over seeds its rank correlation with the gain, and what its window loses."""
    cases: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in gains(r):
        if one["decay"] == "mean":
            cases.setdefault((one["run"], one["seed"]), []).append(one)
    cases = {key: ones for key, ones in cases.items() if len(ones) >= 3}
    tried = {}
    for run in dict.fromkeys(run for run, _ in cases):
        ours = [ones for (name, _), ones in cases.items() if name == run]
        for what, rule in _RULES.items():
            order = [
                correlation([rule(o) for o in ones], [o["gain"] for o in ones]) for ones in ours
            ]
            regret = [
                max(one["gain"] for one in ones) - max(ones, key=rule)["gain"] for ones in ours
            ]
            tried[run, what] = order, regret
    return tried


def shares(r: Results) -> Table:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in gains(r):
        if one["decay"] == "mean":
            groups.setdefault((one["run"], one["window"]), []).append(one)
    rows = [
        (run, str(window), *(shown(interval([o[key] for o in ones]), sign=False, digits=2)
         for key in ("drift", "walk", "jitter", "averaged_away", "progress_kept")),
         shown(interval([o["gain"] for o in ones])))
        for (run, window), ones in groups.items()
    ]  # fmt: skip
    return _table(r, "What the updates of a window are made of",
                  ("run", "window", "drift", "walk", "jitter", "averaged away", "progress kept",
                   "gain of the mean"), rows,
                  "Shares of the mean squared update, as `wsm inspect --trajectory` has them.",
                  )  # fmt: skip


ABOUT_THE_REST: tuple[Callable[[Results], Table], ...] = (
    annealing, experts, fine_tuning, spike, moments, progress_given_up, shares, prediction,
)  # fmt: skip
