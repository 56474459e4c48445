"""The sphere: which way every view, pixel and token looks.

Pure functions on numpy float64 arrays; results are cached and read-only. No weights, no images.

Conventions (degrees at every public surface, radians inside):

- Axes: x right, y up, z forward. Yaw turns right, pitch looks up.
- Ray of (yaw a, pitch b): ``(cos b * sin a, sin b, cos b * cos a)``, a unit vector.
- Equirectangular (ERP) pixel (column u, row v) of W x H: ``yaw = ((u + 1/2)/W - 1/2) * 360``,
  ``pitch = (1/2 - (v + 1/2)/H) * 180``. The middle column is the front, both edges are behind.
- Perspective tile of field of view f, cell (row i, column j) of h x w: ``x = (2(j + 1/2)/w - 1) * tan(f/2)``,
  ``y = (1 - 2(i + 1/2)/h) * tan(f/2)``, ray = R_yaw R_pitch normalise(x, y, 1).
- A grid is ``(rows, columns)``; its cells are numbered row by row. Pixels and tokens use the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import numpy as np

from .options_panorama import check_flag, check_one_of, check_whole

Grid = tuple[int, int]
Direction = tuple[float, float, float]  # yaw, pitch and field of view in degrees, of a square perspective view
MAX_VIEWS = 1024  # of one panorama; the largest plan in use here has 27
MAX_IMAGE_SIZE = 8192  # pixels a side of a view
_ROUNDING = 1e-9  # cells closer than this to a border, in cells or in cosines, count as on it


@dataclass(frozen=True)
class View:
    """One view of the sphere: a square perspective tile, or a window of the ERP image, from pole to pole.

    Args:
        kind: `"perspective"` or `"erp"`.
        yaw: degrees to the right of the front, of the middle of the view.
        pitch: degrees above the horizon, in [-90, 90], of a tile; a window has none.
        fov: of a tile the horizontal and vertical field of view in degrees, in (0, 180); of a window its width, in
            (0, 360]. A window of 360 degrees is the global view.
        row: which row of pitch the view belongs to; the views of one row form a closed loop.
        roll: degrees that the view leans to the right. A window has pitch and roll only where the whole sphere was
            rotated (:meth:`rotated`).
    """

    kind: Literal["erp", "perspective"]
    yaw: float = 0.0
    pitch: float = 0.0
    fov: float = 360.0
    row: int = 0
    roll: float = 0.0

    @property
    def is_global(self) -> bool:
        """Whether this is the whole sphere."""
        return self.kind == "erp" and self.fov == 360

    @property
    def rotation(self) -> np.ndarray:
        """R_yaw R_pitch R_roll [3, 3]: turns camera coordinates (x right, y up, z forward) into the world's."""
        return yaw_rotation(self.yaw) @ camera_rotation(self.pitch, self.roll)

    def rotated(self, rotation: np.ndarray) -> View:
        """This view where the sphere is rotated by [3, 3] (what turns directions into where they come to lie)."""
        turned = rotation @ self.rotation
        a, b = math.atan2(turned[0, 2], turned[2, 2]), math.asin(min(1.0, max(-1.0, turned[1, 2])))
        lean = View(self.kind, math.degrees(a), math.degrees(b)).rotation.T @ turned
        angles = (
            math.degrees(a),
            math.degrees(b),
            self.fov,
            self.row,
            math.degrees(math.atan2(lean[0, 1], lean[1, 1])),
        )
        return View(self.kind, *angles)

    def rays(self, grid: Grid) -> np.ndarray:
        """Unit rays of the cells of this view, [rows, columns, 3]."""
        rows, columns = grid
        return self.rays_at(np.arange(rows)[:, None], np.arange(columns), grid)

    def rays_at(self, row: np.ndarray, column: np.ndarray, grid: Grid) -> np.ndarray:
        """Unit rays [..., 3] of places in this view's grid, cell centres at whole numbers: the inverse of
        :meth:`cells`."""
        rows, columns = grid
        row, column = np.broadcast_arrays(row, column)
        if self.kind == "erp":
            is_level = not (self.pitch or self.roll)
            yaw = math.radians(self.yaw) * is_level + ((column + 0.5) / columns - 0.5) * math.radians(self.fov)
            pitch = (0.5 - (row + 0.5) / rows) * math.pi
            rays = np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], -1)
            return rays if is_level else rays @ self.rotation.T
        half = math.tan(math.radians(self.fov) / 2)
        x = (2 * (column + 0.5) / columns - 1) * half
        y = (1 - 2 * (row + 0.5) / rows) * half
        camera = np.stack([x, y, np.ones_like(x)], -1)
        return camera @ self.rotation.T / np.linalg.norm(camera, axis=-1, keepdims=True)

    def solid_angles(self, grid: Grid) -> np.ndarray:
        """How much of the sphere each cell of this view shows, in steradians (all of it is 4 pi), [rows, columns]."""
        rows, columns = grid
        if self.kind == "erp":
            bands = -np.diff(np.sin(np.linspace(math.pi / 2, -math.pi / 2, rows + 1)))  # [rows]
            return np.repeat(bands[:, None], columns, 1) * math.radians(self.fov) / columns
        half = math.tan(math.radians(self.fov) / 2)
        x, y = np.meshgrid(np.linspace(-half, half, columns + 1), np.linspace(-half, half, rows + 1))
        # Of the rectangle from the middle of the plane z = 1 to a corner (x, y).
        corners = np.arctan2(x * y, np.sqrt(1 + x**2 + y**2))
        return np.diff(np.diff(corners, axis=0), axis=1)

    def cells(self, rays: np.ndarray, grid: Grid, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where rays fall in this view's grid: the inverse of :meth:`rays_at`.

        Args:
            rays: unit rays [..., 3].
            grid: (rows, columns) of this view.
            margin: how many cells beyond the outermost cell centres still count as inside. With 0 what is inside can
                be interpolated and need not be extrapolated; with 0.5 it is all that the view shows.

        Returns:
            Fractional row and column [...], cell centres at whole numbers, and a mask [...] of the rays inside.
            The columns of the global view wrap around: column -0.5 is as good as columns - 0.5.
        """
        rows, columns = grid
        margin += _ROUNDING
        if self.kind == "erp":
            is_level = not (self.pitch or self.roll)
            yaw, pitch = ray_angles(rays if is_level else rays @ self.rotation)
            turn = (yaw - self.yaw * is_level + 180) % 360 - 180
            column = (turn / self.fov + 0.5) * columns - 0.5
            row = (0.5 - pitch / 180) * rows - 0.5
            inside = (row > -margin) & (row < rows - 1 + margin)
            if not self.is_global:
                inside &= (column > -margin) & (column < columns - 1 + margin)
            return row, column, inside
        camera = rays @ self.rotation
        ahead = camera[..., 2] > _ROUNDING
        depth = np.where(ahead, camera[..., 2], 1.0) * math.tan(math.radians(self.fov) / 2)
        column = (camera[..., 0] / depth + 1) * columns / 2 - 0.5
        row = (1 - camera[..., 1] / depth) * rows / 2 - 0.5
        inside = (column > -margin) & (column < columns - 1 + margin)
        inside &= (row > -margin) & (row < rows - 1 + margin)
        return row, column, ahead & inside


@dataclass(frozen=True)
class ViewPlan:
    """The views of one panorama, in the order of tensors: the global view first (when there is one), then row by
    row of pitch, each row in loop order. Hashable, so that everything derived from it can be cached."""

    views: tuple[View, ...]

    @property
    def num_views(self) -> int:
        """V: how many views there are, the global one included."""
        return len(self.views)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Indices of the tiles and windows: every view but the global one."""
        return tuple(index for index, view in enumerate(self.views) if not view.is_global)

    @property
    def loops(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the tiles, one tuple a row of pitch, in loop order."""
        rows = sorted({self.views[index].row for index in self.tiles})
        return tuple(tuple(i for i in self.tiles if self.views[i].row == row) for row in rows)

    @property
    def has_rays(self) -> bool:
        """Whether tokens of different tiles can be matched by their rays: it takes two tiles."""
        return len(self.tiles) >= 2

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Yaw in [-180, 180), pitch and field of view of the tiles, in degrees; of a global view alone, of four views
        of 90 degrees around the horizon."""
        tiles = [self.views[index] for index in self.tiles]
        tiles = tiles or [View("perspective", yaw, fov=90.0) for yaw in loop_yaws(90.0, 0.0)]
        return tuple(((tile.yaw + 180) % 360 - 180, tile.pitch, tile.fov) for tile in tiles)

    def neighbours(self) -> tuple[tuple[int, int], ...]:
        """Pairs of neighbouring tiles: each with the next of its loop (the last with the first), and with the one
        above or below in the next row of pitch whose yaw is nearest (a cap at a pole: with all of that row). Each pair
        stands once."""
        pairs: list[tuple[int, int]] = []
        for loop in self.loops:
            pairs += [(loop[i], loop[(i + 1) % len(loop)]) for i in range(len(loop))]
        by_pitch = sorted(self.loops, key=lambda loop: self.views[loop[0]].pitch)
        for lower, upper in zip(by_pitch, by_pitch[1:], strict=False):
            many, few = (lower, upper) if len(lower) >= len(upper) else (upper, lower)
            for index in many:
                yaw = self.views[index].yaw
                turns = [abs((self.views[other].yaw - yaw + 180) % 360 - 180) for other in few]
                pairs.append((index, few[int(np.argmin(turns))]))
        unique = {frozenset(pair): pair for pair in reversed(pairs) if pair[0] != pair[1]}
        return tuple(sorted(unique.values(), key=pairs.index))


@dataclass(frozen=True)
class Correspondences:
    """Tokens of one view and the exact places in another view that look the same way, for P pairs of views.

    Args:
        first, second: view indices [P].
        tokens: cells of the first view [P, L].
        corners: the C = 4 cells of the second view around the place [P, L, C]; for strips the one cell, C = 1.
        weights: their bilinear weights [P, L, C], which sum to one.
    """

    first: np.ndarray
    second: np.ndarray
    tokens: np.ndarray
    corners: np.ndarray
    weights: np.ndarray

    @property
    def nearest(self) -> np.ndarray:
        """The one cell of the second view nearest to the place [P, L]."""
        return np.take_along_axis(self.corners, self.weights.argmax(-1)[..., None], -1)[..., 0]


def check_direction(direction: Any, name: str) -> Direction:
    """Yaw, pitch and field of view as floats.

    Args:
        name: what it is called in the message.

    Raises:
        ValueError: where it is none, or no view can look there.
    """
    yaw, pitch, fov = direction if isinstance(direction, list | tuple) and len(direction) == 3 else (math.nan,) * 3
    if not (math.isfinite(yaw) and -90 <= pitch <= 90 and 0 < fov < 180):
        raise ValueError(
            f"a {name} must be (yaw, pitch, fov) in degrees, the pitch in [-90, 90] and the field of view "
            f"in (0, 180), got {direction!r}. Typical value: (30, -10, 40)"
        )
    return float(yaw), float(pitch), float(fov)


def yaw_rotation(yaw: float) -> np.ndarray:
    """[3, 3]: turns directions as a camera sees them that looks `yaw` degrees to the right into those of the world."""
    a = math.radians(yaw)
    return np.array([[math.cos(a), 0.0, math.sin(a)], [0.0, 1.0, 0.0], [-math.sin(a), 0.0, math.cos(a)]])


def camera_rotation(pitch: float, roll: float) -> np.ndarray:
    """[3, 3]: turns directions as a camera sees them that looks up by `pitch` and leans to the right by `roll` degrees
    into those of the level world."""
    b, c = math.radians(pitch), math.radians(roll)
    up = np.array([[1, 0, 0], [0, math.cos(b), math.sin(b)], [0, -math.sin(b), math.cos(b)]])
    lean = np.array([[math.cos(c), math.sin(c), 0], [-math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return up @ lean


def ray_angles(rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Yaw in [-180, 180] and pitch in [-90, 90], in degrees, of unit rays [..., 3]."""
    yaw = np.degrees(np.arctan2(rays[..., 0], rays[..., 2]))
    pitch = np.degrees(np.arcsin(np.clip(rays[..., 1], -1.0, 1.0)))
    return yaw, pitch


def loop_yaws(width_deg: float, overlap_ratio: float) -> list[float]:
    """Yaws of a closed loop of views: ``n = ceil(360 / (width * (1 - overlap)))``, stride ``360/n``, the first to the
    front, the next ones to its right. 90 degrees with an overlap of 0.5 gives 8."""
    stride = width_deg * (1 - overlap_ratio)
    if stride * MAX_VIEWS < 360:
        raise ValueError(
            f"fov_deg={width_deg} with overlap_ratio={overlap_ratio} makes more than {MAX_VIEWS} views around the "
            "horizon. Typical values: 90.0 and 0.5"
        )
    n = math.ceil(360 / stride - _ROUNDING)
    return [i * 360 / n for i in range(n)]


_SECTORS = ("front", "front right", "right", "back right", "back", "back left", "left", "front left")


def view_words(view: View, template: str | None) -> str:
    """Which way a view looks, in words.

    Args:
        view: any.
        template: what is said, with `{direction}` (the eighth of the horizon in which the middle of the view lies, with
            "upper" or "lower" before it where that is more than 22.5 degrees away from the horizon; "up" and "down"
            from 67.5 degrees on; "panorama" for the global view), `{yaw}` and `{pitch}` (whole degrees).
    """
    if not template:
        return ""
    yaw, pitch = (round(view.yaw) + 180) % 360 - 180, round(view.pitch)
    if view.is_global:
        direction = "panorama"
    elif abs(view.pitch) >= 67.5:
        direction = "up" if view.pitch > 0 else "down"
    else:
        height = "upper " if view.pitch > 22.5 else "lower " if view.pitch < -22.5 else ""
        direction = height + _SECTORS[math.floor(view.yaw / 45 + 0.5) % 8]
    return template.format(direction=direction, yaw=yaw, pitch=pitch)


def check_view_text(template: str | None) -> str | None:
    """The template of :func:`view_words`. Raises `ValueError` for one that cannot be filled in."""
    try:
        view_words(View("erp"), template)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"view_text may hold {{direction}}, {{yaw}} and {{pitch}}, got {template!r} ({error}). "
            "Typical value: '{direction}: '"
        ) from error
    return template or None


@dataclass(frozen=True)
class ViewOptions:
    """What is cut out of a panorama: the options that the configuration and the image processor share.

    Everything that can be wrong is found on construction.

    Args:
        view_strategy: a name in `VIEW_STRATEGIES`: `"anyres_e2p"` (global view and loops of overlapping perspective
            tiles), `"e2p"` (those tiles alone), `"anyres_tiles"` (global view and loops of tiles that touch), `"tiles"`
            (those tiles alone), `"cubemap"` (six faces), `"sliding_window"` (windows of the ERP image) or `"resize"`
            (one view).
        fov_deg: field of view of a tile, or width of a window, in degrees, in (0, 180). Tiles that touch are as wide
            as a whole number of them allows: 360/n degrees, at most `fov_deg` and 120.
        overlap_ratio: share of the field of view that neighbouring tiles of a loop have in common, in (0, 1). It has
            no meaning where tiles touch.
        pitch_rows: pitch in degrees of each row of tiles, in [-90, 90].
        pole_caps: whether a tile looks straight up and another straight down.
        image_size: side of a view in pixels, at most 8192.

    Raises:
        ValueError: for an option out of range, and for more than 1024 views; it is named, with what is allowed and a
            typical value.
    """

    view_strategy: str = "anyres_e2p"
    fov_deg: float = 90.0
    overlap_ratio: float = 0.5
    pitch_rows: tuple[float, ...] = (0.0,)
    pole_caps: bool = False
    image_size: int = 256

    def __post_init__(self) -> None:
        check_one_of("view_strategy", self.view_strategy, sorted(VIEW_STRATEGIES))
        overlap = self.overlap_ratio
        if not _is_number(overlap) or not 0 < overlap < 1:
            raise ValueError(f"overlap_ratio must be in (0, 1), got {overlap!r}. Typical range: [0.3, 0.7]")
        if not _is_number(self.fov_deg) or not 0 < self.fov_deg < 180:
            raise ValueError(f"fov_deg must be in (0, 180), got {self.fov_deg!r}. Typical value: 90.0")
        rows = self.pitch_rows
        rows = tuple(rows) if isinstance(rows, Sequence) and not isinstance(rows, str) else ()
        if not rows or not all(_is_number(row) and -90 <= row <= 90 for row in rows) or len(set(rows)) != len(rows):
            raise ValueError(
                f"pitch_rows must be different degrees in [-90, 90], at least one, got {self.pitch_rows!r}. "
                "Typical values: [0.0] or [-45.0, 0.0, 45.0]"
            )
        check_flag("pole_caps", self.pole_caps)
        numbers = {"fov_deg": float(self.fov_deg), "overlap_ratio": float(overlap)}
        rows = tuple(float(row) for row in rows)
        size = check_whole("image_size", self.image_size, 256)
        if size > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be at most {MAX_IMAGE_SIZE}, got {size}. Typical value: 256")
        for name, value in {**numbers, "pitch_rows": rows, "image_size": size}.items():
            object.__setattr__(self, name, value)
        if self.plan.num_views > MAX_VIEWS:
            raise ValueError(
                f"fov_deg={self.fov_deg}, overlap_ratio={overlap} and {len(rows)} pitch_rows make "
                f"{self.plan.num_views} views, at most {MAX_VIEWS} are. Typical values: 90.0, 0.5 and [0.0]"
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all options, in the order of the arguments."""
        return tuple(option.name for option in fields(cls))

    @property
    def plan(self) -> ViewPlan:
        """The views of one panorama."""
        return _plan_of(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _e2p(options: ViewOptions) -> tuple[View, ...]:
    """A closed loop of perspective tiles for each row of pitch, and a tile at each pole where caps are asked for."""
    return _tiles_and_caps(options, loop_yaws(options.fov_deg, options.overlap_ratio), options.fov_deg)


def _tiles(options: ViewOptions) -> tuple[View, ...]:
    """For each row of pitch a closed loop of n perspective tiles of 360/n degrees, the least n for which they are no
    wider than `fov_deg`, and at least three: two would have to see 180 degrees each, which no perspective does.

    In the row at the horizon neighbours meet along a meridian and do not overlap, so stage `vision` has nothing to
    compare; tiles of other rows overlap on the side of their pole and leave gaps on the other.
    """
    yaws = loop_yaws(min(options.fov_deg, 120.0), 0.0)
    return _tiles_and_caps(options, yaws, 360 / len(yaws))


def _anyres_tiles(options: ViewOptions) -> tuple[View, ...]:
    """The whole panorama once, then the tiles of `tiles`."""
    return (View("erp"), *_tiles(options))


def _tiles_and_caps(options: ViewOptions, yaws: Sequence[float], fov: float) -> tuple[View, ...]:
    """Tiles of `fov` degrees at these yaws for each row of pitch, then the caps of `fov_deg`, if asked for."""
    tiles = [View("perspective", yaw, pitch, fov, row) for row, pitch in enumerate(options.pitch_rows) for yaw in yaws]
    rows = len(options.pitch_rows)
    caps = [View("perspective", 0.0, pitch, options.fov_deg, rows + i) for i, pitch in enumerate((90.0, -90.0))]
    return (*tiles, *(caps if options.pole_caps else ()))


def _anyres_e2p(options: ViewOptions) -> tuple[View, ...]:
    """The whole panorama once, then the tiles of `e2p`."""
    return (View("erp"), *_e2p(options))


def _cubemap(options: ViewOptions) -> tuple[View, ...]:
    """The six faces of a cube: front, right, back, left, up, down. They meet at their edges and do not overlap, so
    stage `vision` has nothing to compare; the options of tiles have no meaning here."""
    sides = [View("perspective", yaw, 0.0, 90.0, 0) for yaw in (0.0, 90.0, 180.0, 270.0)]
    return (*sides, View("perspective", 0.0, 90.0, 90.0, 1), View("perspective", 0.0, -90.0, 90.0, 2))


def _sliding_window(options: ViewOptions) -> tuple[View, ...]:
    """Windows `fov_deg` wide slid over the ERP image, from pole to pole, wrapping at the seam."""
    yaws = loop_yaws(options.fov_deg, options.overlap_ratio)
    return tuple(View("erp", yaw, 0.0, options.fov_deg) for yaw in yaws)


def _resize(options: ViewOptions) -> tuple[View, ...]:
    """The whole panorama as one view."""
    return (View("erp"),)


VIEW_STRATEGIES: dict[str, Callable[[ViewOptions], tuple[View, ...]]] = {
    "anyres_e2p": _anyres_e2p,
    "anyres_tiles": _anyres_tiles,
    "cubemap": _cubemap,
    "e2p": _e2p,
    "resize": _resize,
    "sliding_window": _sliding_window,
    "tiles": _tiles,
}


@lru_cache(maxsize=64)
def _plan_of(options: ViewOptions) -> ViewPlan:
    return ViewPlan(VIEW_STRATEGIES[options.view_strategy](options))


@lru_cache(maxsize=64)
def plan_rays(plan: ViewPlan, grid: Grid) -> np.ndarray:
    """Rays of all tokens of a plan, [V, S, 3] with S = rows * columns."""
    return _read_only(np.stack([view.rays(grid).reshape(-1, 3) for view in plan.views]))


@lru_cache(maxsize=64)
def owned_tokens(plan: ViewPlan, grid: Grid) -> np.ndarray:
    """Which tokens reach the language model under `token_selection="owned"`, [V, S] of bool.

    Of the tiles that see a direction, the one whose centre is nearest owns it, so that each direction comes from the
    tile that sees it best, and once. A token goes with the direction of its middle. A global view keeps all its
    tokens: it is the coarse picture of the whole. What this costs for which tiles is in `docs/views.md`.
    """
    rays = plan_rays(plan, grid)  # [V, S, 3]
    owned = np.ones(rays.shape[:2], dtype=bool)
    tiles = list(plan.tiles)
    if tiles:
        centres = np.stack([plan.views[tile].rays((1, 1))[0, 0] for tile in tiles])  # [N, 3]
        nearness = rays[tiles] @ centres.T  # [N, S, N], cosines
        sees = [plan.views[tile].cells(rays[tiles], grid, margin=0.5)[2] for tile in tiles]
        nearness[~np.stack(sees, -1)] = -np.inf
        nearest = (nearness > nearness.max(-1, keepdims=True) - _ROUNDING).argmax(-1)  # first of equals
        owned[tiles] = nearest == np.arange(len(tiles))[:, None]
    return _read_only(owned)


def times_shown(plan: ViewPlan, grid: Grid, count: int) -> np.ndarray:
    """In how many owned tokens of tiles (:func:`owned_tokens`) each of `count` directions lies, -1 where no tile sees
    it, [count]. The directions follow a spiral from pole to pole (Fibonacci), each for as much of the sphere; a global
    view counts where it is alone."""
    index = np.arange(count) + 0.5
    y, turn = 1 - 2 * index / count, index * math.pi * (3 - math.sqrt(5))
    rays = np.stack([np.sqrt(1 - y**2) * np.sin(turn), y, np.sqrt(1 - y**2) * np.cos(turn)], -1)
    owned = owned_tokens(plan, grid)
    times, seen = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
    for tile in plan.tiles or (0,):
        row, column, inside = plan.views[tile].cells(rays, grid, margin=0.5)
        row, column = (
            np.clip(np.rint(at[inside]), 0, n - 1).astype(int) for at, n in zip((row, column), grid, strict=True)
        )
        times[inside] += owned[tile].reshape(grid)[row, column]
        seen |= inside
    return np.where(seen, times, -1)


@lru_cache(maxsize=64)
def share_in_no_token(plan: ViewPlan, grid: Grid) -> float:
    """Which share of what the tiles of a plan see lies in no owned token, in [0, 1], to about a hundredth."""
    times = times_shown(plan, grid, 4096)
    return float((times == 0).sum() / (times >= 0).sum())


def direction_weights(plan: ViewPlan, grid: Grid, directions: Sequence[Direction]) -> np.ndarray:
    """How much of a direction each token of a plan shows, in steradians, [1 + N, V, S].

    Each part of the sphere counts once: with the token of the tile that owns it (:func:`owned_tokens`), and with that
    of the global view where no tile looks.

    Args:
        directions: yaw, pitch and field of view in degrees of N square perspective views; row 0 is the whole sphere.
    """
    rays, counted = plan_rays(plan, grid), owned_tokens(plan, grid).copy()  # [V, S, 3], [V, S]
    for index in set(range(plan.num_views)) - set(plan.tiles):
        for tile in plan.tiles:
            counted[index] &= ~plan.views[tile].cells(rays[index], grid, margin=0.5)[2]
    areas = counted * np.stack([view.solid_angles(grid).reshape(-1) for view in plan.views])  # [V, S]
    inside = [View("perspective", *direction).cells(rays, grid, margin=0.5)[2] for direction in directions]
    return np.stack([areas, *(areas * mask for mask in inside)])


def ray_code(rays: np.ndarray, num_frequencies: int) -> np.ndarray:
    """Position code of rays [..., 3] -> [..., 3 + 6K]: the ray itself, and sine and cosine of its coordinates at K
    octaves (Mildenhall et al. 2020, NeRF, eq. 4). It is a function of the ray alone: no view, no seam, no pole."""
    octaves = math.pi * 2.0 ** np.arange(num_frequencies)
    phases = (rays[..., None] * octaves).reshape(*rays.shape[:-1], -1)  # [..., 3K]
    return np.concatenate([rays, np.sin(phases), np.cos(phases)], -1)


def yaw_code(rays: np.ndarray, width: int) -> np.ndarray:
    """Position code of the yaw of rays [..., 3] -> [..., width]: sines and then cosines of the yaw, counted from behind
    in [0, 2 pi), times 10000^(-2i / width). So PanoLLaVA v1.0 codes it (after Vaswani et al. 2017, section 3.5), of
    columns counted over the views; here it is the yaw of the ray itself. It knows no pitch, and jumps behind.

    Raises:
        ValueError: for an odd width.
    """
    if width % 2:
        raise ValueError(f"a code of the yaw has sines and cosines: its width must be even, got {width}")
    yaw, _ = ray_angles(rays)
    phases = np.radians(yaw + 180.0)[..., None] * 10000.0 ** (-2.0 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(phases), np.cos(phases)], -1)


def yaw_places(rays: np.ndarray, cell_deg: float) -> np.ndarray:
    """Where rays [..., 3] stand in a panorama that is read from its left edge, behind, to its right: [...], the yaw in
    turns, 0.5 in front. Of the rays of one column what lies above stands before what lies below, all of them within a
    cell of `cell_deg` degrees of yaw."""
    yaw, pitch = ray_angles(rays)
    return 0.5 + yaw / 360.0 - pitch / 180.0 * cell_deg / 360.0


def narrowest_cell(plan: ViewPlan, grid: Grid) -> float:
    """The narrowest column of tokens of a plan's views, in degrees of yaw."""
    return min(view.fov for view in plan.views) / grid[1]


@lru_cache(maxsize=64)
def ray_correspondences(
    plan: ViewPlan, grid: Grid, overlap_pairs: tuple[str, ...] = ("neighbours",)
) -> tuple[Correspondences, ...]:
    """Tokens that look the same way in two views of a plan.

    Args:
        plan: the views.
        grid: (rows, columns) of tokens of every view.
        overlap_pairs: `"neighbours"` (tiles beside, above and below each other) and/or `"global"` (each tile and
            the global ERP view).

    Returns:
        One :class:`Correspondences` for each number of matched tokens L that occurs (pairs of one loop share it);
        pairs without a match are left out, so the result may be empty.
    """
    pairs: list[tuple[int, int]] = []
    if "neighbours" in overlap_pairs:
        pairs += plan.neighbours()
    if "global" in overlap_pairs:
        whole = [index for index, view in enumerate(plan.views) if view.is_global]
        pairs += [(tile, erp) for erp in whole for tile in plan.tiles]
    rays = plan_rays(plan, grid)
    groups: dict[int, list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for first, second in pairs:
        row, column, inside = plan.views[second].cells(rays[first], grid)
        tokens = np.flatnonzero(inside)
        if len(tokens):
            corners, weights = _bilinear(row[tokens], column[tokens], grid, wrap=plan.views[second].is_global)
            groups.setdefault(len(tokens), []).append((first, second, tokens, corners, weights))
    return tuple(_stack_pairs(group) for _, group in sorted(groups.items()))


@lru_cache(maxsize=64)
def strip_correspondences(loop: tuple[int, ...], grid: Grid, overlap_ratio: float) -> Correspondences:
    """Sequential pairs: the right k columns of a view with the left k columns of the next, row by row.

    Exact only for windows slid over an ERP image; for perspective tiles the two tokens of a pair look several
    degrees apart. ``k = max(1, round(overlap * columns))``.

    Args:
        loop: indices of views that follow each other to the right, at least two; the first follows the last.
        grid: (rows, columns) of tokens of every view.
        overlap_ratio: share of the columns that two views have in common, in (0, 1).
    """
    if len(loop) < 2:
        raise ValueError(f"it takes at least 2 views to pair them, got {len(loop)}")
    rows, columns = grid
    k = max(1, round(overlap_ratio * columns))
    cells = np.arange(rows * columns).reshape(rows, columns)
    tokens, places = cells[:, columns - k :].ravel(), cells[:, :k].ravel()
    pairs = zip(loop, loop[1:] + loop[:1], strict=True)
    return _stack_pairs([(i, j, tokens, places[:, None], np.ones((len(places), 1))) for i, j in pairs])


def _bilinear(row: np.ndarray, column: np.ndarray, grid: Grid, wrap: bool) -> tuple[np.ndarray, np.ndarray]:
    """The four cells around fractional places [L] and their weights, both [L, 4]."""
    rows, columns = grid
    row = np.clip(row, 0, rows - 1)
    top = np.minimum(np.floor(row), max(rows - 2, 0)).astype(np.int64)
    bottom = np.minimum(top + 1, rows - 1)
    if wrap:
        left = np.floor(column).astype(np.int64)
        right_share = column - left
        left, right = left % columns, (left + 1) % columns
    else:
        column = np.clip(column, 0, columns - 1)
        left = np.minimum(np.floor(column), max(columns - 2, 0)).astype(np.int64)
        right_share, right = column - left, np.minimum(left + 1, columns - 1)
    bottom_share = row - top
    corners = np.stack([top * columns + left, top * columns + right, bottom * columns + left, bottom * columns + right])
    weights = np.stack(
        [
            (1 - bottom_share) * (1 - right_share),
            (1 - bottom_share) * right_share,
            bottom_share * (1 - right_share),
            bottom_share * right_share,
        ]
    )
    return corners.T, weights.T


def _stack_pairs(pairs: Sequence[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]) -> Correspondences:
    first, second, tokens, corners, weights = zip(*pairs, strict=True)
    return Correspondences(
        first=_read_only(np.array(first)),
        second=_read_only(np.array(second)),
        tokens=_read_only(np.stack(tokens)),
        corners=_read_only(np.stack(corners)),
        weights=_read_only(np.stack(weights)),
    )


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
