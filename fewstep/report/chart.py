"""Line charts as SVG text: no script, no font, colours from the page's style."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 40  # room for half a label at the right end
POINTS = 300
"""More points than a chart has pixels are averaged in runs."""


@dataclass(frozen=True)
class Line:
    """A named curve. slot: which of the page's colours; 0 is that of the teacher. dots: marked points, for few of them."""

    name: str
    points: Sequence[tuple[float, float]]
    slot: int
    dashed: bool = False
    dots: bool = False


def chart(lines: Sequence[Line], *, x_label: str, y_label: str, x_log2: bool = False, y_log: bool | None = None) -> str:
    """An SVG of the lines' finite points; empty text where there are none.

    x_log2: an axis of powers of two, as step counts are. y_log: None takes logarithms where values are positive and span more
    than a factor of 20.
    """
    kept = [(line, _thinned([p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])])) for line in lines]
    points = [p for _, some in kept for p in some]
    if not points:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    logarithmic = min(ys) > 0 and max(ys) > 20 * min(ys) if y_log is None else y_log and min(ys) > 0
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, "log2" if x_log2 and min(xs) > 0 else "linear", pad=x_log2)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, "log10" if logarithmic else "linear", pad=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">',
        *(_y_tick(y_axis(v), label) for v, label in y_axis.ticks()),
        *(_x_tick(x_axis(v), label) for v, label in x_axis.ticks(sorted(set(xs)) if x_log2 else None)),
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}">{escape(x_label)}</text>',
    ]
    for line, some in kept:
        parts += _curve(line, some, x_axis, y_axis, x_label)
    return "".join([*parts, "</svg>"])


def _curve(line: Line, some: list[tuple[float, float]], x: "_Axis", y: "_Axis", x_label: str) -> list[str]:
    style = f"s{line.slot}" + (" dashed" if line.dashed else "")
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in some)
    parts = [f'<polyline class="{style}" points="{path}"/>']
    # One point is no line, but it is a result.
    for a, b in some if line.dots or len(some) == 1 else []:
        words = escape(f"{line.name}, {x_label} {number(a)}: {number(b)}")
        parts.append(f'<circle class="{style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"><title>{words}</title></circle>')
    return parts


def _y_tick(at: float, label: str) -> str:
    grid = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    return f'{grid}<text class="y" x="{LEFT - 6}" y="{at + 3.5:.1f}">{label}</text>'


def _x_tick(at: float, label: str) -> str:
    return f'<text class="x" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}">{label}</text>'


def number(value: float) -> str:
    """At most four digits: 0.0123, 12.35, 1,200, 1.5e-07."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{value:.2g}"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


class _Axis:
    """Values low ... high to pixels start ... end."""

    def __init__(self, low: float, high: float, start: float, end: float, scale: str, *, pad: bool) -> None:
        self.scale, self.start, self.end = scale, start, end
        a, b = self._forward(low), self._forward(high)
        if a == b:
            a, b = (
                a - (0.5 if scale != "linear" else abs(a) * 0.1 or 0.5),
                b + (0.5 if scale != "linear" else abs(b) * 0.1 or 0.5),
            )
        margin = 0.06 * (b - a) if pad else 0.0
        self.a, self.b = a - margin, b + margin
        if scale == "linear" and low >= 0 and pad:
            self.a = max(0.0, self.a)

    def _forward(self, value: float) -> float:
        return {"linear": float, "log2": math.log2, "log10": math.log10}[self.scale](value)

    def __call__(self, value: float) -> float:
        return self.start + (self._forward(value) - self.a) / (self.b - self.a) * (self.end - self.start)

    def ticks(self, values: list[float] | None = None) -> list[tuple[float, str]]:
        """Round numbers; or the values themselves, as step counts are, those that come too close left out."""
        if values is None:
            values = self._decades() if self.scale == "log10" else self._round()
        shown: list[float] = []
        for value in values:
            if not shown or abs(self(value) - self(shown[-1])) >= 22:
                shown.append(value)
        return [(value, number(value)) for value in shown]

    def _round(self) -> list[float]:
        raw = (self.b - self.a) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.a / step - 1e-9), math.floor(self.b / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _decades(self) -> list[float]:
        wide = self.b - self.a > 3
        exponents = range(math.floor(self.a), math.ceil(self.b) + 1)
        found = [m * 10.0**e for e in exponents for m in ((1,) if wide else (1, 2, 5))]
        return [v for v in found if self.a - 1e-9 <= math.log10(v) <= self.b + 1e-9]
