"""Token labels: what the direction of each token shows, taught to the tower and the resampler in training.

Where data say for every pixel of a panorama what it shows (semantic panorama sets, rendered scenes), each token of each
view learns it through the same rays that place the token: classes, and of places the offset to the middle of what is
shown and its extents, as detectors without anchors do (Tian et al., "FCOS", 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .geometry_panorama import Grid, View, ViewPlan, ray_angles
from .language_loss_panorama import IGNORED
from .losses_panorama import no_autocast
from .places_panorama import BFoV

PLACE_VALUES = 4  # rows and columns to the middle, logarithms of the extents
_ASIDE = 4  # rays a side that say what is in the cell of a token
_ENOUGH = 1 / 8  # share of a cell that a thing has to fill for the token to show it
_TEN_DEGREES = 10.0  # extents are logarithms of multiples of this
_SHARP = 0.1  # where the loss of places turns from squared to absolute


@dataclass(frozen=True)
class LabelMaps:
    """What a panorama shows, as equirectangular images [H, W] of one size.

    Args:
        classes: field -> class ids in [0, classes of the field), negative where it is not known.
        things: index into `places` of what is seen, negative where no thing is. A token is then labelled by the thing
            that fills most of its cell (an eighth at least), else by what is around.
        places: of the things; `None` of one that has none.
    """

    classes: Mapping[str, np.ndarray]
    things: np.ndarray | None = None
    places: Sequence[BFoV | None] = field(default=())

    def mirrored(self) -> LabelMaps:
        """Of the panorama whose left and right are exchanged."""
        return LabelMaps(
            {name: image[:, ::-1] for name, image in self.classes.items()},
            None if self.things is None else self.things[:, ::-1],
            tuple(None if place is None else place.mirrored() for place in self.places),
        )


def token_labels(
    plan: ViewPlan, grid: Grid, maps: LabelMaps, fields: Sequence[str], yaw_offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tokens of the views of a panorama show.

    Args:
        plan, grid: views, and (rows, columns) of their tokens.
        maps: of the panorama.
        fields: of classes, in the order of the result; one that the maps lack is not known.
        yaw_offset: degrees to the right of the panorama's front that became the front of the views.

    Returns:
        Classes [V, S, fields], -100 where not known, and places [V, S, 4] in float32, NaN where none is: rows and
        columns from the token to the middle of what it shows, in cells of the view, and the logarithms of its width
        (on the sphere) and height in tens of degrees.

    Raises:
        ValueError: for maps of different sizes.
    """
    size = {image.shape for image in (*maps.classes.values(), maps.things) if image is not None}
    if len(size) > 1:
        raise ValueError(f"the maps of a panorama must be of one size, got {sorted(size)}")
    height, width = size.pop() if size else (1, 2)
    cells = _cells(plan, grid, (height, width))  # [V * S, rays]
    if yaw_offset:
        shift = round(yaw_offset / 360 * width)
        cells = cells // width * width + (cells % width + shift) % width
    own = np.ones(cells.shape, bool)
    places = np.full((len(cells), PLACE_VALUES), np.nan, np.float32)
    if maps.things is not None:
        seen = maps.things.reshape(-1)[cells].astype(np.int64)  # [V * S, rays]
        winner = _most_frequent(seen, len(maps.places), _ENOUGH * cells.shape[1])
        own = np.where(winner[:, None] >= 0, seen == winner[:, None], seen < 0)
        own |= ~own.any(1, keepdims=True)
        for number, place in enumerate(maps.places):
            if place is not None and (shown := np.flatnonzero(winner == number)).size:
                places[shown] = _to_place(plan, grid, place.turned(yaw_offset), shown)
    classes = np.full((len(cells), len(fields)), IGNORED, np.int64)
    for number, name in enumerate(fields):
        if name in maps.classes:
            of_rays = np.where(own, maps.classes[name].reshape(-1)[cells], -1).astype(np.int64)
            found = _most_frequent(of_rays, int(of_rays.max()) + 1, 1)
            classes[:, number] = np.where(found < 0, IGNORED, found)
    shape = (plan.num_views, grid[0] * grid[1], -1)
    return torch.from_numpy(classes.reshape(shape)), torch.from_numpy(places.reshape(shape))


@lru_cache(maxsize=8)
def _cells(plan: ViewPlan, grid: Grid, size: Grid) -> np.ndarray:
    """The pixels of an equirectangular image that the rays in the cells of all tokens fall on, [V * S, rays]."""
    rows, columns = grid
    aside = (np.arange(_ASIDE) + 0.5) / _ASIDE - 0.5
    row = (np.arange(rows)[:, None] + aside).reshape(rows, 1, _ASIDE, 1)
    column = (np.arange(columns)[:, None] + aside).reshape(1, columns, 1, _ASIDE)
    found = []
    for view in plan.views:
        yaw, pitch = ray_angles(view.rays_at(row, column, grid))  # [rows, columns, aside, aside]
        x = np.floor((yaw / 360 + 0.5) * size[1]).astype(np.int64) % size[1]
        y = np.floor((0.5 - pitch / 180) * size[0]).astype(np.int64).clip(0, size[0] - 1)
        found.append((y * size[1] + x).reshape(rows * columns, -1))
    return np.concatenate(found)


def _most_frequent(values: np.ndarray, count: int, least: float) -> np.ndarray:
    """Of each row of [N, rays] the value in [0, count) that is there most often, -1 where none is `least` times."""
    if count == 0:
        return np.full(len(values), -1)
    offset = np.arange(len(values))[:, None] * (count + 1)
    inside = np.where((values < 0) | (values >= count), count, values)
    frequency = np.bincount((inside + offset).reshape(-1), minlength=len(values) * (count + 1))
    frequency = frequency.reshape(len(values), count + 1)[:, :count]
    best = frequency.argmax(1)
    return np.where(frequency.max(1) >= max(least, 1), best, -1)


def _to_place(plan: ViewPlan, grid: Grid, place: BFoV, tokens: np.ndarray) -> np.ndarray:
    """From some tokens (counted through the views) to a place, [tokens, 4]; NaN where a view cannot show its middle."""
    size = grid[0] * grid[1]
    middle = View("perspective", place.yaw, place.pitch, fov=90).rotation[:, 2]
    values = np.full((len(tokens), PLACE_VALUES), np.nan, np.float32)
    values[:, 2] = np.log(max(place.x_fov * np.cos(np.radians(place.pitch)), 0.1) / _TEN_DEGREES)
    values[:, 3] = np.log(max(place.y_fov, 0.1) / _TEN_DEGREES)
    for index in np.unique(tokens // size):
        view, here = plan.views[index], tokens // size == index
        row, column, inside = view.cells(middle, grid, margin=max(grid))
        if not inside:
            continue
        values[here, 0] = row - tokens[here] % size // grid[1]
        across = column - tokens[here] % grid[1]
        if view.is_global:
            across = (across + grid[1] / 2) % grid[1] - grid[1] / 2
        values[here, 1] = across
    return values


class TokenLabelHead(nn.Module):
    """Reads labels off tokens [..., D_latent]; training alone has it.

    Args:
        width: D_latent.
        fields: how many classes each field has, in order.
    """

    def __init__(self, width: int, fields: Mapping[str, int]):
        super().__init__()
        self.fields = dict(fields)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, sum(self.fields.values()) + PLACE_VALUES)

    def forward(
        self, tokens: torch.Tensor, classes: torch.Tensor | None, places: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and how right the head is.

        Args:
            tokens: [B, V, S, D_latent].
            classes, places: as :func:`token_labels` gives them, with a leading B; `None` where nothing is known.

        Returns:
            The loss, a scalar: of each panorama the sum over its fields (cross-entropy) and places (smooth L1) of the
            mean over the tokens of which they are known; of a field the mean over tokens that show a thing and the one
            over those that show none are added, because most show none. Of a batch it is the mean over panoramas of
            which anything is known, 0 with a gradient of zero where of none. And scalars without gradient:
            `accuracy_FIELD` over tokens that show a thing (over all of which the field is known where there are no
            things), and `place_error`, mean distance to the middle of what is shown, in cells.
        """
        output = self.layer(self.norm(tokens))  # [B, V, S, all classes + 4]
        if classes is None or places is None:
            return output.sum() * 0.0, {}
        with no_autocast(output):
            output = output.float().flatten(1, 2)  # [B, V * S, ...]
            *scores, shift = output.split([*self.fields.values(), PLACE_VALUES], -1)
            total, figures = output.new_zeros(len(output)), {}
            target = places.flatten(1, 2).to(output)  # [B, V * S, 4]
            placed = target.isfinite().all(-1)  # [B, V * S]
            looked_at = placed if placed.any() else torch.ones_like(placed)
            for name, of_field, wanted in zip(self.fields, scores, classes.flatten(1, 2).unbind(-1), strict=True):
                losses = F.cross_entropy(of_field.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
                known = wanted != IGNORED  # [B, V * S]
                for some in (known & placed, known & ~placed):
                    total = total + (losses * some).sum(1) / some.sum(1).clamp(min=1)
                counted = known & looked_at
                right = (of_field.detach().argmax(-1) == wanted) & counted
                figures[f"accuracy_{name}"] = right.sum() / counted.sum().clamp(min=1)
            target = target.nan_to_num()
            losses = F.smooth_l1_loss(shift, target, beta=_SHARP, reduction="none").sum(-1) * placed
            total = total + losses.sum(1) / placed.sum(1).clamp(min=1)
            away = (shift.detach() - target)[..., :2].norm(dim=-1) * placed
            figures["place_error"] = away.sum() / placed.sum().clamp(min=1)
            labelled = count_labelled(classes, places)
            return total.sum() / max(labelled, 1), figures


def count_labelled(classes: torch.Tensor, places: torch.Tensor) -> int:
    """Panoramas of which anything is known; the loss is a mean over them."""
    known = (classes != IGNORED).flatten(1).any(1) | places.isfinite().all(-1).flatten(1).any(1)
    return int(known.sum())
