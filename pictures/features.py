"""What tokens say of their directions, painted onto the sphere: the principal components of their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ..geometry_panorama import Grid, View, ViewPlan, owned_tokens
from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from .figure import ROWS, new_figure, sphere_axes

TOKENS = ("tower", "resampler")


def tokens_that_show(views: Sequence[View], grid: Grid, rays: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The token that shows each direction: of the views that see it the one whose centre is nearest owns it
    (:func:`owned_tokens`), and of its tokens that are shown the one in whose cell it lies, or else the nearest.

    Args:
        views: V of them.
        grid: (rows, columns) of their tokens.
        rays: unit vectors [N, 3].
        shown: which tokens count, bool [V, S].

    Returns:
        Indices into the V * S tokens [N], -1 where none shows it.
    """
    found, nearest = np.full(len(rays), -1), np.full(len(rays), -np.inf)
    size = grid[0] * grid[1]
    for index, view in enumerate(views):
        candidates = np.flatnonzero(shown[index])
        row, column, inside = view.cells(rays, grid, margin=0.5)
        nearness = rays @ view.rays((1, 1))[0, 0]
        own = np.flatnonzero(inside & (nearness > nearest + 1e-9))
        if not len(candidates) or not len(own):
            continue
        nearest[own] = nearness[own]
        at = (np.clip(np.rint(place[own]), 0, n - 1).astype(int) for place, n in zip((row, column), grid, strict=True))
        cell = np.ravel_multi_index(tuple(at), grid)
        beside = ~shown[index][cell]
        cell[beside] = candidates[(rays[own[beside]] @ view.rays(grid).reshape(-1, 3)[candidates].T).argmax(-1)]
        found[own] = index * size + cell
    return found


def view_groups(plan: ViewPlan) -> list[list[int]]:
    """The views of a plan that share the sphere among them: its tiles, and each global view alone."""
    groups = [list(plan.tiles), *([index] for index in range(plan.num_views) if index not in plan.tiles)]
    return [group for group in groups if group]


def erp_rays(height: int) -> np.ndarray:
    return View("erp").rays((height, 2 * height)).reshape(-1, 3)


def paint_tokens(
    values: np.ndarray, plan: ViewPlan, grid: Grid, shown: np.ndarray | None = None, height: int = ROWS
) -> np.ndarray:
    """Values of tokens as an equirectangular image: each direction from the token that owns it, where no tile looks
    from that of the global view.

    Args:
        values: [V * S, C].
        plan, grid: of the tokens.
        shown: which tokens count, bool [V, S]; those that reach the language model where not given.
        height: rows of the image.

    Returns:
        [height, 2 * height, C], NaN where no token looks.
    """
    shown = owned_tokens(plan, grid) if shown is None else shown
    rays, size = erp_rays(height), grid[0] * grid[1]
    image = np.full((len(rays), values.shape[1]), np.nan)
    for group in reversed(view_groups(plan)):  # tiles last: what they see is theirs
        found = tokens_that_show([plan.views[index] for index in group], grid, rays, shown[group])
        own = found >= 0
        image[own] = values.reshape(plan.num_views, size, -1)[group].reshape(len(group) * size, -1)[found[own]]
    return image.reshape(height, 2 * height, -1)


def principal_components(tokens: Sequence[np.ndarray], count: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of the first principal components, of one or of several sets of vectors together.

    Each set is centred and scaled to the same variance in total first, so that what differs is what tokens say beside
    their mean. The largest weight of a component is positive.

    Args:
        tokens: sets [N_i, D].
        count: of components, at most D.

    Returns:
        Scores [N_i, count] of each set, and the share of the variance that each component explains [count].
    """
    if min(len(each) for each in tokens) < 2 or tokens[0].shape[1] < count:
        raise ValueError(f"{count} components take at least 2 tokens of {count} channels, got {tokens[0].shape}")
    sets = [np.asarray(each, np.float64) - each.mean(0, dtype=np.float64) for each in tokens]
    sets = [each / max(np.sqrt((each**2).sum(1).mean()), 1e-12) for each in sets]
    joined = np.concatenate(sets)
    values, vectors = np.linalg.eigh(joined.T @ joined / len(joined))  # rising
    axes = vectors[:, ::-1][:, :count]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))
    return [each @ axes for each in sets], values[::-1][:count] / values.sum()


class Features(NamedTuple):
    """Tokens of a panorama.

    Attributes:
        name: for the picture.
        kind: `"tower"` or `"resampler"`.
        tokens: [V * S, D].
        plan, grid: where they look.
    """

    name: str
    kind: str
    tokens: np.ndarray
    plan: ViewPlan
    grid: Grid


@torch.no_grad()
def token_features(
    model: PanoramaVLM, processor: PanoramaProcessor, panorama: Any, kind: str = "resampler", name: str = ""
) -> Features:
    """The tokens of a panorama.

    Args:
        model, processor: that belong together.
        panorama: anything that the processor takes.
        kind: `"tower"` for the tower's patches, `"resampler"` for the resampled tokens.
        name: for the picture.

    Raises:
        ValueError: for another kind.
    """
    if kind not in TOKENS:
        raise ValueError(f"tokens must be of {' or '.join(map(repr, TOKENS))}, got {kind!r}")
    pixels = processor.image_processor(panorama, return_tensors="pt")["pixel_values"].to(model.device)
    body = model.model
    pixels = body.check_pixels(pixels, body.view_plan.num_views)
    tokens = body.tower_tokens(pixels) if kind == "tower" else body.encode_views(pixels)
    grid = model.config.vision_grid if kind == "tower" else body.token_grid
    return Features(name or kind, kind, tokens[0].flatten(0, 1).float().cpu().numpy(), body.view_plan, grid)


def draw_features(panorama: Image.Image, features: Sequence[Features], height: int = ROWS) -> Figure:
    """The first three principal components of token features, painted onto the sphere below the panorama.

    Sets of one kind with as many channels share their components, fitted on all of them
    (:func:`principal_components`), and their colour scale; others have their own, as the titles say. The first
    component is lightness, the second goes from yellow to blue, the third from green to red.

    Args:
        panorama: equirectangular picture of the whole sphere.
        features: one or several.
        height: rows of the painted images.
    """
    figure = new_figure(7, 3.7 * (1 + len(features)))
    panels = figure.subplots(1 + len(features), 1)
    sphere_axes(panels[0], panorama.convert("RGB").resize((4 * height, 2 * height), Image.Resampling.LANCZOS))
    spaces = [(each.kind, each.tokens.shape[1]) for each in features]
    for space in dict.fromkeys(spaces):
        own = [index for index, each in enumerate(spaces) if each == space]
        masks = [owned_tokens(features[index].plan, features[index].grid).reshape(-1) for index in own]
        scores, shares = principal_components(
            [features[index].tokens[mask] for index, mask in zip(own, masks, strict=True)]
        )
        low, high = np.percentile(np.concatenate(scores), (1, 99), axis=0)
        for index, mask, score in zip(own, masks, scores, strict=True):
            plan, grid = features[index].plan, features[index].grid
            values = np.zeros((len(mask), 3))
            values[mask] = np.clip((score - low) / np.maximum(high - low, 1e-12), 0, 1)
            words = f"3 components, {shares.sum():.0%} of the variance" + (", shared" if len(own) > 1 else "")
            image = _as_colours(paint_tokens(values, plan, grid, height=height))
            sphere_axes(panels[1 + index], image, f"{features[index].name}: {words}", interpolation="nearest")
    return figure


def _as_colours(image: np.ndarray) -> Image.Image:
    """[H, W, 3] in [0, 1] as lightness, yellow to blue and green to red; grey where it is NaN."""
    low, range_ = np.array([35, 48, 78]), np.array([200, 160, 100])
    scaled = np.where(np.isnan(image), np.array([128, 128, 128]), low + np.nan_to_num(image) * range_)
    return Image.fromarray(scaled.round().astype(np.uint8), "YCbCr").convert("RGB")
