"""What changed between two runs beyond their noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cases import median
from .report import Report, Table, groups, time_text

__all__ = ["Change", "changes", "changes_table", "ratio_interval"]

RESAMPLES = 2000
CONFIDENCE = 0.99
THRESHOLD = 0.1


class Change(NamedTuple):
    """How a case changed: seconds before and after, the ratio of their medians, and its interval.

    `verdict` is "slower" or "faster" where the whole interval lies beyond the threshold, and otherwise "same"; "wrong"
    where the case is no longer computed right.
    """

    case: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval of median(after) / median(before) (Efron and Tibshirani, 1993, chapter 13).

    Examples
    --------
    >>> ratio_interval([1, 1, 1, 1, 1], [2, 2, 2, 2, 2])
    (2.0, 2.0)
    """
    rng = np.random.default_rng(0)
    medians = [
        np.median(rng.choice(np.asarray(seconds, float), (RESAMPLES, len(seconds))), axis=1)
        for seconds in (before, after)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail])
    return float(low), float(high)


def changes(before: Report, after: Report, threshold: float = THRESHOLD) -> list[Change]:
    """Compare what both runs measured.

    Parameters
    ----------
    before, after : dict
        Reports, as `report.load` gives them.
    threshold : float, default 0.1
        How much slower or faster counts: 0.1 is a tenth.

    Raises
    ------
    ValueError
        Where they have no case in common.
    """
    old = {(group, row["who"]): row for group, rows in groups(before["rows"]).items() for row in rows}
    found = []
    for group, rows in groups(after["rows"]).items():
        for row in rows:
            other = old.get((group, row["who"]))
            if other is None or not other["seconds"]:
                continue
            name = ", ".join(filter(None, [*group, row["who"]]))
            if row.get("error"):
                found.append(Change(name, median(other), np.nan, np.nan, np.nan, np.nan, "wrong"))
                continue
            low, high = ratio_interval(other["seconds"], row["seconds"])
            ratio = median(row) / median(other)
            verdict = "slower" if low > 1 + threshold else "faster" if high < 1 / (1 + threshold) else "same"
            found.append(Change(name, median(other), median(row), ratio, low, high, verdict))
    if not found:
        raise ValueError("the two runs have no case in common")
    return found


def changes_table(found: Sequence[Change]) -> Table:
    """Those that changed, the worst first."""
    changed = sorted((c for c in found if c.verdict != "same"), key=lambda c: (c.verdict != "wrong", -c.ratio))
    rows = [
        [c.case, time_text(c.before), time_text(c.after), f"{c.ratio:.2f}", f"{c.low:.2f} to {c.high:.2f}", c.verdict]
        for c in changed
    ]
    return Table("What changed beyond noise", ["case", "before", "after", "ratio", f"{CONFIDENCE:.0%}", ""], rows)


def doubts_between(before: Report, after: Report) -> list[str]:
    """What makes a comparison doubtful: other machines, another speed of the same one, doubts of the runs."""
    found = []
    for name in ("cpu", "cores", "usable_cores", "blas", "pinned"):
        if before["machine"][name] != after["machine"][name]:
            found.append(f"{name} was {before['machine'][name]}, is {after['machine'][name]}")
    for dtype, flops in before["roofs"]["flops"].items():
        ratio = after["roofs"]["flops"][dtype] / flops
        if not 0.9 < ratio < 1.1:
            found.append(f"the machine itself multiplies {dtype} matrices {ratio:.2f} times as fast as before")
    return found + [
        f"in the {which} run, {x}" for which, run in (("first", before), ("second", after)) for x in run["doubts"]
    ]
