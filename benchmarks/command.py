"""``fastbp bench``: what to measure, from the command line to the report."""

from __future__ import annotations

import argparse

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = """Measure every op and whole training steps on the engines that are here, and print tables.

Each kernel is checked before it is timed; one that computes something wrong is not timed, and the exit code is 1. The
first time, kernels are compiled, which takes minutes. --compare tells what changed between two runs beyond noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastbp bench``."""
    add = parser.add_argument
    add("--quick", action="store_true", help="less of all, in less than a minute")
    add("--suites", metavar="S,S", help="ops, steps, epochs, accuracy (default: all; with --quick without accuracy)")
    add("--ops", metavar="OP,OP", help="names of ops (default: all)")
    add("--engines", metavar="E,E", help="engines (default: those that are installed)")
    add("--sizes", metavar="S,S", help="small, medium, large (default: all; with --quick the first two)")
    add("--dtypes", metavar="D,D", help="float32, float64 (default: both; with --quick float32)")
    add("--networks", metavar="N,N", help="such as 64-128-10 (default: all; with --quick the first three)")
    add("--against", metavar="L,L", help="other libraries to train with: torch, torch.compile, jax, sklearn")
    add("--repeats", metavar="N", help="turns of each case (default: 11; with --quick 5)")
    add("--seeds", metavar="N", help="of the time to accuracy (default: 7; with --quick 3)")
    add("--json", metavar="F", help="write all figures")
    add("--html", metavar="F", help="write a page with pictures")
    add("--pictures", metavar="FOLDER", help="write the pictures and tables as files of their own")
    add("--from", metavar="F.json", dest="source", help="measure nothing, report what --json wrote")
    add("--compare", metavar=("A.json", "B.json"), nargs=2, help="exit code 1 where B is slower than A beyond noise")
    add("--threshold", metavar="F", default="0.1", help="of --compare: what counts as a change (default: 0.1)")


def run(options: argparse.Namespace) -> int:
    """``fastbp bench``; 1 where a result is wrong, or, in a comparison, something became slower."""
    from .suite import compare, report  # not with the other commands, which they would slow down

    return compare(options) if options.compare else report(options)
