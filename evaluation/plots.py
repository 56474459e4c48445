"""Plots of a report as SVG, written by hand: no library, no network, the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..places_panorama import SECTORS

_LEFT, _WIDE, _ROW = 190, 340, 24


def bars(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy by name, with interval (line) and chance (dash)."""
    parts = []
    for index, (name, score) in enumerate(scores.items()):
        top = _ROW * index
        middle = top + _ROW / 2
        short = name if len(name) <= 26 else f"{name[:25]}…"
        parts.append(f'<text x="{_LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(short)}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{top + 5}" width="{_WIDE * score["accuracy"]:.1f}" '
            f'height="{_ROW - 10}" class="bar"/>'
        )
        if score.get("interval"):
            low, high = (_LEFT + _WIDE * edge for edge in score["interval"])
            parts.append(f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" class="interval"/>')
        if score.get("chance") is not None:
            at = _LEFT + _WIDE * score["chance"]
            parts.append(f'<path d="M{at:.1f} {top + 2}V{top + _ROW - 2}" class="chance"/>')
        label = f"{100 * score['accuracy']:.1f} % of {score['count']}"
        parts.append(f'<text x="{_LEFT + _WIDE + 8}" y="{middle + 4:.1f}">{label}</text>')
    return _svg(_LEFT + _WIDE + 130, max(_ROW, _ROW * len(scores)), parts)


def by_direction(judged: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by where the answer lies around the observer, from above, front up; empty where no question says."""
    known = [each for each in judged if each.get("yaw") is not None and each["right"] is not None]
    if not known:
        return ""
    centre, radius = 170, 110
    parts = [f'<circle cx="{centre}" cy="{centre}" r="{radius * share}" class="ring"/>' for share in (0.5, 1)]
    for index, name in enumerate(SECTORS):
        own = [each["right"] for each in known if round(each["yaw"] / 45) % 8 == index]
        angle = math.radians(45 * index)
        if own:
            parts.append(_wedge(centre, radius * sum(own) / len(own), angle))
        label = name if not own else f"{name} {100 * sum(own) / len(own):.0f} % of {len(own)}"
        x, y = centre + (radius + 22) * math.sin(angle), centre - (radius + 22) * math.cos(angle)
        anchor = "middle" if index in (0, 4) else "start" if index < 4 else "end"
        parts.append(f'<text x="{x + 130:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{label}</text>')
    shapes = [f'<g transform="translate(130 0)">{part}</g>' if not part.startswith("<text") else part for part in parts]
    return _svg(2 * centre + 260, 2 * centre, shapes)


def _wedge(centre: float, radius: float, angle: float) -> str:
    ends = [
        f"{centre + radius * math.sin(angle + side):.1f} {centre - radius * math.cos(angle + side):.1f}"
        for side in (-math.pi / 8, math.pi / 8)
    ]
    return f'<path d="M{centre} {centre}L{ends[0]}A{radius:.1f} {radius:.1f} 0 0 1 {ends[1]}Z" class="bar"/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'
