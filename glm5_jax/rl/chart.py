"""Charts as HTML figures with inline SVG, which need no script and no file: lines over training steps, and bars.

Their looks come from `STYLE`, which the page's style sheet is to contain, and its colours --faint and --c0 to --c7.
"""

from collections.abc import Iterable, Mapping, Sequence
import html
import itertools
import math
import re

COLOURS = 8
STYLE = """figure{margin:0}
figcaption{font-weight:600}
figure>svg{width:100%;height:auto;display:block}
figure text{font-size:11px;fill:currentColor}
figure path{fill:none;stroke-width:1.6;stroke-linecap:round;stroke-linejoin:round}
.grid{stroke:var(--faint);stroke-width:1;opacity:.35}
.hover rect{fill:transparent}
.hover rect:hover{fill:var(--faint);fill-opacity:.25}
.bar{fill:var(--c0)}
.legend{list-style:none;margin:.2rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.85rem}
.legend svg{width:1.5rem;height:.5rem;margin-right:.3rem}
.d1{stroke-dasharray:6 4}
.d2{stroke-dasharray:1 4}
""" + "".join(f".c{number}{{stroke:var(--c{number})}}\n" for number in range(COLOURS))

_WIDTH, _HEIGHT = 430, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 412, 10, 182  # of the plane that is drawn on
_HOVERED = 200  # steps that show their numbers
_LARGEST = 1e300  # what is larger has no span to scale it by
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """As the content of an element or of a quoted attribute.

    Control characters, also those that turn the direction of writing, and lone surrogates are replaced by visible ones.
    """
    return html.escape(_INVISIBLE.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd", text))


def lines(title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, floor: float | None = None
          ) -> str:
    """Values over training steps, {label: (steps, values)}; what is no finite number is a gap.

    The axis begins at `floor`, or below. Pointing at a step shows its numbers. Nothing, "", where there is none.
    """
    curves = {label: curve for label, curve in curves.items() if any(map(is_number, curve[1]))}
    if not curves:
        return ""
    steps = sorted({step for found, _ in curves.values() for step in found})
    left, right = _span(steps, pad=0.5)
    span = _span([value for _, values in curves.values() for value in values if is_number(value)], floor=floor)
    x = lambda step: _LEFT + (step - left) / (right - left) * (_RIGHT - _LEFT)
    labels = [(x(step), _short(step)) for step in ticks(left, right, whole=True)]
    paths, keys = [], []
    for number, (label, (found, values)) in enumerate(curves.items()):
        look = f"c{number % COLOURS} d{number // COLOURS % 3}"
        path = _path((x(step), _y(value, span) if is_number(value) else None) for step, value in zip(found, values))
        paths.append(f'<path class="{look}" d="{path}"/>')
        keys.append(f'<li><svg viewBox="0 0 24 8"><path class="{look}" d="M2 4h20"/></svg>{escaped(label)}</li>')
    shown = steps[::-(-len(steps) // _HOVERED)]
    return _figure(title, "training step", labels, span,
                   [*paths[::-1], _hover(curves, shown, [x(step) for step in shown])],  # the first one on top
                   f'<ul class="legend">{"".join(keys)}</ul>')


def bars(title: str, heights: Mapping[str, float], *, below: str) -> str:
    """A bar for each label; `below` names what they count. Nothing, "", where no height is a number."""
    heights = {label: height for label, height in heights.items() if is_number(height)}
    if not heights:
        return ""
    span = _span(list(heights.values()), floor=0.0)
    room = (_RIGHT - _LEFT) / len(heights)
    shapes = [f'<rect class="bar" x="{_LEFT + room * (number + 0.1):.1f}" y="{_y(height, span):.1f}" '
              f'width="{room * 0.8:.1f}" height="{_y(0, span) - _y(height, span):.1f}">'
              f'<title>{escaped(label)}: {height:.4g}</title></rect>'
              for number, (label, height) in enumerate(heights.items())]
    labels = [(_LEFT + room * (number + 0.5), label) for number, label in enumerate(heights)]
    return _figure(title, below, labels, span, shapes, "")


def is_number(value: float) -> bool:
    """Whether it can be drawn; NaN and infinities cannot."""
    return abs(value) <= _LARGEST


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about five; whole ones on request."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next((factor for factor in (1, 2, 5) if factor * unit >= rough), 10)
    if whole:
        step = max(step, 1.0)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _span(values: Sequence[float], *, floor: float | None = None, pad: float | None = None) -> tuple[float, float]:
    """The ends of an axis. Where all values are the same there is room above, `pad` or a tenth of them, and as much
    below them if there is no floor."""
    ends = [*values] if floor is None else [*values, floor]
    low, high = min(ends), max(ends)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    pad = pad or abs(high) / 10 or 0.5
    return (low - pad if floor is None else low), high + pad


def _y(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)


def _short(value: float) -> str:
    return f"{value:.10g}"  # without the noise of its last digits


def _path(points: Iterable[tuple[float, float | None]]) -> str:
    """The line through the points, apart where there is no y; a point on its own is a dot."""
    commands, drawing = [], False
    for x, y in points:
        if y is not None:
            commands.append(f"L{x:.1f} {y:.1f}" if drawing else f"M{x:.1f} {y:.1f}h0")
        drawing = y is not None
    return "".join(commands)


def _hover(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], steps: Sequence[float], at: Sequence[float]
           ) -> str:
    """A band around each step, up to half-way to its neighbours."""
    borders = [_LEFT, *((a + b) / 2 for a, b in itertools.pairwise(at)), _RIGHT]
    values = {label: dict(zip(*curve)) for label, curve in curves.items()}
    bands = []
    for step, (left, right) in zip(steps, itertools.pairwise(borders)):
        numbers = [f"{escaped(label)}: {found[step]:.4g}" for label, found in values.items()
                   if step in found and is_number(found[step])]
        bands.append(f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_BOTTOM - _TOP}"><title>'
                     + "\n".join([f"step {_short(step)}", *numbers]) + "</title></rect>")
    return f'<g class="hover">{"".join(bands)}</g>'


def _figure(title: str, below: str, across: Sequence[tuple[float, str]], span: tuple[float, float],
            shapes: Sequence[str], legend: str) -> str:
    """The axes around the shapes: labels below at places of the plane, and the ticks of what is measured upwards."""
    up = [(_y(value, span), _short(value)) for value in ticks(*span)]
    grid = [f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="y" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>' for y, label in up]
    marks = [f'<text class="x" x="{x:.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{escaped(label)}</text>'
             for x, label in across]
    name = f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escaped(below)}</text>'
    return "\n".join([
        f'<figure><figcaption>{escaped(title)}</figcaption>',
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(title)}">',
        *grid, *marks, name, *shapes, f"</svg>{legend}</figure>"])
