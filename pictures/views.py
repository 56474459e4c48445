"""The views of a plan, and the tokens that stage `vision` matches, on the panorama."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from ..geometry_panorama import (
    Grid,
    View,
    ViewPlan,
    plan_rays,
    ray_angles,
    ray_correspondences,
    strip_correspondences,
)
from ..sampling_panorama import erp_to_views
from ..train.card import COLOURS
from .figure import DARK, WIDTH, halo, new_figure, sphere_axes


def outline(view: View, steps: int = 128) -> np.ndarray:
    """The border of a view as yaw and pitch in degrees [4 * (steps - 1) + ..., 2], closed, with a row of NaN where it
    crosses the seam behind."""
    rays = view.rays((steps, steps))
    border = np.concatenate([rays[0, :-1], rays[:-1, -1], rays[-1, :0:-1], rays[::-1, 0]])  # clockwise
    angles = np.stack(ray_angles(border), -1)
    crossings = np.flatnonzero(np.abs(np.diff(angles[:, 0])) > 180) + 1
    return np.insert(angles, crossings, np.nan, axis=0)


def _cut(panorama: Image.Image, plan: ViewPlan, size: int) -> np.ndarray:
    """The views of a plan, [V, size, size, 3] in [0, 1]."""
    pixels = torch.from_numpy(np.array(panorama.convert("RGB"))).permute(2, 0, 1)
    return erp_to_views(pixels, plan, size).permute(0, 2, 3, 1).div(255).clamp(0, 1).numpy()


def draw_views(panorama: Image.Image, plan: ViewPlan, view_size: int = 192) -> Figure:
    """The panorama with the outline of each tile, above the views in the order of tensors.

    Args:
        panorama: equirectangular picture of the whole sphere (:func:`whole_sphere`).
        plan: the views; a model's are `model.config.view_plan`.
        view_size: pixels a side of the views.
    """
    views = _cut(panorama, plan, view_size)
    columns = min(plan.num_views, 5 if plan.num_views <= 15 else 8)
    rows = -(-plan.num_views // columns)
    figure = new_figure(8.5, 4.2 + 8.5 / columns * 1.08 * rows)
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.2, 8.5 / columns * 1.08 * rows))
    above, below = parts
    axes = above.subplots()
    sphere_axes(axes, panorama.convert("RGB").resize((WIDTH, WIDTH // 2), Image.Resampling.LANCZOS))
    grid = below.subplots(rows, columns, squeeze=False).ravel()
    for own in grid:
        own.axis("off")
    colours = dict(zip(plan.tiles, cycle(COLOURS), strict=False))
    for index, (view, own) in enumerate(zip(plan.views, grid, strict=False)):
        colour = colours.get(index, DARK)
        if not view.is_global:
            axes.plot(*outline(view).T, color=colour, linewidth=1.8, path_effects=halo(3.2))
            yaw, pitch = (float(angle) for angle in ray_angles(view.rays((1, 1))[0, 0]))
            _number(axes, yaw if yaw > -179 else 172, min(max(pitch, -80), 80), index, colour)
        own.axis("on")
        own.imshow(views[index])
        own.set_xticks([])
        own.set_yticks([])
        own.spines[:].set(color=colour, linewidth=2.5)
        angles = "the whole sphere" if view.is_global else f"yaw {(view.yaw + 180) % 360 - 180:.0f}°"
        angles += f", pitch {view.pitch:.0f}°" if view.kind == "perspective" else ""
        own.set_title(f"{index}: {angles}", fontsize=8, pad=3)
    return figure


def _number(axes: Any, x: float, y: float, number: int, colour: str) -> None:
    box = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5}
    axes.text(x, y, str(number), fontsize=8, ha="center", va="center", bbox=box)


def draw_matches(
    panorama: Image.Image, plan: ViewPlan, overlap_ratio: float, grid: Grid = (16, 16), view_size: int = 480
) -> Figure:
    """The first two tiles of a loop side by side, twice: with matched tokens by rays, and as sequential strips.

    The two tokens of a pair have one shade, and every fourth pair is joined. The title says how far apart the two look.

    Args:
        panorama: equirectangular picture of the whole sphere.
        plan: the views.
        overlap_ratio: share of the columns that strips pair, in (0, 1).
        grid: (rows, columns) of tokens of a view.
        view_size: pixels a side of the tiles.

    Raises:
        ValueError: for a plan whose tiles have no tokens to compare.
    """
    first, second = plan.loops[0][:2] if plan.has_rays and len(plan.loops[0]) > 1 else (0, 0)
    by_rays = [c for c in ray_correspondences(plan, grid) if (first, second) in zip(c.first, c.second, strict=True)]
    if not by_rays or not overlap_ratio:
        raise ValueError(
            f"no tokens of these {plan.num_views} views look the same way: take views that overlap. Typical value: "
            "view_strategy='anyres_e2p' with overlap_ratio=0.5"
        )
    strips = strip_correspondences(plan.loops[0], grid, overlap_ratio)
    tiles = _cut(panorama, plan, view_size)[[first, second]]
    figure = new_figure(7, 7.4)
    for axes, (name, pairs) in zip(
        figure.subplots(2, 1), (("by rays", by_rays[0]), ("as strips", strips)), strict=True
    ):
        index = list(zip(pairs.first, pairs.second, strict=True)).index((first, second))
        row, column = np.divmod(pairs.tokens[index], grid[1])
        rows, columns = np.divmod(pairs.corners[index], grid[1])  # [L, C]
        row_of, column_of = ((each * pairs.weights[index]).sum(-1) for each in (rows, columns))
        chord = plan.views[second].rays_at(row_of, column_of, grid) - plan_rays(plan, grid)[first, pairs.tokens[index]]
        apart = np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(chord, axis=-1) / 2, 0, 1)))
        for left, tile in zip((0.0, 1.02), tiles, strict=True):
            axes.imshow(tile, extent=(left, left + 1, 1, 0))
        x = np.stack([(column + 0.5) / grid[1], 1.02 + (column_of + 0.5) / grid[1]])
        y = np.stack([(row + 0.5) / grid[0], (row_of + 0.5) / grid[0]])
        joined = [withStroke(linewidth=1.8, foreground="black")]
        axes.plot(x[:, ::4], y[:, ::4], color="white", linewidth=0.7, path_effects=joined)
        shades = np.tile(row * 7 + column * 3, (2, 1)) % 64
        axes.scatter(x, y, c=shades, cmap="cividis", s=26, edgecolors="black", linewidths=0.6, zorder=3)
        axes.set(xlim=(0, 2.02), ylim=(1, 0))
        axes.axis("off")
        words = f"matched {name}: {apart.mean():.2f}° apart on average, {apart.max():.2f}° at most"
        axes.set_title(words, fontsize=9, loc="left")
    return figure
