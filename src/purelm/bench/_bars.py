"""Stacked bars as SVG: what each library's step is made of."""

from collections.abc import Mapping
from html import escape

from ._roofline import COLOURS

WIDTH, LEFT, BAR, GAP, TOP = 900, 130, 26, 14, 60


def stacked(rows: Mapping[str, Mapping[str, float]], title: str, unit: str) -> str:
    """An SVG with one bar a row, of its parts in their order, on one scale from 0."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    longest = max((sum(row.values()) for row in rows.values()), default=0.0) or 1.0
    scale = (WIDTH - LEFT - 110) / longest
    height = TOP + len(rows) * (BAR + GAP) + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for i, part in enumerate(parts):
        left = LEFT + i * 105
        out.append(f'<rect x="{left}" y="34" width="10" height="10" fill="{_colour(i)}"/>')
        out.append(f'<text x="{left + 14}" y="43">{escape(part)}</text>')
    for i, (name, row) in enumerate(rows.items()):
        x, y = float(LEFT), TOP + i * (BAR + GAP)
        out.append(f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for part, value in row.items():
            width = value * scale
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
                f'fill="{_colour(parts.index(part))}"><title>{escape(part)} {value:g} {unit}'
                "</title></rect>"
            )
            x += width
    return "\n".join([*out, "</svg>"])


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
