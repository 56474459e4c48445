"""What all pictures have in common: figures that need no screen, colours, the axes of the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

WIDTH = 1024  # pixels of a panorama in a picture
ROWS = 256  # of what is painted onto the sphere
DARK = "#222222"  # lines that have no colour of their own
EXTENT = (-180, 180, -90, 90)  # of the sphere on axes, in degrees


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that needs no screen."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def to_image(figure: Figure, dpi: int = 120) -> Image.Image:
    """A figure as a picture of so many pixels an inch."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def sphere_axes(axes: Any, pixels: Any, title: str = "", **options: Any) -> None:
    """An equirectangular picture on axes in degrees of yaw and pitch."""
    axes.imshow(pixels, extent=EXTENT, aspect="equal", **options)
    axes.set_xticks(range(-180, 181, 90), ["back", "left", "front", "right", "back"])
    axes.set_yticks((-90, 0, 90), ["down", "horizon", "up"])
    axes.tick_params(length=2, labelsize=8)
    axes.set_xlim(-180, 180)
    axes.set_ylim(-90, 90)
    if title:
        axes.set_title(title, fontsize=9, loc="left")


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def halo(width: float) -> list[Any]:
    """White around lines and letters, so that they are seen before anything."""
    return [withStroke(linewidth=width, foreground="white")]


def told_apart(paths: Sequence[str | Path]) -> list[str]:
    """The last parts of paths that tell them apart."""
    if not paths:
        raise ValueError("name at least one folder")
    parts = [Path(path).absolute().parts for path in paths]
    if len({*parts}) < len(parts):
        raise ValueError(f"a folder is named twice: {', '.join(map(str, paths))}")
    length = next(n for n in range(1, 99) if len({own[-n:] for own in parts}) == len(parts))
    return ["/".join(own[-length:]) for own in parts]
