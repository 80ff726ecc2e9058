"""The answers as tables, question by question. Losses are nats a byte on the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.results import Results
from examples.wsm_vs_wsd.statistics import Interval, interval, paired


@dataclass(frozen=True, kw_only=True)
class Table:
    """One question's answer; without rows its arms were not run."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> Iterator[str]:
        yield f"### {self.title}\n"
        if not self.rows:
            yield "Not run in this profile's time.\n"
            return
        yield f"| {' | '.join(self.head)} |"
        yield "|---" * len(self.head) + "|"
        for row in self.rows:
            yield f"| {' | '.join(row)} |"
        yield f"\n{self.note}\n" if self.note else ""


def shown(value: Interval | None, sign: bool = True, digits: int = 4) -> str:
    """Mean ± half the 95 % interval."""
    if value is None:
        return "–"
    mean = f"{value.mean:{'+' if sign else ''}.{digits}f}".replace("-", "−")
    half = "?" if math.isnan(value.half) else f"{value.half:.{digits}f}"
    return f"{mean} ± {half}"


def merge_name(results: Results, decay: str, window: int) -> str:
    p = results.profile
    return names.merged("main", decay, window, p.interval, p.steps)


def share(results: Results, name: str, decay: str, stable: str) -> Interval | None:
    """Of the gain of a decay over the constant LR, in per cent: ratios seed by seed."""
    one, two, base = (results.values(key) for key in (name, decay, stable))
    seeds = sorted(one.keys() & two.keys() & base.keys())
    if not seeds:
        return None
    return interval([100 * (base[s] - one[s]) / (base[s] - two[s]) for s in seeds])


def _table(
    results: Results,
    title: str,
    head: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    note: str = "",
) -> Table:
    """Rows that have no value at all are left out."""
    kept = [row for row in rows if any(cell not in ("–", "") for cell in row[1:])]
    return Table(title=title, head=tuple(head), rows=kept, note=note)


def against_decay(r: Results) -> Table:
    p, stable = r.profile, names.stable("main", r.profile.steps)
    rows = [("constant LR", "", shown(r.mean(stable), sign=False), "", "", "")]
    for window in p.windows:
        linear = names.decay("main", "linear", window)
        models = {f"decay {s}": names.decay("main", s, window) for s in names.STYLES}
        models |= {f"merge {d}": merge_name(r, d, window) for d in names.DECAYS}
        models |= {
            f"merge {d} of block means": names.blocks("main", d, window, p.interval, p.steps)
            for d in names.DECAYS
        }
        for what, name in models.items():
            rows.append((
                what,
                str(window),
                shown(r.mean(name), sign=False),
                shown(r.difference(name, stable)),
                shown(r.difference(name, linear)) if name != linear else "",
                shown(share(r, name, linear, stable), sign=False, digits=0),
            ))  # fmt: skip
    rows = [row for row in rows if row[2] != "–"]
    return _table(
        r,
        "Merge against decay at equal tokens",
        ("model", "window", "loss", "against constant LR", "against linear decay", "% of its gain"),
        rows,
        f"All end at step {p.steps}; decays begin `window` steps before, merges are of the points"
        f" of the same steps, {p.interval} apart, both ends included. For evenly spaced points the"
        " merge `linear` is the mean.",
    )  # fmt: skip


def selected(r: Results) -> Table:
    p, stable = r.profile, r.values(names.stable("main", r.profile.steps))
    decays = [names.decay("main", s, w) for w in p.windows for s in names.STYLES]
    merges = [merge_name(r, d, w) for w in p.windows for d in names.DECAYS]
    blocks = [
        names.blocks("main", d, w, p.interval, p.steps) for w in p.windows for d in names.DECAYS
    ]
    best = r.selected_values(decays)
    rows = []
    for what, candidates in (("decay", decays), ("merge", merges), ("block means", blocks)):
        values = r.selected_values(candidates)
        if values:
            chosen = sorted({name.split(": ")[1] for name in r.selected(candidates).values()})
            against = paired(values, best) if what != "decay" and best else None
            loss = interval(list(values.values()))
            gain = shown(paired(values, stable))
            cells = (shown(loss, sign=False), gain, shown(against))
            rows.append((what, ", ".join(chosen), *cells))
    return _table(
        r, "The best of each, selected on the validation split",
        ("family", "selected (by seed)", "loss", "against constant LR", "against the decay"), rows,
        "Shape and window are selected seed by seed on the validation split; the losses are the"
        " test split's.",
    )  # fmt: skip


def which_decay(r: Results) -> Table:
    p = r.profile
    rows = []
    for window in p.windows:
        linear = names.decay("main", "linear", window)
        for style in names.STYLES[1:]:
            one = names.decay("main", style, window)
            rows.append((f"decay {style} − linear", str(window), shown(r.difference(one, linear))))
        for decay in names.DECAYS[1:]:
            one, mean = merge_name(r, decay, window), merge_name(r, "mean", window)
            rows.append((f"merge {decay} − mean", str(window), shown(r.difference(one, mean))))
    rows = [row for row in rows if row[2] != "–"]
    return _table(r, "Which decay", ("comparison", "window", "difference"), rows,
                  "Below zero: better than linear, or than the mean.")  # fmt: skip


def duration(r: Results) -> Table:
    p, stable = r.profile, names.stable("main", r.profile.steps)
    rows = [
        (f"{w}", f"{w // p.interval + 1}",
         *(shown(r.difference(merge_name(r, d, w), stable)) for d in ("mean", "ema")))
        for w in p.durations
    ]  # fmt: skip
    rows = [row for row in rows if row[2] != "–"]
    return _table(r, "Duration", ("window", "points", "mean", "ema"), rows,
                  "Against the constant LR, at a fixed interval.")  # fmt: skip


def granularity(r: Results) -> Table:
    p, stable = r.profile, names.stable("main", r.profile.steps)
    rows = []
    for window in p.windows[1:]:
        for step in p.intervals(window):
            cells = [
                shown(r.difference(names.merged("main", d, window, step, p.steps), stable))
                for d in ("mean", "ema")
            ]
            rows.append((str(window), str(step), str(window // step + 1), *cells))
    rows = [row for row in rows if row[3] != "–"]
    return _table(r, "Granularity at a fixed window",
                  ("window", "interval", "points", "mean", "ema"), rows,
                  "Against the constant LR.")  # fmt: skip


def too_early(r: Results) -> Table:
    p, rows = r.profile, []
    for end in (*p.early_ends, p.steps):
        stable = names.stable("main", end)
        name = names.merged("main", "mean", p.middle, p.interval, end)
        rows.append(
            (str(end), shown(r.mean(stable), sign=False), shown(r.difference(name, stable)))
        )
    return _table(r, "Merging too early",
                  ("end of the window", "constant LR", "mean − constant LR"), rows,
                  f"The mean of the last {p.middle} steps before each end.")  # fmt: skip


def after(r: Results) -> Table:
    p, rows = r.profile, []
    decay = names.decay("main", "linear", p.middle)
    name = "main: merge, then decay linear"
    rows.append((f"merge (mean), then decay over {p.middle}", shown(r.difference(name, decay))))
    for window in p.windows[1:]:
        decay = names.decay("main", "linear", window)
        for length in (window // 2, window):
            for how in ("mean", "ema"):
                name = f"main: decay linear {window}, then merge {how} of {length}"
                what = f"decay over {window}, then merge ({how}) its last {length} steps"
                rows.append((what, shown(r.difference(name, decay))))
    return _table(r, "Merging after decay, decay after merging",
                  ("what", "against the decay alone"), rows,
                  "The merge before the decay is of the window that ends where the decay begins,"
                  " main params and the newest moments kept (`--optimizer-state last`).",
                  )  # fmt: skip


def theory(r: Results) -> Table:
    groups: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for one in r.records("distances"):
        groups.setdefault((one["run"], one["style"], one["window"]), []).append(one)
    p = r.profile
    rows = []
    for (run, style, window), found in sorted(groups.items(), key=lambda item: str(item[0])):
        lr = p.lr if run == "main" else p.second_lr
        cells = [
            shown(interval([one[key] for one in found]), sign=False, digits=3)
            for key in ("merge_to_decay", "stable_to_decay", "ratio", "cosine")
        ]
        merge = names.merged(
            run, "mean" if style == "linear" else style, window, p.interval, p.steps
        )
        gap = r.difference(merge, names.decay(run, style, window))
        rows.append((f"{lr:g}", style, str(window), *cells, shown(gap)))
    rows.sort(key=lambda row: (row[0], row[1], int(row[2])))
    return _table(
        r, "Theory: how far a merge is from the decay that it stands for",
        ("LR", "shape", "window", "merge to decay", "constant LR to decay", "ratio", "cosine",
         "loss, merge − decay"), rows,
        "Euclidean distances of all weights. The ratio is 0 for an exact emulation. The cosine is"
        " between the ways from the start of the window to the merge and to the decayed weights.",
    )  # fmt: skip


ABOUT_MERGING: tuple[Callable[[Results], Table], ...] = (
    against_decay, selected, which_decay, duration, granularity, too_early, after, theory,
)  # fmt: skip
