"""Tokens of panoramas and of example views, and which way an example looks in a panorama.

An example view is painted onto the sphere where it may have looked, and the views of the model's own plan are cut out
of that: at the right place its tokens are those of the panorama, of the same views at the same scale. Roll is taken to
be 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..geometry_panorama import (
    Direction,
    View,
    check_direction,
    direction_weights,
    narrowest_cell,
    plan_rays,
    ray_angles,
)
from ..image_processing_panorama import READ_OPTIONS
from ..options_panorama import check_one_of
from ..reading_panorama import layout_of, read_photograph

KINDS = ("tower", "resampled")

_PITCHES = (-40.0, -20.0, 0.0, 20.0, 40.0)  # where an example is painted to vote: a tile bends what is aside
_STEP = 0.4  # of a token lie between the directions that are tried first: half a token aside it is hardly alike
_HIGHEST = 60.0  # degrees of pitch, up and down, of these
_LEAST = 0.2  # of an example's tokens that a view holds then
_CLOSER = (3.0, 3.0, 1.5, 0.75)  # steps in degrees that make the best ones exact
_TRIED = (48, 16, 8, 4)  # of these so many places are tried at each
_AT_ONCE = 64  # views that the tower is shown
_FLOOR = 1e-4  # of the largest variance, below which none is raised: noise would be


class Painted(NamedTuple):
    """Tokens that an example view has where it is painted.

    Args:
        places: which of a panorama's T tokens they are, int64 [K].
        tokens: [K, D].
        held: how many there are with those of the views that were left out.
    """

    places: torch.Tensor
    tokens: torch.Tensor
    held: int


@dataclass(frozen=True)
class Whitening:
    """Tokens without what all of them share: `normalise((x - mean) @ matrix)`, of mean 0 and about the same variance in
    every direction, so that their cosines tell panoramas apart.

    Args:
        mean: [D].
        matrix: [D, D].
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    @classmethod
    def fit(cls, tokens: torch.Tensor) -> Whitening:
        """Of tokens [N, D]: PCA-whitening (Jégou and Chum 2012), variances raised by 1e-4 of the largest."""
        wide = tokens.double()
        mean = wide.mean(0)
        values, vectors = torch.linalg.eigh((wide - mean).T @ (wide - mean) / max(len(wide) - 1, 1))
        raised = values.clamp(min=0) + _FLOOR * values.max().clamp(min=1e-12)
        return cls(mean.float(), (vectors / raised.sqrt()).float())

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D] of length 1, float32."""
        return F.normalize((tokens.float().cpu() - self.mean) @ self.matrix, dim=-1)


class TokenEncoder:
    """Tokens of panoramas and of example views, by one model.

    Args:
        model: a :class:`PanoramaVLM`, where it is to run.
        processor: its :class:`PanoramaProcessor`, or its image processor.
        kind: `"tower"`, patch tokens of the vision tower, or `"resampled"`, those that the resampler makes of them.

    Attributes:
        rays: unit rays of the T tokens that are indexed, float32 [T, 3]: each part of the sphere once, of the tile that
            owns it, and of a global view where no tile looks.
    """

    def __init__(self, model: Any, processor: Any, kind: str = "tower"):
        check_one_of("kind", kind, KINDS)
        self.model, self.kind = model.model.eval(), kind
        self.images = getattr(processor, "image_processor", processor)
        config = model.config
        self.plan, self.size = config.view_plan, config.image_size
        at_tower = config.tower.grid(config.vision_config, config.image_size)
        self.grid = at_tower if kind == "tower" else config.token_grid
        self.counted = direction_weights(self.plan, self.grid, ())[0] > 0  # [V, S]
        self.view_rays = plan_rays(self.plan, self.grid)  # [V, S, 3]
        self.rays = torch.tensor(self.view_rays[self.counted], dtype=torch.float32)
        self.fine = torch.tensor(plan_rays(self.plan, (self.size, self.size)), dtype=torch.float32)

    def mark(self) -> dict[str, str]:
        """What decides the tokens: all weights that make them, the views, and how panoramas are read."""
        parts = {"tower": self.model.vision_tower, **({"resampler": self.model.resampler} if self._resampled else {})}
        digest = hashlib.sha256()
        for part, module in parts.items():
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        read = {name: value for name, value in self.images.to_dict().items() if name in READ_OPTIONS}
        return {
            "tokens": self.kind,
            "weights": digest.hexdigest()[:16],
            "views": hashlib.sha256(repr((self.plan, self.grid, self.size)).encode()).hexdigest()[:16],
            "reading": json.dumps(read, sort_keys=True, default=list),
        }

    @property
    def _resampled(self) -> bool:
        return self.kind == "resampled"

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised views [N, 3, size, size] -> [N, S, D], float32 on the CPU."""
        encode = self.model.encode_views if self._resampled else self.model.tower_tokens
        device = next(self.model.parameters()).device
        return torch.cat([encode(some[:, None].to(device))[:, 0].float().cpu() for some in pixels.split(_AT_ONCE)])

    def panorama(self, source: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [V, 3, size, size] of one panorama, and which of its T tokens the camera saw, bool [T].

        Raises:
            ValueError, OSError: for one that cannot be read; it is named.
        """
        inputs = self.images(source, return_tensors="pt")
        mask = inputs["view_mask"][0] if "view_mask" in inputs else torch.ones(self.plan.num_views, dtype=torch.bool)
        shown = mask[self.counted.nonzero()[0]]
        layout = layout_of(source, align_heading=self.images.align_heading, level=self.images.level)
        if (layout.height, layout.width) != layout.full:
            angles = zip(*ray_angles(self.rays.numpy()), strict=True)
            shown &= torch.tensor([layout.sees(float(yaw), float(pitch)) for yaw, pitch in angles])
        return inputs["pixel_values"][0], shown

    def panorama_tokens(self, views: torch.Tensor) -> torch.Tensor:
        """Views of panoramas [B, V, 3, size, size] -> [B, T, D]."""
        tokens = self.tokens(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return tokens[:, torch.from_numpy(self.counted)]

    def example(self, source: Any, fov: float) -> torch.Tensor:
        """A photograph as an example view: its middle square, normalised, [3, h, h], no finer than twice the views.

        Args:
            fov: the field of view of its shorter side in degrees.

        Raises:
            ValueError: for one that cannot be read, and a field of view that cannot be.
        """
        check_direction((0.0, 0.0, fov), "view")
        pixels = read_photograph(source, self.images.max_pixels)
        pixels = pixels if pixels.dtype == torch.uint8 else (255 * pixels).round().byte()
        height = min(pixels.shape[:2])
        finest = min(min(view.fov, 120.0) for view in self.plan.views)
        wanted = 2 * self.size * math.tan(math.radians(fov) / 2) / math.tan(math.radians(finest) / 2)
        side = max(8, min(height, round(wanted)))
        square = ImageOps.fit(Image.fromarray(pixels.cpu().numpy()), (side, side), Image.Resampling.BOX)
        levels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.images.image_mean, self.images.image_std))
        return (levels - mean) / std

    def painted(self, example: torch.Tensor, directions: Sequence[Direction], least: float = 0.0) -> Iterator[Painted]:
        """The tokens of an example view [3, h, h] painted at each of these directions: those of the plan's tokens whose
        rays it holds. What lies beside it shows the colours of its border.

        Args:
            least: views are left out that hold less than this share of an example's tokens.
        """
        inside = (View("perspective", *each).cells(self.view_rays, (64, 64), margin=0.5)[2] for each in directions)
        held = [self.counted & each for each in inside]  # [V, S] each
        enough = [each.sum(1) >= max(1, least * each.sum()) for each in held]
        # A tile sees an example in the same way wherever it is as far to the left or right of it.
        cuts: dict[Any, tuple[int, int]] = {}
        for at, each in enumerate(enough):
            cuts |= {self._cut_of(directions[at], view): (at, view) for view in np.flatnonzero(each).tolist()}
        seen: dict[Any, torch.Tensor] = {}
        for some in _batched(cuts, _AT_ONCE):
            views = torch.stack([self._cut(example, directions[at], view) for at, view in (cuts[cut] for cut in some)])
            seen.update(zip(some, self.tokens(views), strict=True))
        number = np.cumsum(self.counted).reshape(self.counted.shape) - 1  # [V, S]
        for direction, of_each, views in zip(directions, held, enough, strict=True):
            tokens = [
                seen[self._cut_of(direction, v)][torch.from_numpy(of_each[v])] for v in np.flatnonzero(views).tolist()
            ]
            places = torch.from_numpy(number[of_each & views[:, None]])
            yield Painted(places, torch.cat(tokens) if tokens else torch.zeros(0, 1), int(of_each.sum()))

    def _cut_of(self, direction: Direction, view: int) -> tuple[Any, ...]:
        tile = self.plan.views[view]
        ahead = 0.0 if tile.kind == "erp" else tile.yaw
        turn = round((direction[0] - ahead) % 360, 4) % 360
        return tile.kind, tile.pitch, tile.fov, turn, direction[1], None if tile.kind == "perspective" else view

    def _cut(self, example: torch.Tensor, direction: Direction, view: int) -> torch.Tensor:
        """A view [3, size, size] of the sphere on which an example is painted."""
        camera = self.fine[view] @ torch.tensor(View("perspective", *direction).rotation, dtype=torch.float32)
        depth = camera[:, 2:].clamp(min=1e-3) * math.tan(math.radians(direction[2]) / 2)
        place = camera[:, :2] / depth * torch.tensor([1.0, -1.0])
        place = place.view(1, self.size, self.size, 2).clamp(-2, 2)
        return F.grid_sample(example[None], place, padding_mode="border", align_corners=False)[0]


def _batched(values: Iterable[Any], count: int) -> Iterator[tuple[Any, ...]]:
    left = iter(values)
    while some := tuple(islice(left, count)):  # itertools.batched is of Python 3.12
        yield some


def seeds(encoder: TokenEncoder, fov: float) -> list[Direction]:
    """Where an example is painted before anything is known, so that however high it looked some of its tokens lie as
    they lie in the panorama: in the middle of a tile that looks ahead, above and below it."""
    tile = min((view for view in encoder.plan.views), key=lambda view: abs(view.pitch) + abs(view.yaw) + view.is_global)
    return [(tile.yaw, max(-90.0, min(90.0, tile.pitch + pitch)), fov) for pitch in _PITCHES]


def query_tokens(encoder: TokenEncoder, whitening: Whitening, example: torch.Tensor, fov: float) -> torch.Tensor:
    """Tokens of an example view [K, D], whitened."""
    return torch.cat([whitening(each.tokens) for each in encoder.painted(example, seeds(encoder, fov))])


class Aligned(NamedTuple):
    """How an example lies in a panorama: which of those given, yaw and pitch in degrees, and the mean cosine."""

    panorama: int
    yaw: float
    pitch: float
    score: float


def first_places(
    encoder: TokenEncoder, whitening: Whitening, example: torch.Tensor, fov: float, panoramas: torch.Tensor
) -> list[Aligned]:
    """Likely places of an example in panoramas: it is painted in directions all around, 0.4 of a token apart,
    and its tokens compared with theirs; the three best places in each panorama, the best of all first.

    Args:
        panoramas: tokens [C, T, D], zero where the camera did not look.
    """
    around = math.ceil(360 / (_STEP * narrowest_cell(encoder.plan, encoder.grid)))
    pitches = np.arange(-round(_HIGHEST * around / 360), round(_HIGHEST * around / 360) + 1) * 360 / around
    grid = [(yaw, float(pitch), fov) for pitch in pitches for yaw in (np.arange(around) * 360 / around).tolist()]
    scores = torch.full((len(grid), len(panoramas)), -1.0)
    for at, painted in enumerate(encoder.painted(example, grid, _LEAST)):
        if len(painted.places):
            own = whitening(painted.tokens).flatten()
            # What is left out counts as unlike: a mean of few tokens is large by chance.
            scores[at] = panoramas[:, painted.places].flatten(1) @ own / painted.held
    scores = scores.view(len(pitches), -1, len(panoramas)).permute(2, 0, 1)
    found = []
    for panorama, of_one in enumerate(scores):
        wide = F.pad(F.pad(of_one[None, None], (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1), value=-2.0)
        peaks = torch.where(of_one >= F.max_pool2d(wide, 3, 1)[0, 0], of_one, -2.0)
        for score, index in zip(*(each.tolist() for each in peaks.flatten().topk(3)), strict=True):
            yaw, pitch, _ = grid[index]
            found.append(Aligned(panorama, (yaw + 180) % 360 - 180, pitch, score))
    return sorted(found, key=lambda each: -each.score)


def refined(
    encoder: TokenEncoder,
    whitening: Whitening,
    example: torch.Tensor,
    fov: float,
    panoramas: torch.Tensor,
    starts: Sequence[Aligned],
) -> list[Aligned]:
    """The exact places: the example is painted where it may have looked, and around it in smaller and smaller steps.

    Args:
        panoramas: tokens [C, T, D], zero where the camera did not look.
        starts: likely places, the best first.

    Returns:
        The best place in each of the panoramas that were looked at, the best first. Its score is the mean cosine of
        the example's tokens with those of the panorama.
    """

    def judged(places: Sequence[Aligned]) -> list[Aligned]:
        directions = [(place.yaw, place.pitch, fov) for place in places]
        found = []
        for place, painted in zip(places, encoder.painted(example, directions), strict=True):
            cosines = (whitening(painted.tokens) * panoramas[place.panorama][painted.places]).sum(-1)
            found.append(place._replace(score=float(cosines.mean()) if len(cosines) else -1.0))
        return found

    places: list[Aligned] = judged(starts)
    for step, count in zip(_CLOSER, _TRIED, strict=True):
        places = sorted(places, key=lambda each: -each.score)[:count]
        aside = [
            place._replace(
                yaw=(place.yaw + a * step + 180) % 360 - 180, pitch=min(90.0, max(-90.0, place.pitch + b * step))
            )
            for place in places
            for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1))
        ]
        others = judged(aside)
        places = [
            max([place, *others[4 * at : 4 * at + 4]], key=lambda each: each.score) for at, place in enumerate(places)
        ]
    best: dict[int, Aligned] = {}
    for place in sorted(places, key=lambda each: -each.score):
        best.setdefault(place.panorama, place)
    return list(best.values())
