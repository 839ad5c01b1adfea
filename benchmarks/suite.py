"""A run of the suite: from the options of ``fastbp bench`` to its report."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import fastbp
from fastbp.kernels.engine import Engine
from fastbp.kernels.ops import OPS
from fastbp.progress import Progress
from fastbp.tables import need

from . import accuracy
from . import report as reports
from .cases import measure
from .compare import changes, changes_table, doubts_between
from .devices import timing_of
from .libraries import LIBRARIES, check_installed
from .machine import doubts, load_average, look, machine, measure_roofs
from .ops import SIZES, op_cases
from .pictures import write_html, write_pictures
from .training import NETWORKS, training_cases

__all__ = ["Plan", "compare", "measure_all", "plan_of", "report"]

SUITES = ["ops", "steps", "epochs", "accuracy"]
DTYPES = ["float32", "float64"]


def report(options: argparse.Namespace) -> int:
    """Measure, or read, and write all that was asked for; 1 where a result is wrong."""
    for path in filter(None, [options.json, options.html]):
        if not os.access(Path(path).absolute().parent, os.W_OK) or Path(path).is_dir():
            raise FileNotFoundError(f"cannot write {path!r}: it is a folder, or its folder is missing or read-only")
    if options.html or options.pictures:
        need("matplotlib")
    if options.pictures:
        Path(options.pictures).mkdir(parents=True, exist_ok=True)
    found = reports.load(options.source) if options.source else measure_all(plan_of(options))
    if options.json:
        reports.save(options.json, found)
    for table in reports.tables(found):
        print(f"{table.text()}\n")
    print("\n".join(reports.machine_lines(found)))
    if options.html:
        write_html(found, options.html)
    if options.pictures:
        print(f"wrote {', '.join(map(str, write_pictures(found, options.pictures)))}")
    return 1 if any(row.get("error") for row in found["rows"]) else 0


def compare(options: argparse.Namespace) -> int:
    """Compare two reports; 1 where something became slower or wrong."""
    try:
        threshold = float(options.threshold)
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold < 10:
        raise ValueError(f"--threshold must be a number from 0 to below 10, such as 0.1; got {options.threshold!r}")
    before, after = map(reports.load, options.compare)
    found = changes(before, after, threshold)
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("slower", "faster", "wrong", "same")}
    if counts["same"] < len(found):
        print(f"{changes_table(found).text()}\n")
    print(f"{len(found)} cases: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    for line in doubts_between(before, after):
        print(f"doubtful: {line}")
    return 1 if counts["slower"] or counts["wrong"] else 0


class Plan(NamedTuple):
    """What to measure."""

    suites: list[str]
    ops: list[str]
    engines: list[Engine]
    sizes: list[str]
    dtypes: list[str]
    networks: list[str]
    libraries: list[str]
    repeats: int
    seconds: float
    seeds: int
    quick: bool


def plan_of(options: argparse.Namespace) -> Plan:
    """Read the options.

    Raises
    ------
    ValueError
        For a name that nothing has; the text lists those that are known.
    """
    quick = options.quick
    if options.suites:
        suites = chosen("--suites", options.suites, SUITES)
    elif options.ops and not options.networks:
        suites = ["ops"]
    elif options.networks and not options.ops:
        suites = ["steps", "epochs"]
    else:
        suites = SUITES[: 3 if quick else 4]
    libraries = chosen("--against", options.against, LIBRARIES) if options.against else []
    for name in libraries:
        check_installed(name)
    return Plan(
        suites,
        chosen("--ops", options.ops, OPS) if options.ops else list(OPS),
        engines_of(options.engines),
        chosen("--sizes", options.sizes, SIZES) if options.sizes else list(SIZES)[: 2 if quick else 3],
        chosen("--dtypes", options.dtypes, DTYPES) if options.dtypes else DTYPES[: 1 if quick else 2],
        chosen("--networks", options.networks, NETWORKS) if options.networks else list(NETWORKS)[: 3 if quick else 5],
        libraries,
        count("--repeats", options.repeats) if options.repeats else 5 if quick else 11,
        0.001 if quick else 0.01,
        count("--seeds", options.seeds) if options.seeds else 3 if quick else 7,
        quick,
    )


def chosen(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in ``"a,b"``, each of them known, in the order of `known`."""
    names, all_names = [part.strip() for part in text.split(",")], list(known)
    for name in names:
        if name not in all_names:
            near = difflib.get_close_matches(name, all_names)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"{option}: there is no {name!r}; {hint}known are {', '.join(all_names)}")
    return [name for name in all_names if name in names]


def count(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, got {text!r}")
    return int(text)


def engines_of(text: str | None) -> list[Engine]:
    """The engines to measure; by default those that are here and that can be measured."""
    if text:
        found = [fastbp.engine(name.strip()) for name in text.split(",")]
        for engine in found:
            timing_of(engine)
        return found
    found = []
    for info in fastbp.engines():
        if info.available:
            engine = fastbp.engine(info.name)
            try:
                timing_of(engine)
                found.append(engine)
            except ValueError as error:
                print(f"fastbp: note: {error}", file=sys.stderr)
    return found


def measure_all(plan: Plan) -> reports.Report:
    """Run a plan; the report."""
    load, passes = load_average(), min(plan.repeats, 2 if plan.quick else 3)
    cases = list(op_cases(plan.ops, plan.engines, plan.sizes, plan.dtypes)) if "ops" in plan.suites else []
    training = training_cases(plan.networks, plan.engines, plan.libraries)
    cases += [case for case in training if case.suite in plan.suites]
    who = accuracy.contenders(plan.engines, plan.libraries)
    goals = list(accuracy.GOALS)[: 1 if plan.quick else None] if "accuracy" in plan.suites else []
    for name in goals:
        accuracy.GOALS[name].load()  # what it needs is missed now, not after the measuring
    total = len(cases) * passes + len(goals) * len(who) * plan.seeds
    with Progress(total, None, "case") as progress:
        roofs = measure_roofs(plan.quick)
        rows, looks = measure(cases, plan.repeats, plan.seconds, lambda _: progress.step({}), passes)
        for name in goals:
            rows += accuracy.reach(name, who, plan.seeds, lambda: progress.step({}))
            looks.append(look())
    return {
        "machine": machine(),
        "settings": {
            "engines": [engine.name for engine in plan.engines],
            "libraries": plan.libraries,
            "quick": plan.quick,
            "repeats": plan.repeats,
            "seeds": plan.seeds,
        },
        "roofs": roofs._asdict(),
        "looks": [list(x) for x in looks],
        "doubts": doubts(looks, load),
        "rows": rows,
    }
