"""Pictures of a view plan: its views on the panorama, and which tokens of neighbouring tiles are compared.

`python -m panorama_vlm.demo.views PANORAMA --output views.png [--matches matches.png]`
"""

from __future__ import annotations

import argparse
import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..geometry_panorama import (
    VIEW_STRATEGIES,
    Correspondences,
    View,
    ViewOptions,
    ViewPlan,
    plan_rays,
    ray_correspondences,
    strip_correspondences,
)
from ..reading_panorama import to_erp_tensor
from ..sampling_panorama import erp_to_views

_MARGIN = 8


def colour(index: int, count: int) -> tuple[int, int, int]:
    """The colour of view `index` of `count`."""
    red, green, blue = colorsys.hsv_to_rgb(index / count, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def outline(view: View, width: int, height: int, steps: int = 128) -> list[list[tuple[float, float]]]:
    """The border of a tile as pieces of line on an ERP image of `width` x `height`, cut at the seam."""
    rays = view.rays((steps, steps))
    border = np.concatenate([rays[0, :-1], rays[:-1, -1], rays[-1, :0:-1], rays[::-1, 0]])  # clockwise, closed
    row, column, _ = View("erp").cells(border, (height, width))
    pieces: list[list[tuple[float, float]]] = [[]]
    for index in range(len(column)):
        if index and abs(column[index] - column[index - 1]) > width / 2:
            pieces.append([])
        pieces[-1].append((float(column[index]), float(row[index])))
    return pieces


def to_image(view: torch.Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as an image."""
    return Image.fromarray((view * 255).round().byte().permute(1, 2, 0).numpy())


def draw_views(panorama: Image.Image, plan: ViewPlan, width: int = 1024, view_size: int = 192) -> Image.Image:
    """The panorama with the outline of each tile, above the views in the order of tensors."""
    height = width // 2
    erp = panorama.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    views = erp_to_views(to_erp_tensor(panorama), plan, view_size)
    columns = (width + _MARGIN) // (view_size + _MARGIN)
    rows = -(-plan.num_views // columns)
    sheet = Image.new("RGB", (width, height + rows * (view_size + _MARGIN)), "white")
    lines = ImageDraw.Draw(erp)
    for index in plan.tiles:
        for piece in outline(plan.views[index], width, height):
            lines.line(piece, fill=colour(index, plan.num_views), width=3)
    sheet.paste(erp, (0, 0))
    frames = ImageDraw.Draw(sheet)
    for index, view in enumerate(plan.views):
        left = index % columns * (view_size + _MARGIN)
        top = height + _MARGIN + index // columns * (view_size + _MARGIN)
        sheet.paste(to_image(views[index]), (left, top))
        box = (left, top, left + view_size - 1, top + view_size - 1)
        frames.rectangle(box, outline="black" if view.is_global else colour(index, plan.num_views), width=3)
        name = "global" if view.is_global else f"yaw {view.yaw:.0f}, pitch {view.pitch:.0f}"
        frames.text((left + 8, top + 8), name, fill="white", stroke_width=2, stroke_fill="black")
    return sheet


def draw_matches(
    panorama: Image.Image, plan: ViewPlan, overlap_ratio: float, tokens: int = 16, size: int = 480
) -> Image.Image:
    """The first two tiles of a loop side by side, twice: with matched tokens by rays, and as sequential strips.

    Matched tokens have one colour; every fourth pair is joined. The title says how far apart the two of a pair look.
    """
    grid = (tokens, tokens)
    first, second = plan.loops[0][:2]
    by_rays = next(c for c in ray_correspondences(plan, grid) if (first, second) in zip(c.first, c.second, strict=True))
    strips = strip_correspondences(plan.loops[0], grid, overlap_ratio)
    tiles = [to_image(view) for view in erp_to_views(to_erp_tensor(panorama), plan, size)[[first, second]]]
    title = 24
    sheet = Image.new("RGB", (2 * size + _MARGIN, 2 * (size + title + _MARGIN)), "white")
    for panel, (name, pairs) in enumerate((("by rays", by_rays), ("as strips", strips))):
        picture, apart = _draw_pair(tiles, pairs, plan, grid, (first, second))
        top = panel * (size + title + _MARGIN)
        words = f"matched {name}: {apart.mean():.2f} degrees apart on average, {apart.max():.2f} at most"
        ImageDraw.Draw(sheet).text((4, top + 4), words, fill="black", font_size=16)
        sheet.paste(picture, (0, top + title))
    return sheet


def _draw_pair(
    tiles: list[Image.Image], pairs: Correspondences, plan: ViewPlan, grid: tuple[int, int], views: tuple[int, int]
) -> tuple[Image.Image, np.ndarray]:
    """The two tiles with their matched tokens, and the angles between the rays of each pair in degrees [L]."""
    size, cell = tiles[0].width, tiles[0].width / grid[1]
    picture = Image.new("RGB", (2 * size + _MARGIN, size), "white")
    picture.paste(tiles[0], (0, 0))
    picture.paste(tiles[1], (size + _MARGIN, 0))
    draw = ImageDraw.Draw(picture)
    index = list(zip(pairs.first, pairs.second, strict=True)).index(views)
    rows, columns = np.divmod(pairs.tokens[index], grid[1])
    corner_rows, corner_columns = np.divmod(pairs.corners[index], grid[1])
    other_rows = (corner_rows * pairs.weights[index]).sum(-1)
    other_columns = (corner_columns * pairs.weights[index]).sum(-1)
    for at in range(len(rows)):
        hue = colour(int(rows[at] * 7 + columns[at] * 3) % 64, 64)
        left = ((columns[at] + 0.5) * cell, (rows[at] + 0.5) * cell)
        right = (size + _MARGIN + (other_columns[at] + 0.5) * cell, (other_rows[at] + 0.5) * cell)
        if at % 4 == 0:
            draw.line([left, right], fill=hue, width=1)
        for x, y in (left, right):
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=hue, outline="black")
    rays = plan_rays(plan, grid)
    view = plan.views[views[1]]
    half = np.tan(np.radians(view.fov) / 2)
    x, y = (2 * (other_columns + 0.5) / grid[1] - 1) * half, (1 - 2 * (other_rows + 0.5) / grid[0]) * half
    camera = np.stack([x, y, np.ones_like(x)], -1)
    seen = camera @ view.rotation.T / np.linalg.norm(camera, axis=-1, keepdims=True)
    chord = np.linalg.norm(seen - rays[views[0], pairs.tokens[index]], axis=-1)
    return picture, np.degrees(2 * np.arcsin(np.clip(chord / 2, 0, 1)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.demo.views", description="Draw the views of a panorama, and what is matched."
    )
    parser.add_argument("panorama", help="an equirectangular image")
    parser.add_argument("--output", default="views.png", help="picture of the views")
    parser.add_argument("--matches", help="picture of the matched tokens of the first two tiles")
    parser.add_argument("--view-strategy", default="anyres_e2p", choices=sorted(VIEW_STRATEGIES))
    parser.add_argument("--pole-caps", action="store_true", help="one tile straight up and one straight down")
    parser.add_argument("--fov-deg", type=float, default=90.0)
    parser.add_argument("--overlap-ratio", type=float, default=0.5)
    options = parser.parse_args(arguments)
    plan = ViewOptions(options.view_strategy, options.fov_deg, options.overlap_ratio, pole_caps=options.pole_caps).plan
    with Image.open(options.panorama) as panorama:
        draw_views(panorama, plan).save(options.output)
        print(f"views: {options.output}")
        if options.matches:
            draw_matches(panorama, plan, options.overlap_ratio).save(options.matches)
            print(f"matches: {options.matches}")


if __name__ == "__main__":
    main()
