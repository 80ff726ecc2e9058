"""What the papers claim, what was found here, and whether it is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.more_tables import prediction, within_noise
from examples.wsm_vs_wsd.progress_given_up import given_up
from examples.wsm_vs_wsd.results import Results
from examples.wsm_vs_wsd.statistics import Interval, interval, paired
from examples.wsm_vs_wsd.tables import merge_name, share, shown

REPRODUCED, NOT, OPEN, MISSING = "reproduced", "not reproduced", "undecided", "not run"
VERDICTS = (REPRODUCED, NOT, OPEN, MISSING)
_PARITY = 90.0
"""Per cent of the decay's gain."""
Found = tuple[str, str]
"""What was found, and the verdict."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, the number that its paper has for it, the answer here, and why they may differ."""

    what: str
    paper: str
    ours: Callable[[Results], Found]
    why: str


def _verdict(value: Interval | None, wanted: tuple[int, ...]) -> str:
    """By the sign of an interval that leaves out 0; one of a single seed decides nothing."""
    if value is None:
        return MISSING
    if value.count < 2:
        return OPEN
    if value.sign in wanted:
        return REPRODUCED
    return OPEN if value.sign == 0 else NOT


def _parity(r: Results) -> Found:
    """Parity is 90 % of the decay's gain or more: no difference that was found proves none."""
    p = r.profile
    decays = [names.decay("main", s, w) for w in p.windows for s in names.STYLES]
    merges = [merge_name(r, d, w) for w in p.windows for d in names.DECAYS]
    ours, best = r.selected_values(merges), r.selected_values(decays)
    stable = r.values(names.stable("main", p.steps))
    seeds = sorted(ours.keys() & best.keys() & stable.keys())
    if not seeds:
        return "", MISSING
    gap = paired(ours, best)
    gain = interval([100 * (stable[s] - ours[s]) / (stable[s] - best[s]) for s in seeds])
    text = (
        f"the mean has of the linear decay's gain {_shares(r)}; best merge − best decay, both "
        f"selected on validation: {shown(gap)}, or {shown(gain, sign=False, digits=0)} % of what "
        "that decay gains"
    )
    if paired(best, stable).sign != -1:  # no gain that there could be a share of
        return text, OPEN
    return text, REPRODUCED if gain.low > _PARITY else NOT if gain.high < _PARITY else OPEN


def _shares(r: Results) -> str:
    stable = names.stable("main", r.profile.steps)
    shares = {
        window: share(
            r, merge_name(r, "mean", window), names.decay("main", "linear", window), stable
        )
        for window in r.profile.windows
    }
    return ", ".join(f"{shown(one, sign=False, digits=0)} % over {w}" for w, one in shares.items())


def _annealing(r: Results) -> Found:
    constant = names.decay("noisy", "constant", r.profile.middle)
    linear = names.decay("noisy", "linear", r.profile.middle)
    mean, ema = (r.difference(f"{constant}, merge {d}", linear) for d in ("mean", "ema"))
    text = f"mean − linear decay: {shown(mean)}, ema − linear decay: {shown(ema)}"
    return text, _verdict(mean, (-1,))


def _ranking(r: Results) -> Found:
    w = r.profile.middle
    sqrt = r.difference(merge_name(r, "1-sqrt", w), merge_name(r, "mean", w))
    ema = r.difference(merge_name(r, "ema", w), merge_name(r, "mean", w))
    text = f"window {w}: 1-sqrt − mean {shown(sqrt)}, ema − mean {shown(ema)}"
    decayed = r.difference(names.decay("main", "1-sqrt", w), names.decay("main", "linear", w))
    text += f"; of trained decays 1-sqrt − linear {shown(decayed)}"
    verdicts = {_verdict(sqrt, (-1,)), _verdict(ema, (1,))}
    return text, next(one for one in (MISSING, NOT, OPEN, REPRODUCED) if one in verdicts)


def _spread(r: Results, merges: list[str]) -> dict[int, float]:
    """Worst less best of their losses, by seed."""
    columns = [column for name in merges if (column := r.values(name))]
    if len(columns) < 2:
        return {}
    seeds = set.intersection(*(set(column) for column in columns))
    return {s: max(c[s] for c in columns) - min(c[s] for c in columns) for s in sorted(seeds)}


def _duration(r: Results) -> Found:
    p = r.profile
    long = _spread(r, [merge_name(r, "mean", w) for w in p.durations])
    steps = p.intervals(p.windows[-1])
    fine = _spread(r, [names.merged("main", "mean", p.windows[-1], i, p.steps) for i in steps])
    if not long.keys() & fine.keys():
        return "", MISSING
    gap = paired(long, fine)
    text = (
        f"worst − best mean over windows of {p.durations[0]} to {p.durations[-1]}: "
        f"{shown(interval(list(long.values())), sign=False)}; over intervals of {steps[0]} to "
        f"{steps[-1]} in the longest trained window: "
        f"{shown(interval(list(fine.values())), sign=False)}; the difference: {shown(gap)}"
    )
    return text, _verdict(gap, (1,))


def _granularity(r: Results) -> Found:
    p = r.profile
    steps, window = p.intervals(p.windows[-1]), p.windows[-1]
    fine, coarse = (names.merged("main", "mean", window, i, p.steps) for i in (steps[0], steps[-1]))
    gap = r.difference(fine, coarse)
    points = window // steps[0] + 1
    return (
        f"window {window}: mean of {points} − of {window // steps[-1] + 1}: {shown(gap)}",
        _verdict(gap, (-1,)),
    )


def _adding_up(r: Results) -> Found:
    """They add up where the sum gains a tenth of the decay's own gain."""
    w = r.profile.middle
    decay = names.decay("main", "linear", w)
    after = r.difference(f"main: decay linear {w}, then merge mean of {w // 2}", decay)
    before = r.difference("main: merge, then decay linear", decay)
    gain = r.difference(decay, names.stable("main", r.profile.steps))
    if after is None or before is None or gain is None:
        return "", MISSING
    text = f"against the decay alone: merged after it {shown(after)}, before it {shown(before)}"
    margin = (1 - _PARITY / 100) * gain.mean
    if gain.sign != -1:
        return text, OPEN
    if min(after.high, before.high) < margin:
        return text, NOT
    return text, REPRODUCED if min(after.low, before.low) > margin else OPEN


def _balance(r: Results) -> Found:
    p = r.profile
    merge = names.merged("moe", "mean", p.middle, p.interval, p.moe_steps)
    decay = names.decay("moe", "linear", p.middle)
    loss, most = (r.difference(merge, decay, metric) for metric in ("test", "max_violation"))
    text = f"mean − linear decay: loss {shown(loss)}, max violation {shown(most, digits=3)}"
    return text, _verdict(most, (-1,))


def _fine_tuning(r: Results) -> Found:
    gap = r.difference("tune: merged", "tune: decayed", "prose-test")
    return f"merged − decayed, after fine-tuning: {shown(gap)}", _verdict(gap, (-1,))


def _early(r: Results) -> Found:
    p = r.profile
    gaps = {
        end: r.difference(
            names.merged("main", "mean", p.middle, p.interval, end), names.stable("main", end)
        )
        for end in (p.early_ends[0], p.steps)
    }
    text = ", ".join(f"ending at {end}: {shown(gap)}" for end, gap in gaps.items())
    first, last = gaps.values()
    verdicts = {_verdict(first, (1,)), _verdict(last, (-1,))}
    return f"mean − constant LR, {text}", next(
        one for one in (MISSING, NOT, OPEN, REPRODUCED) if one in verdicts
    )


def _spike(r: Results) -> Found:
    gap = r.difference("spike: rescued", "spike: spiked")
    healthy = r.difference("spike: rescued", names.stable("main", r.profile.steps))
    return f"rescued − spiked {shown(gap)}, − never spiked {shown(healthy)}", _verdict(gap, (-1,))


def _theory(r: Results) -> Found:
    found = [one for one in r.records("distances") if one["style"] == "linear"]
    if not found:
        return "", MISSING
    p, parts = r.profile, []
    for run, lr in (("main", p.lr), ("low", p.second_lr)):
        for window in (p.windows[0], p.windows[-1]):
            ones = [o["ratio"] for o in found if (o["run"], o["window"]) == (run, window)]
            if ones:
                parts.append(f"LR {lr:g}, {window}: {shown(interval(ones), sign=False, digits=2)}")
    return f"distance to the decay over that of the undecayed weights: {'; '.join(parts)}", "–"


def _prediction(r: Results) -> Found:
    if not prediction(r).rows:
        return "", MISSING
    found = ", ".join(within_noise(r)) or "none"
    return f"rules of the path that are within noise of the best: {found}", "–"


def _behind(r: Results) -> Found:
    parts = []
    for window in r.profile.windows:
        gap = r.difference(merge_name(r, "mean", window), names.decay("main", "linear", window))
        behind = list(given_up(r, "main", window).values())
        if gap is not None and behind:
            parts.append(f"{window}: {shown(gap)}, given up {shown(interval(behind))}")
    return (f"mean − linear decay, over {'; '.join(parts)}", "–") if parts else ("", MISSING)


CLAIMS = (
    Claim(
        what="Without better data at the end, merging equals decaying",
        paper="Figure 5a: parity",
        ours=_parity,
        why="These runs are on no plateau. A window in which the loss still falls has older points"
        " that are worse, and a merge is made of these, too; a decay begins where they are and goes"
        " on. The longer the window, the more that is: see the claim about progress below.",
    ),
    Claim(
        what="With high-quality data at the end, merging is ahead",
        paper="average of benchmarks 63.95 against 62.67",
        ours=_annealing,
        why="The clean text is new to the run, so that the loss falls fast within the window, and"
        " what a merge gives up of it is more than without: EMA, of the newest points most, gives"
        " up least. Loss, not benchmarks.",
    ),
    Claim(
        what="1-sqrt > mean > EMA",
        paper="Table 3: 64.06, 63.95, 63.01",
        ours=_ranking,
        why="As a merge 1-sqrt puts most weight on the oldest checkpoint: free where the run no"
        " longer gets better, dear where it does. Differences of 0.1 at one seed are small in the"
        " paper too.",
    ),
    Claim(
        what="The duration matters more than interval and number of checkpoints",
        paper="Section 4: the most critical factor",
        ours=_duration,
        why="Ranges depend on what is varied: here both over a factor of 32. Most of that of the"
        " intervals lies between two and five points, fewer than anybody would merge; from nine on"
        " it is the smaller one.",
    ),
    Claim(
        what="Finer checkpoints of the same window are better",
        paper="Table 4, 80B tokens: 5B×16 63.63, 10B×8 63.78, 20B×4 63.36, 40B×2 62.77,"
        " 80B×1 60.33",
        ours=_granularity,
        why="More points average more noise, as long as they are not the same noise.",
    ),
    Claim(
        what="Merging and decaying do not add up",
        paper="Figures 5b, 5c",
        ours=_adding_up,
        why="What is decayed has little noise left to average, and the older half of a decay is"
        " worse than its end.",
    ),
    Claim(
        what="Experts are loaded more evenly after a merge than after a decay, although the loss is"
        " higher",
        paper="Table 5: loss 0.697 against 0.675",
        ours=_balance,
        why="8 experts and 2 layers, and so short a run that experts still settle: the longer"
        " window reaches back to where loads were others. The expert biases are merged with the"
        " weights.",
    ),
    Claim(
        what="The advantage survives fine-tuning",
        paper="average after SFT 64.07 against 62.90",
        ours=_fine_tuning,
        why="An advantage that is not there before fine-tuning cannot survive it.",
    ),
    Claim(
        what="Merging too early hurts, merging in the stable phase helps",
        paper="arXiv 2505.12082 merges in the stable phase",
        ours=_early,
        why="Early on the path is mostly drift, and the mean gives half of a window's progress up.",
    ),
    Claim(
        what="A run that spiked can be rescued from a merge of what came before",
        paper="arXiv 2505.12082: PMA-init recovers from loss spikes",
        ours=_spike,
        why="The run without a spike is also what going back to the last checkpoint before it"
        " gives: no worse than the merge, which is for runs where that one is bad already.",
    ),
    Claim(
        what="A merge emulates the decay (Theorem 3.1)",
        paper="exact along the same trajectory",
        ours=_theory,
        why="A decay leaves that trajectory; 0 would be an exact emulation, 1 none. It is the"
        " nearer, in weights and in loss, the smaller the LR and the shorter the window.",
    ),
    Claim(
        what="A mean lacks, against the decay, the progress that the run made within its window",
        paper="none: a reading of the river-valley picture",
        ours=_behind,
        why="By how much the constant LR's validation loss was higher, on average at the points"
        " that are merged, than at the end: any run's log has it. Where it is small, as on the"
        " plateau of a long run, so is what a merge lacks.",
    ),
    Claim(
        what="The path's noise and drift say which window is best",
        paper="none",
        ours=_prediction,
        why="In weights the path is a random walk at every length (share of walk 1.00): what it is"
        " in directions that matter to the loss, distances of weights do not say, and each rule"
        " picks the longest window. So there is no `wsm suggest`: `wsm sweep` makes all windows of"
        " one read, and `wsm select` or `wsm search` choose by a loss.",
    ),
)
