"""A picture of a view plan: the panorama with the outline of each view on it, and the views."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..geometry_panorama import View, ViewPlan
from ..image_processing_panorama import erp_to_views, to_erp_tensor

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
        frames.rectangle(box, outline=colour(index, plan.num_views) if view.kind == "perspective" else "black", width=3)
        name = "global" if view.kind == "erp" else f"yaw {view.yaw:.0f}, pitch {view.pitch:.0f}"
        frames.text((left + 8, top + 8), name, fill="white", stroke_width=2, stroke_fill="black")
    return sheet
