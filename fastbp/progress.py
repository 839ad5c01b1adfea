"""A progress bar, by tqdm."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]

_SECONDS_BETWEEN_FIGURES = 0.1


class Progress:
    """Epochs, or other pieces of work, as a tqdm bar on the error stream.

    Parameters
    ----------
    total : int
    verbose : bool, optional
        None shows the bar on a terminal, where tqdm is installed.
    unit : str, default "epoch"
    """

    def __init__(self, total: int, verbose: bool | None, unit: str = "epoch") -> None:
        self._bar: Any = None
        self._shown = 0.0
        if verbose or (verbose is None and is_terminal(sys.stderr)):
            try:
                from tqdm.auto import tqdm
            except ImportError:
                if verbose:
                    raise ImportError("verbose=True needs tqdm: pip install 'fastbp[cli]'") from None
            else:
                # no thread of tqdm's beside the bar, which at exit would wait for what Ctrl-C interrupted
                bar = type("Bar", (tqdm,), {"monitor_interval": 0})
                self._bar = bar(total=total, unit=unit, file=sys.stderr)

    def step(self, figures: dict[str, float]) -> None:
        """One piece is done; `figures` are an epoch's loss and the like."""
        if self._bar is not None:
            now = time.monotonic()
            if now - self._shown > _SECONDS_BETWEEN_FIGURES or self._bar.n + 1 == self._bar.total:
                self._bar.set_postfix(figures, refresh=False)
                self._shown = now
            self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def is_terminal(stream: Any) -> bool:
    """Whether somebody may look at it; a program without a console has None, or anything with ``write``."""
    return hasattr(stream, "isatty") and bool(stream.isatty())
