"""The pictures of a report, and the HTML page that holds them."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastbp.tables import need

from .cases import Row, median
from .report import Report, gflops, groups, machine_lines, roofs_of, tables
from .training import GEMMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "write_html", "write_pictures"]

COLUMNS = 5
COLOURS = {"numpy": "#4c72b0", "numba": "#dd5b36", "cupy": "#3a923a", "notebook": "#8d8d8d"}
SPARE = ["#8172b3", "#937860", "#da8bc3", "#ccb974", "#64b5cd", "#2f6f5f"]
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 2px 9px; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.best { font-weight: 600 } .doubtful { background: #fff3cd; padding: 4px 9px } .wrap { overflow-x: auto }
svg { max-width: 100%; height: auto } p { margin: 3px 0 }"""


def figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure without a window."""
    need("matplotlib")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout=layout)
    FigureCanvasSVG(made)
    return made


def colours(who: Sequence[str]) -> dict[str, str]:
    """One colour for each name, the same in all pictures."""
    spare = iter(SPARE * 3)
    return {name: COLOURS.get(name.removeprefix("fastbp ")) or next(spare) for name in dict.fromkeys(who)}


def draw(report: Report) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of each picture that the report has figures for."""
    ops = [row for row in report["rows"] if row["suite"] == "ops" and row["seconds"]]
    shown = [*report["settings"]["engines"], "notebook"]
    if ops:
        rows = [row for row in ops if row["dtype"] == ops[0]["dtype"] and row["who"] in shown]
        yield "ops", f"Speed by size for each op, {ops[0]['dtype']}", draw_sizes(rows)
        engines = [row for row in rows if row["who"] != "notebook" and row["flops"]]
        if engines:
            yield "roofline", f"The roofline, {ops[0]['dtype']}", draw_roofline(engines, report)
    steps = [row for row in report["rows"] if row["suite"] == "steps" and row["seconds"]]
    if steps:
        yield "steps", "A training step, by network", draw_steps(steps)
    accuracy = [row for row in report["rows"] if row["suite"] == "accuracy" and row["seconds"]]
    if accuracy:
        yield "accuracy", "Accuracy on held-out rows by seconds of training", draw_accuracy(accuracy)


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def draw_sizes(rows: Sequence[Row]) -> Figure:
    """A small picture an op: GFLOP/s, or GB/s for those that only move, by the bytes they touch."""
    by_op = [(name, list(found)) for name, found in groupby(rows, key=lambda row: row["name"])]
    lines = math.ceil(len(by_op) / COLUMNS)
    height = 2.1 * lines + 0.9
    made = figure(14, height, None)  # to arrange so many would take a minute
    made.subplots_adjust(0.04, 0.6 / height, 0.99, 1 - 0.6 / height, wspace=0.2, hspace=0.45)
    shade = colours([row["who"] for row in rows])
    grid = made.subplots(lines, COLUMNS, squeeze=False).ravel()
    for axes, (name, found) in zip(grid, by_op, strict=False):
        speed = gflops if found[0]["flops"] else lambda row: row["bytes"] / median(row) / 1e9
        for who in dict.fromkeys(row["who"] for row in found):
            mine = sorted((row for row in found if row["who"] == who), key=lambda row: row["bytes"])
            axes.loglog(
                [row["bytes"] for row in mine], [speed(row) for row in mine], "o-", color=shade[who], ms=3, lw=1.2
            )
        axes.set_title(f"{name}, {'GFLOP/s' if found[0]['flops'] else 'GB/s'}", fontsize=8, loc="left")
        axes.minorticks_off()
        axes.tick_params(labelsize=6.5)
        tidy(axes)
    for axes in grid[len(by_op) :]:
        axes.set_axis_off()
    for who, colour in shade.items():
        grid[0].plot([], [], "o-", color=colour, ms=3, lw=1.2, label=who)
    made.legend(loc="upper left", ncols=len(shade), frameon=False, fontsize=9)
    made.text(0.5, 0.15 / height, "bytes of the arguments", ha="center", fontsize=9)
    return made


def draw_roofline(rows: Sequence[Row], report: Report) -> Figure:
    """What each kernel attains, by its operations a byte, under what the machine can do."""
    made = figure(10, 6)
    axes = made.subplots()
    roofs, dtype = roofs_of(report), rows[0]["dtype"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 2
    peak = roofs.flops[dtype]
    for size, speed in (max(roofs.copies, key=lambda copy: copy[1]), roofs.copies[-1]):
        xs = [left, peak / speed, max(right, peak / speed)]
        axes.loglog(xs, [min(peak, speed * x) / 1e9 for x in xs], color="#555", lw=1)
        label = f" {speed / 1e9:.0f} GB/s, a copy of {size / 2**20:.3g} MiB"
        axes.annotate(label, (left, speed * left / 1e9), fontsize=8, color="#555", va="bottom")
    axes.annotate(
        f"{peak / 1e9:.0f} GFLOP/s, a product of large matrices",
        (right, peak / 1e9),
        fontsize=8,
        ha="right",
        va="bottom",
    )
    shade = colours([row["who"] for row in rows])
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for who, colour in shade.items():
        for place, size in enumerate(sizes):
            mine = [row for row in rows if row["who"] == who and row["size"] == size]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in mine], [gflops(row) for row in mine], s=12 + 16 * place,
                color=colour, alpha=0.65, linewidths=0, label=f"{who}, {size}",
            )  # fmt: skip
    largest = [row for row in rows if row["size"] == sizes[-1]]
    for (_, name, *_), rivals in groups(largest).items():
        best = min(rivals, key=median)
        axes.annotate(
            name,
            (best["flops"] / best["bytes"], gflops(best)),
            fontsize=5,
            alpha=0.75,
            xytext=(3, 2),
            textcoords="offset points",
        )
    axes.set(xlabel="operations a byte", ylabel="GFLOP/s")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return made


def draw_steps(rows: Sequence[Row]) -> Figure:
    """Bars: how many times longer than the fastest."""
    by_network = list(groups(rows).values())
    made = figure(13, 1.1 + 0.28 * max(map(len, by_network)))
    shade = colours([row["who"] for row in rows])
    for axes, rivals in zip(made.subplots(1, len(by_network), squeeze=False)[0], by_network, strict=True):
        least = min(median(row) for row in rivals if row["who"] != GEMMS)
        ordered = sorted(rivals, key=median, reverse=True)
        times = [median(row) / least for row in ordered]
        axes.barh([row["who"] for row in ordered], times, color=[shade[row["who"]] for row in ordered])
        for place, ratio in enumerate(times):
            axes.annotate(f" {ratio:.2f}", (ratio, place), va="center", fontsize=7)
        axes.set_xscale("log")
        axes.set_xlim(0.5, 2.5 * max(times))
        axes.set_title(
            f"{rivals[0]['name']}\nbatch {rivals[0]['sizes']['batch']}, {1e6 * least:,.1f} us", fontsize=7, loc="left"
        )
        axes.tick_params(labelsize=7)
        axes.minorticks_off()
        tidy(axes)
    made.supxlabel("times as long as the fastest", fontsize=9)
    return made


def draw_accuracy(rows: Sequence[Row]) -> Figure:
    goals = list(groups(rows).values())
    made = figure(6.5 * len(goals), 4.2)
    shade = colours([row["who"] for row in rows])
    for axes, rivals in zip(made.subplots(1, len(goals), squeeze=False)[0], goals, strict=True):
        for row in rivals:
            axes.plot(
                row["curve_seconds"], row["curve"], "o-", ms=2.5, lw=1.2, color=shade[row["who"]], label=row["who"]
            )
        axes.axhline(rivals[0]["target"], color="#555", lw=0.8, ls="--")
        axes.set_xscale("log")
        axes.set_ylim(max(0.0, rivals[0]["target"] - 0.12), None)
        axes.set_title(rivals[0]["name"], fontsize=10, loc="left")
        axes.set(xlabel="seconds of training", ylabel="accuracy")
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    return made


def svg(made: Figure) -> str:
    """The figure as an SVG element: text stays text, and equal figures give equal files."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastbp", "font.family": "sans-serif"}):
        made.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def write_pictures(report: Report, folder: str | Path) -> list[Path]:
    """Write each picture of a report as an SVG file, and its tables as ``tables.md``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name, _, made in draw(report):
        written.append(Path(folder) / f"{name}.svg")
        written[-1].write_text(svg(made), encoding="utf-8")
    written.append(Path(folder) / "tables.md")
    about = "\n".join(f"- {line}" for line in machine_lines(report))
    text = "\n\n".join(table.markdown() for table in tables(report))
    written[-1].write_text(f"{about}\n\n{text}\n", encoding="utf-8")
    return written


def write_html(report: Report, path: str | Path) -> None:
    """Write a page that needs no other file."""
    parts = []
    for line in machine_lines(report):
        mark = " class=doubtful" if line.startswith("doubtful") else ""
        parts.append(f"<p{mark}>{html.escape(line)}</p>")
    for _, caption, made in draw(report):
        drawing = svg(made)
        parts.append(f"<h2>{html.escape(caption)}</h2>\n{drawing[drawing.index('<svg') :]}")
    parts += [f"<div class=wrap>{table.html()}</div>" for table in tables(report)]
    page = "\n".join(parts)
    Path(path).write_text(
        f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>fastbp bench</title>\n<style>{STYLE}</style>\n"
        f"<h1>fastbp bench</h1>\n{page}\n</html>\n",
        encoding="utf-8",
    )
