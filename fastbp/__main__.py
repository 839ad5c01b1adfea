"""The command line: ``fastbp train``, ``predict``, ``check``, ``bench``, ``info``."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .activations import ReLU
from .benchmarks.command import DESCRIPTION, add_arguments
from .benchmarks.command import run as run_bench
from .conformance import check
from .cross_entropy import SoftmaxCrossEntropy
from .encoding import Category, Encoder, Split, prepare
from .files import load, read_metadata
from .info import print_info
from .layers import Dense, Layer
from .losses import MeanSquaredError
from .model import Sequential
from .optim import Adam
from .selection import choice
from .tables import load_table, need, read_table
from .version import __version__

__all__ = ["main"]

STEPS = 3000  # about how many, where the user names no epochs
PICTURES = ".png", ".pdf", ".svg"
LINES = 8  # about how many are printed while training
LOOKS = 40  # about how often the held-out rows are looked at, for the plot

EXAMPLES = """examples:
  fastbp train digits --engine numba
  fastbp train spiral --plot spiral.png
  fastbp train houses.csv --target price --save houses.model
  fastbp predict houses.model new.csv --output prices.csv
  fastbp check numba
  fastbp bench --quick
  fastbp info
"""
TRAIN = """Train a network of dense layers and ReLU with Adam, on 80 % of the rows; the others are held out to judge it.

Numbers are standardised; a missing one (empty, NA, ?) counts as the mean. Texts and bools become one column a value; a
missing text is a value of its own, and a text that training has not seen becomes zeros. Left out are rows without a
target, columns without a name, and texts that differ in more than half the rows or have over 1,000 values.
A target of texts, bools or up to 20 different integers means classification, any other one regression."""
PREDICT = """Write a CSV line for each row: the label and each class's probability, or the prediction of a regression.

The file needs the columns that the model was trained on, in any order; others, also the target, may be there."""

CHECK = """Check that an engine computes each op right, and keeps the promises that layers rely on, which `fastbp.check`
lists. Prints a table, and ends with exit code 1 where a promise is broken. The first time, an engine may have to
compile: Numba takes a minute or two."""


class Parser(argparse.ArgumentParser):
    """One line for a wrong command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastbp: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        The exit code: 0, or 1 where ``check`` or ``bench`` found a fault. What the user did wrong becomes one line on
        stderr and SystemExit with code 2.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    code = 0
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # as with: fastbp predict ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        parser.exit(2, f"fastbp: error: {' '.join(str(error).split())}\n")
    except MemoryError as error:
        parser.exit(2, f"fastbp: error: not enough memory: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nfastbp: interrupted\n")
    return code


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("fastbp", description="Train dense networks, fast.", epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fastbp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a network on a table", description=TRAIN, formatter_class=raw)
    add = train.add_argument
    add("source", metavar="NAME_OR_FILE", help="spiral, digits, or a file: .csv, .tsv, .parquet, .npz (X and y)")
    add("--target", metavar="COLUMN", help="what to predict (default: the last column; y in an NPZ file)")
    add("--task", choices=["classification", "regression"], help="default: by the target's type")
    add("--hidden", type=sizes, metavar="N,N", help="neurons of the hidden layers (default: 128,64; spiral: 64)")
    add("--epochs", type=count, metavar="N", help="default: about 3,000 steps, in 10 to 300 epochs; spiral: 400")
    add("--batch-size", type=count, default=32, metavar="N", help="default: 32")
    add("--lr", type=positive, metavar="F", help="learning rate (default: 0.001; spiral: 0.01)")
    add("--engine", metavar="E", help="numpy, numba, cupy or auto (default: FASTBP_ENGINE, or else numpy)")
    add(
        "--seed",
        type=lambda text: count(text, least=0),
        default=0,
        metavar="N",
        help="for the split, weights and shuffles (default: 0)",
    )
    add("--test-size", type=fraction, default=0.2, metavar="F", help="part of the rows to hold out (default: 0.2)")
    add("--plot", metavar="FILE.png", help="draw the loss, and the decision regions where inputs are two numbers")
    add("--save", metavar="FILE", help="write the model, for fastbp predict")
    add("--quiet", action="store_true", help="print the summary alone")
    train.set_defaults(run=run_train)

    predict = commands.add_parser(
        "predict", help="apply a saved model to a table", description=PREDICT, formatter_class=raw
    )
    predict.add_argument("model", metavar="MODEL", help="what fastbp train --save wrote")
    predict.add_argument("file", metavar="FILE", help="a table: .csv, .tsv, .parquet, .npz (X)")
    predict.add_argument("--output", metavar="OUT.csv", help="default: standard output")
    predict.add_argument("--engine", metavar="E", help="numpy, numba or cupy")
    predict.set_defaults(run=run_predict)

    check = commands.add_parser(
        "check", help="hold an engine against the contract", description=CHECK, formatter_class=raw
    )
    check.add_argument("engine", metavar="ENGINE", help="numpy, numba, cupy, or the name of an installed one")
    check.add_argument("--ops", metavar="OP,OP", help="names of ops (default: all)")
    check.set_defaults(run=run_check)

    bench = commands.add_parser(
        "bench", help="measure ops and training on this machine", description=DESCRIPTION, formatter_class=raw
    )
    add_arguments(bench)
    bench.set_defaults(run=run_bench)

    info = commands.add_parser(
        "info", help="versions, cores, engines and BLAS of this machine, and what auto chose on it"
    )
    info.set_defaults(run=lambda _: print_info())
    return parser


def run_train(options: argparse.Namespace) -> None:
    """``fastbp train``"""
    engine = choice(options.engine)
    for path, module in ((options.save, "safetensors"), (options.plot, "matplotlib")):
        if path:  # now, not after the training
            need(module)
            if not os.access(Path(path).absolute().parent, os.W_OK) or Path(path).is_dir():
                raise FileNotFoundError(f"cannot write {path!r}: it is a folder, or its folder is missing or read-only")
    if options.plot and Path(options.plot).suffix.lower() not in PICTURES:
        raise ValueError(f"--plot {options.plot}: a picture's name must end in {', '.join(PICTURES)}")
    columns = load_table(options.source, options.target, options.seed)
    data, about, notes = prepare(columns, options.task, options.test_size, options.seed)
    for line in notes:
        note(line)
    say: Callable[[str], object] = (lambda _: None) if options.quiet else print
    say(f"{options.source}: {about}{'' if options.target else ' (taken by default; --target names another column)'}")

    spiral, rows = options.source == "spiral", len(data.train[0])
    epochs = options.epochs or (400 if spiral else max(10, min(300, STEPS * options.batch_size // rows)))
    widths = [data.train[0].shape[1], *(options.hidden or ([64] if spiral else [128, 64])), data.encoder.outputs]
    classifies = isinstance(data.encoder.target, Category)
    model = Sequential(
        dense_layers(widths),
        loss=SoftmaxCrossEntropy() if classifies else MeanSquaredError(),
        optimizer=Adam(options.lr or (0.01 if spiral else 0.001)),
        engine=engine,
        seed=options.seed,
    )
    seconds, losses, quality = fit(model, data, epochs, options.batch_size, say)
    first, rest = seconds[0], sum(seconds[1:])
    parameters = sum(wide * (narrow + 1) for narrow, wide in itertools.pairwise(widths))
    print(f"engine      {model.engine.name}{' (auto)' * model.chooses_engine}")
    print(f"network     {'-'.join(map(str, widths))}, {parameters:,} parameters")
    print(f"time        {first + rest:.2f} s for {epochs} epochs; {first:.2f} s for the first, which prepares kernels")
    print(f"speed       {rows * (epochs - 1) / rest if rest else rows / first:,.0f} samples/s")
    print(f"held out    {quality} on {len(data.held_out[0]):,} rows")
    if options.save:
        model.save(options.save, {"table": data.encoder.to_json()})
        print(f"model       {options.save}")
    if options.plot:
        from .plots import plot_training

        plot_training(options.plot, model, data, losses, f"{options.source}: {quality} held out")
        print(f"plot        {options.plot}")


def dense_layers(widths: Sequence[int]) -> list[Layer]:
    """Dense layers, with ReLU between them."""
    layers: list[Layer] = []
    for inputs, neurons in itertools.pairwise(widths):
        layers += [Dense(inputs, neurons), ReLU()]
    return layers[:-1]


def fit(
    model: Sequential, data: Split, epochs: int, batch_size: int, say: Callable[[str], object]
) -> tuple[list[float], dict[int, float], str]:
    """Train; returns the seconds between looks, the held-out loss after each, and the last accuracy or R2 as text."""
    target = data.encoder.target
    printed, looks = (set(np.linspace(1, epochs, n).round().astype(int).tolist()) for n in (LINES, LOOKS))
    seconds: list[float] = []
    losses: dict[int, float] = {}
    done, quality = 0, ""
    say(f" epoch        loss    held out  {'accuracy' if isinstance(target, Category) else 'R2'}")
    for epoch in sorted(printed | looks):
        start = time.perf_counter()
        model.fit(*data.train, epochs=epoch - done, batch_size=batch_size, verbose=False)
        seconds.append(time.perf_counter() - start)
        scores = model.evaluate(*data.held_out)
        done, losses[epoch] = epoch, scores["loss"]
        if isinstance(target, Category):
            quality = f"{scores['accuracy']:.2%}"
        else:
            spread = float(np.var(data.held_out[1]))
            quality = f"{1 - scores['loss'] / spread:.4f}" if spread else "-"
        if epoch in printed:
            say(f"{epoch:6}  {model.history['loss'][-1]:10.4f}  {scores['loss']:10.4f}  {quality}")
    if isinstance(target, Category):
        return seconds, losses, f"accuracy {quality}"
    return seconds, losses, f"R2 {quality}, root mean square error {math.sqrt(losses[epochs]) * target.std:.4g}"


def run_predict(options: argparse.Namespace) -> None:
    """``fastbp predict``"""
    encoder = Encoder.from_json(read_metadata(options.model).get("table", {}))
    model = load(options.model, engine=options.engine)
    columns = read_table(options.file, like=encoder)
    X = encoder.encode(columns)
    for line in encoder.missing(columns):
        note(line)
    target = encoder.target
    outputs = model.predict_proba(X) if isinstance(target, Category) else model.predict(X)
    if outputs.shape != (len(X), encoder.outputs):
        raise ValueError(f"{options.model} says {encoder.outputs} outputs, but has {outputs.shape[1:]}")
    if isinstance(target, Category):
        header = ["label", *(f"probability_{value}" for value in target.values)]
        lines: Any = ([target.values[p.argmax()], *(f"{x:.7g}" for x in p)] for p in outputs)
    else:
        header, lines = ["prediction"], ([x] for x in target.decode(outputs).tolist())
    to_file = options.output and Path(options.output).open("w", newline="", encoding="utf-8")  # noqa: SIM115
    with to_file or contextlib.nullcontext(sys.stdout) as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])
        file.flush()


def run_check(options: argparse.Namespace) -> int:
    """``fastbp check``"""
    names = None if options.ops is None else [name.strip() for name in options.ops.split(",")]
    report = check(options.engine, names)
    print(report)
    return 0 if report.passed else 1


def note(line: str) -> None:
    """Say on stderr what the user may not expect."""
    print(f"fastbp: note: {line}", file=sys.stderr)


def sizes(text: str) -> list[int]:
    """Read "128,64"."""
    try:
        return [count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, such as 128,64, got {text!r}") from None


def count(text: str, least: int = 1) -> int:
    """Read a whole number of at least `least`, and of no more than 18 digits."""
    if not text.strip().isdecimal() or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {least} and at most 18 digits, got {text!r}"
        )
    return int(text)


def positive(text: str, below: float = math.inf) -> float:
    """Read a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < below:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"expected a number above 0{f' and below {below}' * (below < math.inf)}, got {text!r}"
    )


def fraction(text: str) -> float:
    """Read a number between 0 and 1."""
    return positive(text, below=1)


if __name__ == "__main__":
    sys.exit(main())
