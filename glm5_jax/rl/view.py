"""A run on one screen: its newest numbers by kind, each with where it came from, drawn anew at every step.

    reward/sums       0.61  ▁▂▂▃▅▅▆▇
    staleness/mean    1.20  ▃▅▅▅▄▅▅▅
"""

import collections
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 32  # steps


class TerminalView:
    """A writer (see `core.metrics`) for a terminal. `first` are the beginnings of the names that come first.

    Where the terminal is too low for all, those that come last are left out and counted. Elsewhere than on a terminal,
    as in a log file, each step is one line of the names in `first`, or of all.
    """

    def __init__(self, first: Sequence[str] = (), *, stream: TextIO | None = None):
        self._first, self._stream = tuple(first), stream or sys.stdout
        self._history: dict[str, collections.deque[float]] = {}
        self._drawn = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._history.setdefault(name, collections.deque(maxlen=HISTORY)).append(float(value))
        if self._stream.isatty():
            self._draw(step)
            return
        cells = [f"{name} {value:.4g}" for name, value in sorted(values.items(), key=lambda pair: self._rank(pair[0]))
                 if not self._first or name.startswith(self._first)]
        print(f"step {step}", *cells, sep="  ", file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last picture where it is."""
        self._drawn = 0

    def _rank(self, name: str) -> tuple[int, str]:
        return next((i for i, start in enumerate(self._first) if name.startswith(start)), len(self._first)), name

    def _draw(self, step: int) -> None:
        size = shutil.get_terminal_size()
        names = sorted(self._history, key=self._rank)
        room = max(1, size.lines - 3)
        left_out = len(names) - room if len(names) > room else 0
        names = names[:len(names) - left_out]
        width = max(map(len, names), default=0)
        rows = [f"step {step}"]
        rows += [f"{name:<{width}}  {self._history[name][-1]:>10.4g}  {sparks(self._history[name])}" for name in names]
        rows += [f"and {left_out} more"] if left_out else []
        back = f"\x1b[{self._drawn}A\x1b[J" if self._drawn else ""  # up to the first line, and clear what is below
        self._stream.write(back + "".join(row[:size.columns - 1] + "\n" for row in rows))
        self._stream.flush()
        self._drawn = len(rows)


def sparks(values: Sequence[float]) -> str:
    """The values as a row of bars between their least and their largest; a blank for one that is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    bar = lambda value: BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0]
    return "".join(bar(value) if math.isfinite(value) else " " for value in values)
