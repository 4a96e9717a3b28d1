"""Line plots as inline SVG: axes, ticks, grid, legend; no library, no script, any colour scheme.

Colours and fonts come from the page's CSS: series i has the class `s{i}`, text `label`, the grid
`grid`.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 42, 38  # margins around the plotted area
MAX_POINTS = 400


class Series(NamedTuple):
    """A named line: equally long x and y; points where y is None or not finite break the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def line_plot(title: str, series: Sequence[Series], x_label: str = "step", y_label: str = "",
              log: bool = False) -> str:
    """An <svg> element. log: base-10 y axis; values that are not positive break the line there."""
    kept = [s for s in (_clean(s, log) for s in series) if s.x]
    points = [(x, y) for s in kept for x, y in zip(s.x, s.y) if y is not None]
    if not points:
        return (f'<p class="missing">{html.escape(title)}: no values to plot</p>')
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_range = _widened(min(xs), max(xs), 0.0)
    if log:
        y_range = _widened(math.log10(min(ys)), math.log10(max(ys)), 0.06)
        y_ticks = _log_ticks(*y_range)
    else:
        y_range = _widened(min(ys), max(ys), 0.06)
        y_ticks = [(value, _tick_text(value)) for value in nice_ticks(*y_range)]

    def place(x, y):
        y = math.log10(y) if log else y
        return (LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0])
                * (HEIGHT - TOP - BOTTOM))

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
             f'aria-label="{html.escape(title, quote=True)}">',
             f'<text class="title" x="{LEFT}" y="17">{html.escape(title)}</text>']
    bottom = HEIGHT - BOTTOM
    for value, text in y_ticks:
        y = place(x_range[0], 10 ** value if log else value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        if text:
            parts.append(f'<text class="label" x="{LEFT - 6}" y="{y + 4:.1f}" '
                         f'text-anchor="end">{text}</text>')
    for value in nice_ticks(*x_range, 5):
        x = LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
                     f'<text class="label" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
                     f'{_tick_text(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP - 4}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
                 f'text-anchor="middle">{html.escape(x_label)}</text>')
    if y_label:
        middle = (TOP + bottom) / 2
        parts.append(f'<text class="label" transform="translate(12 {middle}) rotate(-90)" '
                     f'text-anchor="middle">{html.escape(y_label)}</text>')
    at = LEFT
    for i, line in enumerate(kept):
        parts.append(f'<path class="line s{i % 6}" d="{_path(line, place)}"/>')
        if len(kept) > 1 or line.name:
            parts.append(f'<line class="line s{i % 6}" x1="{at}" x2="{at + 14}" y1="30" y2="30"/>'
                         f'<text class="label" x="{at + 18}" y="34">'
                         f'{html.escape(line.name)}</text>')
            at += 34 + 6.6 * len(line.name)
    return "".join(parts) + "</svg>"


def _clean(series: Series, log: bool) -> Series:
    """Values that cannot be drawn become None; long lines are averaged down to MAX_POINTS."""
    lowest = 1e-100 if log else -1e100  # beyond, axes and ticks would overflow
    y = [v if isinstance(v, int | float) and lowest <= v <= 1e100 else None for v in series.y]
    if all(v is None for v in y):
        return Series(series.name, [], [])
    bucket = -(-len(y) // MAX_POINTS)
    if bucket == 1:
        return Series(series.name, list(series.x), y)
    xs, ys = [], []
    for start in range(0, len(y), bucket):
        real = [v for v in y[start:start + bucket] if v is not None]
        part = series.x[start:start + bucket]
        xs.append(sum(part) / len(part))
        ys.append(sum(real) / len(real) if real else None)
    return Series(series.name, xs, ys)


def _path(line: Series, place) -> str:
    out, pen = [], "M"
    for x, y in zip(line.x, line.y):
        if y is None:
            pen = "M"
            continue
        px, py = place(x, y)
        out.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    if len(out) == 1:  # a lone point: a stroke of no length, seen by its round caps
        out.append("h0.01")
    return "".join(out)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten apart) from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if raw <= m * power * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Exponents and texts: decades where there are three or more, else 1-2-5 or round values."""
    decades = [(k, _tick_text(10.0 ** k)) for k in range(math.ceil(low), math.floor(high) + 1)]
    if len(decades) >= 3:
        return decades[::-(-len(decades) // 6)]
    values = [m * 10.0 ** k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    ticks = [(math.log10(v), _tick_text(v)) for v in values if low <= math.log10(v) <= high]
    if len(ticks) >= 2:
        return ticks
    return [(math.log10(v), _tick_text(v)) for v in nice_ticks(10 ** low, 10 ** high, 4) if v > 0]


def _tick_text(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    if high == low:
        half = abs(high) * 0.1 or 0.5
        return low - half, high + half
    return low - (high - low) * margin, high + (high - low) * margin
