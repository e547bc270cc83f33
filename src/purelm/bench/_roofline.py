"""The roofline's picture as SVG (Williams, Waterman and Patterson, 2009): operations a second over
operations a byte, under the two ceilings that the same run measured."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 900, 560, 70, 40, 60, 210
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


class Point(NamedTuple):
    """One call: the family that gives its colour, its caption, operations a byte and a second."""

    family: str
    caption: str
    intensity: float
    rate: float
    ours: bool


def picture(points: Sequence[Point], copy: float, gemm: float, title: str) -> str:
    """An SVG of `points` under min(intensity * copy, gemm); ours filled, peers hollow."""
    ridge = gemm / copy
    xs = [*(p.intensity for p in points), ridge]
    ys = [*(p.rate for p in points), gemm]
    x0, x1 = _decades(min(xs) * 0.7, max(xs) * 1.5)
    y0, y1 = _decades(min(ys) * 0.7, max(ys) * 1.2)
    right, floor = WIDTH - LEGEND, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x0) / (x1 - x0)
        up = (math.log10(y) - y0) / (y1 - y0)
        return round(LEFT + across * (right - LEFT), 1), round(floor - up * (floor - TOP), 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14">{escape(title)}</text>',
    ]
    for k in range(x0, x1 + 1):
        x, _ = at(10.0**k, 10.0**y0)
        out.append(f'<path d="M{x} {TOP}V{floor}" stroke="#ddd"/>')
        out.append(f'<text x="{x}" y="{floor + 18}" text-anchor="middle">{10.0**k:g}</text>')
    for k in range(y0, y1 + 1):
        _, y = at(10.0**x0, 10.0**k)
        out.append(f'<path d="M{LEFT} {y}H{right}" stroke="#ddd"/>')
        label = f"{10.0 ** (k - 12):g}"
        out.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    # The roof, from where the copy's line enters the frame.
    start = max(10.0**x0, 10.0**y0 / copy)
    corners = (at(start, start * copy), at(ridge, gemm), at(10.0**x1, gemm))
    line = " ".join(f"{x},{y}" for x, y in corners)
    out.append(f'<polyline points="{line}" fill="none" stroke="black" stroke-width="1.5"/>')
    families = list(dict.fromkeys(p.family for p in points))
    for p in points:
        colour = COLOURS[families.index(p.family) % len(COLOURS)]
        x, y = at(p.intensity, p.rate)
        fill = colour if p.ours else "none"
        out.append(
            f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="{colour}">'
            f"<title>{escape(p.caption)}</title></circle>"
        )
    for i, family in enumerate(families):
        y = TOP + 12 + 18 * i
        colour = COLOURS[i % len(COLOURS)]
        out.append(f'<circle cx="{right + 20}" cy="{y}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{right + 30}" y="{y + 4}">{escape(family)}</text>')
    y = TOP + 12 + 18 * (len(families) + 1)
    out.append(f'<text x="{right + 16}" y="{y}">filled: purelm, hollow: peers</text>')
    roofs = f"copy {copy / 1e12:.3g} TB/s, bf16 product {gemm / 1e12:.3g} TFLOP/s"
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 8}" fill="#555">{roofs}</text>')
    middle = (LEFT + right) / 2
    out.append(f'<text x="{middle}" y="{floor + 36}" text-anchor="middle">operations / byte</text>')
    out.append(
        f'<text transform="translate(16 {(TOP + floor) / 2}) rotate(-90)" '
        'text-anchor="middle">TFLOP/s</text>'
    )
    return "\n".join([*out, "</svg>", ""])


def _decades(low: float, high: float) -> tuple[int, int]:
    return math.floor(math.log10(low)), math.ceil(math.log10(high))
