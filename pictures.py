"""Pictures of what a model sees and has learned, in one style: each is a function and a command.

    python -m panorama_vlm.pictures views PANORAMA [--model MODEL]         the views on the panorama
    python -m panorama_vlm.pictures matches PANORAMA [--model MODEL]       which tokens stage `vision` compares
    python -m panorama_vlm.pictures features PANORAMA MODEL [MODEL ...]    PCA of token features on the sphere
    python -m panorama_vlm.pictures saliency MODEL PANORAMA "QUESTION"     where an answer looked
    python -m panorama_vlm.pictures curves RUN [RUN ...]                   the learning curves of runs
    python -m panorama_vlm.pictures directions RESULTS [RESULTS ...]       the evaluation by direction

The ending of `--output` says the format (PNG, JPEG, SVG, PDF). Colours are those that colour-blind readers can tell
apart, with numbers, line styles or hatches beside them, and their lightness alone says as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'panorama-vlm[pictures]'") from error

from .evaluation.bootstrap import by_panorama, drawn_means, interval
from .exports_panorama import whole_sphere
from .geometry_panorama import (
    VIEW_STRATEGIES,
    Grid,
    View,
    ViewOptions,
    ViewPlan,
    owned_tokens,
    plan_rays,
    ray_angles,
    ray_correspondences,
    strip_correspondences,
)
from .image_processing_panorama import READ_OPTIONS, PanoramaImageProcessor
from .modeling_panorama import PanoramaVLM
from .pipeline_panorama import PanoramaPipeline
from .places_panorama import SECTORS
from .processing_panorama import PanoramaProcessor
from .sampling_panorama import erp_to_views
from .tokens_panorama import image_tokens
from .train.card import COLOURS, loss_points, read_history, smooth

STYLES = ("solid", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)))  # of lines, beside their colours
HATCHES = ("", "///", "...", "xxx")  # of bars
MARKERS = ("", "o", "s", "^")  # of runs
HEAT = "inferno"  # its lightness rises from end to end
TOKENS = ("tower", "resampler")
LOG, PREDICTIONS = "metrics.jsonl", "predictions.jsonl"  # of the trainer, of the evaluation
_WIDTH = 1024  # pixels of a panorama in a picture
_ROWS = 256  # of what is painted onto the sphere
_MOST_TOKENS = 256  # of an answer
_FEW = 10  # points, below which each is shown
_STAGES = ("vision", "resampler", "finetune")
_BEHIND, _TOP = (-180, 180, -90, 90), "#222222"


# Style


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


def _sphere(axes: Any, pixels: Any, title: str = "", **options: Any) -> None:
    """An equirectangular picture on axes in degrees of yaw and pitch."""
    axes.imshow(pixels, extent=_BEHIND, aspect="equal", **options)
    axes.set_xticks(range(-180, 181, 90), ["back", "left", "front", "right", "back"])
    axes.set_yticks((-90, 0, 90), ["down", "horizon", "up"])
    axes.tick_params(length=2, labelsize=8)
    axes.set_xlim(-180, 180)
    axes.set_ylim(-90, 90)
    if title:
        axes.set_title(title, fontsize=9, loc="left")


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _halo(width: float) -> list[Any]:
    """White around lines and letters, so that they are seen before anything."""
    return [withStroke(linewidth=width, foreground="white")]


# The views


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
    _sphere(axes, panorama.convert("RGB").resize((_WIDTH, _WIDTH // 2), Image.Resampling.LANCZOS))
    grid = below.subplots(rows, columns, squeeze=False).ravel()
    for own in grid:
        own.axis("off")
    colours = dict(zip(plan.tiles, cycle(COLOURS), strict=False))
    for index, (view, own) in enumerate(zip(plan.views, grid, strict=False)):
        colour = colours.get(index, _TOP)
        if not view.is_global:
            axes.plot(*outline(view).T, color=colour, linewidth=1.8, path_effects=_halo(3.2))
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


# Matched tokens


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


# What directions say, painted onto the sphere


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


def _groups(plan: ViewPlan) -> list[list[int]]:
    """The views of a plan that share the sphere among them: its tiles, and each global view alone."""
    groups = [list(plan.tiles), *([index] for index in range(plan.num_views) if index not in plan.tiles)]
    return [group for group in groups if group]


def _erp_rays(height: int) -> np.ndarray:
    return View("erp").rays((height, 2 * height)).reshape(-1, 3)


def paint_tokens(
    values: np.ndarray, plan: ViewPlan, grid: Grid, shown: np.ndarray | None = None, height: int = _ROWS
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
    rays, size = _erp_rays(height), grid[0] * grid[1]
    image = np.full((len(rays), values.shape[1]), np.nan)
    for group in reversed(_groups(plan)):  # tiles last: what they see is theirs
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


def draw_features(panorama: Image.Image, features: Sequence[Features], height: int = _ROWS) -> Figure:
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
    _sphere(panels[0], panorama.convert("RGB").resize((4 * height, 2 * height), Image.Resampling.LANCZOS))
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
            _sphere(panels[1 + index], image, f"{features[index].name}: {words}", interpolation="nearest")
    return figure


def _as_colours(image: np.ndarray) -> Image.Image:
    """[H, W, 3] in [0, 1] as lightness, yellow to blue and green to red; grey where it is NaN."""
    low, range_ = np.array([35, 48, 78]), np.array([200, 160, 100])
    scaled = np.where(np.isnan(image), np.array([128, 128, 128]), low + np.nan_to_num(image) * range_)
    return Image.fromarray(scaled.round().astype(np.uint8), "YCbCr").convert("RGB")


# Where an answer looked


class Saliency(NamedTuple):
    """Where an answer looked.

    Attributes:
        answer: that it is of.
        heat: how much each direction has to do with it, [H, 2H] on the equirectangular image, at least 0; its mean over
            the sphere is 1.
    """

    answer: str
    heat: np.ndarray


@torch.inference_mode(False)
def saliency(
    pipe: PanoramaPipeline,
    asked: Mapping[str, Any],
    answer: str | None = None,
    *,
    height: int = _ROWS,
    max_new_tokens: int = _MOST_TOKENS,
) -> Saliency:
    """Where an answer looked: how strongly its log-probability depends on each image token (the length of the gradient;
    Simonyan et al. 2014, "Deep Inside Convolutional Networks", section 3), spread over the directions that it shows.

    It costs a pass forward and one backward, needs no attention weights, so that any attention serves, and leaves the
    model as it was. `docs/pictures.md` says how true it is: what becomes of answers where these directions are masked.

    Args:
        pipe: asks the model.
        asked: `{"panorama": ..., "question": ...}` or `{"messages": ...}` with one panorama, as a pipeline takes them.
        answer: what was said; what the model says where it is not given, with the steps before it.
        height: rows of the heat map.
        max_new_tokens: of what the model says.

    Raises:
        ValueError: for several panoramas or none, and where there is no answer.
    """
    model, processor = pipe.model, pipe.processor
    given = {name: value.to(model.device) for name, value in pipe.preprocess(dict(asked))["inputs"].items()}
    if len(given.get("pixel_values", ())) != 1:
        raise ValueError(f"a heat map is of one panorama, got {len(given.get('pixel_values', ()))} in the chat")
    if answer is None:
        said = model.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            tokenizer=processor.tokenizer,
        )
        ids, answer = said.generated_ids[:1], said.text[0]
    else:
        ids = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    if not ids.shape[1]:
        raise ValueError("an empty answer looked nowhere: ask something that is answered")
    input_ids = torch.cat([given["input_ids"], ids], 1)
    masks = {name: given.get(name) for name in ("view_mask", "further_views")}
    with torch.no_grad():
        image = model.model.get_image_features(given["pixel_values"], **masks, return_dict=True)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(input_ids), "logits_to_keep": ids.shape[1] + 1}
    if model.config.position_encoding == "panorope":
        options["position_ids"] = model.model.panorama_positions(input_ids, 1, options["attention_mask"], **masks)
    with torch.enable_grad():
        (tokens,) = (each.clone().requires_grad_() for each in image.pooler_output)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[tokens])}
        logits = model(input_ids=input_ids, mm_encoder_outputs=encoded, use_cache=False, **options).logits[:, :-1]
        likely = logits.float().log_softmax(-1).gather(-1, ids[..., None]).sum()
        (slopes,) = torch.autograd.grad(likely, tokens)
    return Saliency(answer, heat_map(model, slopes.float().norm(dim=-1).cpu().numpy(), given, height))


def heat_map(model: PanoramaVLM, scores: np.ndarray, given: Mapping[str, torch.Tensor], height: int) -> np.ndarray:
    """Scores of image tokens, spread over the directions that they show.

    Args:
        model: that is shown them.
        scores: [image tokens] of one panorama, at least 0.
        given: `view_mask` and `further_views` of the panorama, where it has them.
        height: rows of the map.

    Returns:
        Of each direction the sum over the tokens that show it, of score by solid angle, so that a token counts as much
        however wide it is: [height, 2 * height], of mean 1 over the sphere.
    """
    plan, grid, config = model.model.view_plan, model.model.token_grid, model.config
    size = grid[0] * grid[1]
    indices, _ = image_tokens(plan, grid, config.token_selection, config.position_code, torch.device("cpu"))
    kept = indices.numpy()
    if (mask := given.get("view_mask")) is not None:
        kept = kept[mask[0].cpu().numpy().astype(bool)[kept // size]]
    further = given.get("further_views", torch.empty(1, 0, 3))[0].cpu().numpy()
    closer = [View("perspective", yaw, pitch, fov) for yaw, pitch, fov in further.tolist() if np.isfinite(yaw)]
    views = [*plan.views, *closer]
    shown, density = np.zeros(len(views) * size, bool), np.zeros(len(views) * size)
    kept = np.concatenate([kept, np.arange(plan.num_views * size, len(views) * size)])
    areas = np.concatenate([view.solid_angles(grid).reshape(-1) for view in views])
    shown[kept], density[kept] = True, scores / areas[kept]
    shown, density = shown.reshape(-1, size), density.reshape(-1, size)
    rays = _erp_rays(height)
    total = np.zeros(len(rays))
    for group in [*_groups(plan), *([index] for index in range(plan.num_views, len(views)))]:
        found = tokens_that_show([views[index] for index in group], grid, rays, shown[group])
        total += np.where(found >= 0, density[group].reshape(-1)[found], 0)
    weights = View("erp").solid_angles((height, 2 * height))
    heat = total.reshape(height, 2 * height)
    return heat / max((heat * weights).sum() / weights.sum(), 1e-30)


def hottest(heat: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The directions that are looked at most, a `share` of the sphere, bool [H, 2H]."""
    areas = View("erp").solid_angles(heat.shape).reshape(-1)
    order = np.argsort(-heat.reshape(-1), kind="stable")
    inside = np.zeros(heat.size, bool)
    inside[order[: np.searchsorted(np.cumsum(areas[order]), share * areas.sum())]] = True
    return inside.reshape(heat.shape)


def draw_saliency(panorama: Image.Image, found: Saliency, question: str = "", bar: bool = True) -> Figure:
    """The panorama in grey with the heat map over it, and a line around the tenth of the sphere that is looked at most.

    Args:
        panorama: equirectangular picture of the whole sphere.
        found: :func:`saliency` of it.
        question: for the title.
        bar: whether question, answer and the scale are shown.
    """
    figure = new_figure(8.5, 4.2) if bar else new_figure(5.2, 2.75)
    axes = figure.subplots()
    height, width = found.heat.shape
    grey = panorama.convert("L").resize((_WIDTH, _WIDTH // 2), Image.Resampling.LANCZOS)
    title = "\n".join(_short(words) for words in (question, found.answer) if words) if bar else ""
    _sphere(axes, grey, title, cmap="gray", vmin=-40, vmax=300)
    top = max(float(np.percentile(found.heat, 99.5)), 1e-6)
    scaled = np.clip(found.heat / top, 0, 1)
    axes.imshow(
        found.heat, extent=_BEHIND, cmap=HEAT, vmin=0, vmax=top, alpha=0.1 + 0.55 * scaled, interpolation="bilinear"
    )
    yaw, pitch = (np.arange(width) + 0.5) / width * 360 - 180, 90 - (np.arange(height) + 0.5) / height * 180
    axes.contour(yaw, pitch, hottest(found.heat).astype(float), [0.5], colors="white", linewidths=1.2)
    if bar:
        scale = figure.colorbar(ScalarMappable(Normalize(0, top), HEAT), ax=axes, shrink=0.8, pad=0.01)
        scale.set_label("times the mean of the sphere", fontsize=8)
        scale.ax.tick_params(labelsize=8)
    return figure


def _short(words: str, longest: int = 110) -> str:
    words = " ".join(words.split()).replace("$", r"\$")
    return words if len(words) <= longest else f"{words[: longest - 1]}…"


# Learning curves


def read_run(run: str | Path) -> dict[str, list[dict[str, Any]]]:
    """What a run logged, by stage.

    Args:
        run: folder of the run (`--output` of the trainer), of one stage's log, or a `metrics.jsonl`.

    Raises:
        ValueError: where there is no log, or a line is none.
    """
    path = Path(run)
    files = [path] if path.is_file() else [*sorted(path.glob(f"logs/*/{LOG}")), *path.glob(LOG)]
    if not files:
        what = "holds no log" if path.is_dir() else "is not there"
        raise ValueError(f"{str(run)!r} {what}: name the --output of a run, which has logs/STAGE/{LOG}")
    history: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for stage, entries in read_history(file).items():
            history.setdefault(stage, []).extend(entries)
    if not any(history.values()):
        raise ValueError(f"{str(run)!r} has logged nothing yet ({files[0]})")
    return history


def _series(entries: Iterable[Mapping[str, Any]], wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Steps and finite values [N, 2] of each figure whose name is wanted; figures that are equal throughout are one."""
    names = sorted({name for entry in entries for name in entry if wanted(name)})
    found = {name.removeprefix(_RATE): loss_points(entries, name) for name in names}
    equal: dict[bytes, list[str]] = {}
    for name, points in found.items():
        equal.setdefault(points.tobytes(), []).append(name)
    return {", ".join(same): found[same[0]] for same in equal.values() if len(found[same[0]])}


_RATE = "learning_rate/"
_ROWS_OF_CURVES: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name in ("loss", "eval_loss"),
    "learning rate": lambda name: name.startswith(_RATE),
    "share": lambda name: "accuracy" in name or name == "retrieval",
}


def draw_curves(runs: Sequence[str | Path]) -> Figure:
    """The learning curves of one or several runs: a column a stage, with loss, learning rates, and the shares that
    were measured on the way (accuracies of token labels, retrieval of matched tokens) where there are any.

    Thin lines are what was logged, thick ones a running mean; a run has a colour and a marker, what is drawn of it a
    line style.

    Raises:
        ValueError: see :func:`read_run`.
    """
    logs = dict(zip(_names(runs), map(read_run, runs), strict=True))
    stages = [stage for stage in _STAGES if any(stage in log for log in logs.values())]
    stages += sorted({stage for log in logs.values() for stage in log} - set(_STAGES))
    drawn = {
        (row, stage, run): _series(log.get(stage, ()), wanted)
        for row, wanted in _ROWS_OF_CURVES.items()
        for stage in stages
        for run, log in logs.items()
    }
    rows = [row for row in _ROWS_OF_CURVES if any(series for (own, *_), series in drawn.items() if own == row)]
    figure = new_figure(max(4.2 * len(stages), 5), 2.5 * len(rows) + 0.4)
    panels = figure.subplots(len(rows), len(stages), squeeze=False)
    looks = dict(zip(logs, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    for (row, stage), axes in zip(product(rows, stages), panels.flat, strict=True):
        names = sorted({name for run in logs for name in drawn[row, stage, run]})
        names.sort(key=lambda name: name == "eval_loss")
        styles = dict(zip(names, cycle(STYLES), strict=False))
        for name, run in product(names, logs):
            if (points := drawn[row, stage, run].get(name)) is not None:
                _line(axes, points, *looks[run], styles[name], name != "eval_loss" and row != "learning rate")
        _tidy(axes)
        axes.set_title(stage if row == rows[0] else "", fontsize=10)
        axes.set_ylabel(row if stage == stages[0] else "", fontsize=9)
        axes.set_xlabel("step" if row == rows[-1] else "", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if row == "learning rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            axes.yaxis.get_offset_text().set_fontsize(8)
        if row == "share":
            axes.set_ylim(0, 1)
        if not names:
            axes.axis("off")
        elif len(names) > 1 or row == "share":
            for name in names:
                axes.plot([], [], color="0.2", linestyle=styles[name], label=name)
            axes.legend(frameon=False, fontsize=7, handlelength=3)
    if len(logs) > 1:
        for run, (colour, marker) in looks.items():
            panels[0, 0].plot([], [], color=colour, linewidth=2, marker=marker, markerfacecolor="white", label=run)
        handles = panels[0, 0].lines[-len(logs) :]
        figure.legend(handles, [*logs], loc="outside upper left", ncols=min(len(logs), 4), frameon=False, fontsize=8)
    return figure


def _line(axes: Any, points: np.ndarray, colour: str, marker: str, style: Any, smoothed: bool) -> None:
    steps, values = points.T
    if smoothed and len(steps) >= _FEW:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        values = smooth(values)
    marker = marker or ("." if len(steps) < _FEW else "")
    axes.plot(
        steps,
        values,
        color=colour,
        linestyle=style,
        linewidth=1.6,
        marker=marker,
        markersize=5,
        markerfacecolor="white",
        markevery=max(1, len(steps) // 12),
    )


def _names(paths: Sequence[str | Path]) -> list[str]:
    """The last parts of paths that tell them apart."""
    if not paths:
        raise ValueError("name at least one folder")
    parts = [Path(path).absolute().parts for path in paths]
    if len({*parts}) < len(parts):
        raise ValueError(f"a folder is named twice: {', '.join(map(str, paths))}")
    length = next(n for n in range(1, 99) if len({own[-n:] for own in parts}) == len(parts))
    return ["/".join(own[-length:]) for own in parts]


# The evaluation by direction


class Sector(NamedTuple):
    """An eighth of the horizon.

    Attributes:
        name: such as `front-right`.
        questions: how many there are whose answer lies there.
        accuracy: share of them answered right, NaN where there are none.
        interval: of 95 %, by bootstrap over panoramas; `None` where there are none.
    """

    name: str
    questions: int
    accuracy: float
    interval: list[float] | None


def accuracy_by_direction(results: str | Path) -> list[Sector]:
    """How many answers are right by where they lie around the observer.

    Args:
        results: folder of an evaluation (`python -m panorama_vlm.evaluation`), which holds `predictions.jsonl`. Of
            panoramas that were turned the answers about the one as given count.

    Raises:
        ValueError: where there are no predictions, or none says where its answer lies.
    """
    file = Path(results) / PREDICTIONS
    if not file.is_file():
        what = "is no folder" if not Path(results).is_dir() else f"holds no {PREDICTIONS}"
        raise ValueError(f"{str(results)!r} {what}: name the output of python -m panorama_vlm.evaluation")
    judged = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    known = [
        each
        for each in judged
        if str(each.get("variant", "0")) == "0" and each.get("yaw") is not None and each.get("right") is not None
    ]
    if not known:
        raise ValueError(f"none of the {len(judged)} answers in {str(file)!r} says in which direction it lies")
    sectors = [SECTORS[round(each["yaw"] / 45) % 8] for each in known]
    right, panoramas = [float(each["right"]) for each in known], [each["panorama"] for each in known]
    sums, counts, names = by_panorama(right, panoramas, sectors)
    drawn = drawn_means(sums, counts)
    own = {
        name: Sector(name, int(counts[:, i].sum()), float(sums[:, i].sum() / counts[:, i].sum()), interval(drawn[:, i]))
        for i, name in enumerate(names)
    }
    return [own.get(name, Sector(name, 0, float("nan"), None)) for name in SECTORS]


def draw_directions(results: Sequence[str | Path]) -> Figure:
    """Accuracy by direction around the observer, seen from above, with 95 % intervals; of one or several evaluations.

    Raises:
        ValueError: see :func:`accuracy_by_direction`.
    """
    found = dict(zip(_names(results), map(accuracy_by_direction, results), strict=True))
    figure = new_figure(5.6, 5.4 + 0.25 * (len(found) > 1))
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    width = np.radians(40) / len(found)
    for place, (name, sectors) in enumerate(found.items()):
        known = [(index, each) for index, each in enumerate(sectors) if each.interval is not None]
        turn = (place - (len(found) - 1) / 2) * width
        angles = np.array([np.radians(45 * index) + turn for index, _ in known])
        shares = np.array([100 * each.accuracy for _, each in known])
        edges = 100 * np.array([each.interval for _, each in known])
        look = {"color": COLOURS[place % len(COLOURS)], "edgecolor": "white", "hatch": HATCHES[place % len(HATCHES)]}
        axes.bar(angles, shares, width=width * 0.92, alpha=0.85, label=name, **look)
        axes.vlines(angles, edges[:, 0], edges[:, 1], color=_TOP, linewidth=1.4)
    counts = [[each[index].questions for each in found.values()] for index in range(8)]
    labels = [
        f"{name}\n{'of ' + str(own[0]) if len(set(own)) == 1 else 'of ' + ' / '.join(map(str, own))}"
        for name, own in zip(SECTORS, counts, strict=True)
    ]
    axes.set_xticks(np.radians(45 * np.arange(8)), labels, fontsize=8)
    axes.tick_params(axis="x", pad=8)
    axes.set_ylim(0, 100)
    axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", "100 %"], fontsize=7)
    axes.set_rlabel_position(22.5)
    axes.grid(alpha=0.35, linewidth=0.6)
    words = "right answers by direction, seen from above; lines: 95 % intervals"
    axes.set_title(words, fontsize=9, loc="left", x=-0.15, pad=24)
    if len(found) > 1:
        figure.legend(loc="outside upper left", ncols=min(len(found), 3), frameon=False, fontsize=8)
    return figure


# The command


def _load(name: str, device: str = "cpu") -> PanoramaPipeline:
    """A model and its processor, from a folder or the Hub."""
    try:
        load = PanoramaVLM.from_checkpoint if Path(name).is_dir() else PanoramaVLM.from_pretrained
        model = load(name).eval().to(device)
        return PanoramaPipeline(model, processor=PanoramaProcessor.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]}") from error


def _opened(panorama: str, processor: PanoramaImageProcessor | None = None) -> Image.Image:
    """A panorama as a model's processor lays it on the sphere."""
    own = {name: getattr(processor, name) for name in READ_OPTIONS} if processor else {}
    return whole_sphere(panorama, 2 * _WIDTH, **own)


def _views_of(options: argparse.Namespace) -> tuple[Image.Image, ViewPlan, float, Grid]:
    """The panorama, the views, their overlap and tokens, of a model's folder or of options."""
    if options.model:
        try:
            processor = PanoramaProcessor.from_pretrained(options.model)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load the processor of {options.model!r}: {first}") from error
        from .configuration_panorama import PanoramaConfig

        config = PanoramaConfig.from_pretrained(options.model)
        picture = _opened(options.panorama, processor.image_processor)
        return picture, config.view_plan, config.overlap_ratio, config.token_grid
    own = ViewOptions(options.view_strategy, options.fov_deg, options.overlap_ratio, pole_caps=options.pole_caps)
    return _opened(options.panorama), own.plan, own.overlap_ratio, (16, 16)


def _views(options: argparse.Namespace) -> Figure:
    picture, plan, _, _ = _views_of(options)
    return draw_views(picture, plan)


def _matches(options: argparse.Namespace) -> Figure:
    picture, plan, overlap, grid = _views_of(options)
    return draw_matches(picture, plan, overlap, grid)


def _features(options: argparse.Namespace) -> Figure:
    features = []
    for name, words in zip(_names(options.models), options.models, strict=True):
        pipe = _load(words, options.device)
        source = pipe.processor.image_processor
        picture = _opened(options.panorama, source)
        features += [
            token_features(pipe.model, pipe.processor, options.panorama, kind, f"{name}, {kind}")
            for kind in options.tokens
        ]
    return draw_features(picture, features)


def _saliency(options: argparse.Namespace) -> Figure:
    pipe = _load(options.model, options.device)
    found = saliency(pipe, {"panorama": options.panorama, "question": options.question}, options.answer)
    print(found.answer)
    return draw_saliency(_opened(options.panorama, pipe.processor.image_processor), found, options.question)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="PICTURE")

    def command(name: str, words: str, draw: Callable[[argparse.Namespace], Figure]) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=words, description=words)
        own.add_argument("--output", default=f"{name}.png", help=f"picture that is written (default: {name}.png)")
        own.set_defaults(draw=draw)
        return own

    default = "cuda" if torch.cuda.is_available() else "cpu"
    for name, words, draw in (
        ("views", "the views on the panorama", _views),
        ("matches", "which tokens of the first two tiles stage vision compares", _matches),
    ):
        own = command(name, words, draw)
        own.add_argument("panorama", help="file of a panorama")
        own.add_argument("--model", help="folder or Hub id whose views these are; without it the options say")
        own.add_argument("--view-strategy", default="anyres_e2p", choices=sorted(VIEW_STRATEGIES))
        own.add_argument("--pole-caps", action="store_true", help="one tile straight up and one straight down")
        own.add_argument("--fov-deg", type=float, default=90.0, help="field of view (default: 90)")
        own.add_argument("--overlap-ratio", type=float, default=0.5, help="of neighbouring tiles (default: 0.5)")
    own = command("features", "principal components of token features on the sphere", _features)
    own.add_argument("panorama", help="file of a panorama")
    own.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids, such as before and after a stage")
    own.add_argument("--tokens", nargs="+", choices=TOKENS, default=["resampler"], help="(default: resampler)")
    own.add_argument("--device", default=default, help="where the models run")
    own = command("saliency", "where an answer looked", _saliency)
    own.add_argument("model", help="folder or Hub id")
    own.add_argument("panorama", help="file of a panorama")
    own.add_argument("question", help="in words")
    own.add_argument("--answer", help="what was said (default: what the model says)")
    own.add_argument("--device", default=default, help="where the model runs")
    own = command("curves", "the learning curves of runs", lambda options: draw_curves(options.runs))
    own.add_argument("runs", nargs="+", metavar="RUN", help="folders that the trainer wrote (--output)")
    own = command("directions", "accuracy by direction", lambda options: draw_directions(options.results))
    own.add_argument("results", nargs="+", metavar="RESULTS", help="folders that the evaluation wrote (--output)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    try:
        figure = options.draw(options)
        figure.savefig(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
