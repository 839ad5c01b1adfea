"""The report of a run: its JSON file, and its tables as text, Markdown and HTML."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .cases import Key, Row, key, median
from .machine import Roofs, attainable
from .training import GEMMS

__all__ = [
    "Report",
    "Table",
    "gflops",
    "groups",
    "load",
    "machine_lines",
    "roofs_of",
    "save",
    "share_of_roof",
    "tables",
]

FORMAT = 1
#: What a run found, as it stands in its JSON file: benchmarks/README.md says what is in it.
Report: TypeAlias = "dict[str, Any]"


def save(path: str | Path, report: Report) -> None:
    """Write a report as JSON."""
    Path(path).write_text(json.dumps({"format": FORMAT} | report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: str | Path) -> Report:
    """Read what `save` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        Where there is no file, or it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or "rows" not in report:
        raise ValueError(
            f"{path} is no report of fastbp bench in format {FORMAT}; fastbp bench --json {path} makes one"
        )
    return report


def roofs_of(report: Report) -> Roofs:
    roofs = report["roofs"]
    return Roofs(roofs["flops"], [(size, speed) for size, speed in roofs["copies"]], roofs["core"])


def groups(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows by what they measure."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def gflops(row: Row) -> float:
    """10^9 operations a second."""
    return float(row["flops"] / median(row) / 1e9)


def share_of_roof(row: Row, roofs: Roofs) -> float:
    """The least seconds that this machine could take, as a share of those taken."""
    return attainable(roofs, row["dtype"], row["flops"], row["bytes"]) / median(row)


class Table(NamedTuple):
    """A title, the heads of its columns, and rows of as many cells."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """For a terminal."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.head, *self.rows)
        ]
        return "\n".join([self.title, "", lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def markdown(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in (self.head, ["---"] * len(self.head), *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            marked = [f"<{tag}{' class=best' if '*' in cell else ''}>{html.escape(cell)}</{tag}>" for cell in cells]
            return f"<tr>{''.join(marked)}</tr>"

        body = "\n".join(line(row, "td") for row in self.rows)
        return f"<h3>{html.escape(self.title)}</h3>\n<table>\n{line(self.head, 'th')}\n{body}\n</table>"


def time_text(seconds: float) -> str:
    """Three digits and a unit.

    Examples
    --------
    >>> time_text(0.00001234), time_text(0.25)
    ('12.3 us', '250 ms')
    """
    if not math.isfinite(seconds) or seconds <= 0:
        return "-"
    unit, scale = next(
        (u, s) for u, s in (("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)) if seconds * s >= 1 or s == 1e9
    )
    return f"{three_digits(seconds * scale)} {unit}"


def three_digits(value: float) -> str:
    """Three digits at least, and none behind a point that are not worth it."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else f"{value:g}"


def cells(rows: Sequence[Row], who: Sequence[str]) -> list[str]:
    """The times of some rivals: the fastest marked, how many times longer the others take."""
    timed = {row["who"]: median(row) for row in rows if row["seconds"]}
    least = min((seconds for name, seconds in timed.items() if name != GEMMS), default=math.nan)
    found = []
    for name in who:
        if name in timed:
            ratio = timed[name] / least
            found.append(f"{time_text(timed[name])} {'*' if ratio == 1 else f'({ratio:.2f})'}")
        else:
            found.append("WRONG" if any(row["who"] == name for row in rows) else "")
    return found


def engine_rows(rows: Sequence[Row], engines: Sequence[str]) -> list[Row]:
    return [row for row in rows if row["who"] in engines and row["seconds"]]


def tables(report: Report) -> Iterator[Table]:
    """The tables of a report: what is wrong, ops, several ways to compute one op, devices, training, accuracy."""
    rows, roofs = report["rows"], roofs_of(report)
    if wrong := [row for row in rows if row.get("error")]:
        yield Table(
            "WRONG RESULTS, not timed",
            ["what", "who", "error"],
            [[" ".join(filter(None, key(row)[1:])), row["who"], row["error"]] for row in wrong],
        )
    ops = [row for row in rows if row["suite"] == "ops"]
    engines = report["settings"]["engines"]
    for dtype in dict.fromkeys(row["dtype"] for row in ops):
        yield from op_tables([row for row in ops if row["dtype"] == dtype], dtype, engines, roofs)
    phased = [row for row in ops if row.get("phases")]
    if phased:
        names = list(phased[0]["phases"])
        yield Table(
            "Where the time of an op on a device goes",
            ["op", "size", "dtype", "engine", *names],
            [
                [*map(row.get, ("name", "size", "dtype", "who")), *map(time_text, row["phases"].values())]
                for row in phased
            ],
        )
    for suite in ("steps", "epochs"):
        if found := [row for row in rows if row["suite"] == suite]:
            yield training_table(found, suite)
    if found := [row for row in rows if row["suite"] == "accuracy"]:
        who = list(dict.fromkeys(row["who"] for row in found))
        lines = []
        for (_, name, *_), rivals in groups(found).items():
            times = {
                row["who"]: text for row, text in zip(rivals, cells(rivals, [r["who"] for r in rivals]), strict=True)
            }
            lines.append([name, *(times.get(w, "") for w in who)])
            lines.append(["  epochs", *(epochs_text(rivals, w) for w in who)])
        yield Table("Time to accuracy on held-out rows, medians over seeds", ["goal", *who], lines)


def epochs_text(rivals: Sequence[Row], who: str) -> str:
    row = next((row for row in rivals if row["who"] == who), None)
    if row is None:
        return ""
    reached = [epochs for epochs in row["epochs"] if epochs]
    missed = len(row["epochs"]) - len(reached)
    said = [f"{statistics.median(reached):g}"] if reached else []
    return ", ".join(said + ([f"{missed} of {len(row['epochs'])} seeds do not get there"] if missed else []))


def op_tables(rows: Sequence[Row], dtype: str, engines: Sequence[str], roofs: Roofs) -> Iterator[Table]:
    """One row an op and size, with what the fastest engine attains; and the ops with more ways, one by one."""
    who, lines, others = [*engines, "notebook"], [], []
    for (_, name, size, _), rivals in groups(rows).items():
        timed = engine_rows(rivals, engines)
        best = min(timed, key=median, default=None)
        attained = ["", "", ""]
        if best:
            attained = [
                three_digits(gflops(best)) if best["flops"] else "",
                three_digits(best["bytes"] / median(best) / 1e9),
                f"{share_of_roof(best, roofs):.0%}",
            ]
        lines.append([name, size, *cells([r for r in rivals if r["who"] in who], who), *attained])
        if any(row["who"] not in who for row in rivals):
            names = [row["who"] for row in rivals]
            others += [[f"{name}, {size}", *pair] for pair in zip(names, cells(rivals, names), strict=True)]
    head = ["op", "size", *who, "GFLOP/s", "GB/s", "of roof"]
    yield Table(f"Ops, {dtype}: the fastest is marked, the others are so many times slower", head, lines)
    if others:
        yield Table(f"Several ways to one result, {dtype}", ["op", "way", "time"], others)


def training_table(rows: Sequence[Row], suite: str) -> Table:
    """One row a network."""
    who = list(dict.fromkeys(row["who"] for row in rows))
    one = "fastbp numba, 1 thread"
    lines = []
    for (_, name, *_), rivals in groups(rows).items():
        line = [f"{name}, {rivals[0]['sizes']['batch']}", *cells(rivals, who)]
        alone = next((row for row in rivals if row["who"] == one and row["seconds"]), None)
        if one in who:
            peaks = [flops for flops in alone["core_flops"] if flops] if alone else []
            share = alone["flops"] / median(alone) / statistics.median(peaks) if alone and peaks else math.nan
            line.append("" if math.isnan(share) else f"{share:.0%}")
        lines.append(line)
    what = "A training step" if suite == "steps" else "An epoch, with what a call of fit costs besides"
    return Table(what, ["network, batch", *who, *(["1 thread of its peak"] if one in who else [])], lines)


def machine_lines(report: Mapping[str, Any]) -> list[str]:
    """The machine in a few lines, and what makes the figures doubtful."""
    about, roofs = report["machine"], report["roofs"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    blas = ", ".join(f"{x['name']} {x['architecture']} ({x['num_threads']} threads)" for x in about["blas"])
    copies = ", ".join(f"{speed / 1e9:.0f} at {size / 2**20:.3g} MiB" for size, speed in roofs["copies"])
    products = ", ".join(f"{flops / 1e9:.0f} {dtype}" for dtype, flops in roofs["flops"].items())
    return [
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, {about['usable_cores']} usable, {about['system']}",
        f"Python {about['python']}, {versions}",
        f"BLAS: {blas or 'unknown'}{''.join(f', {n}={v}' for n, v in about['pinned'].items())}",
        f"roofs: matrix product {products} GFLOP/s; copies {copies} GB/s"
        + (f"; one core in registers {roofs['core'] / 1e9:.0f} GFLOP/s" if roofs["core"] else ""),
        *(f"doubtful: {line}" for line in report["doubts"]),
    ]
